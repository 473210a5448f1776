"""Labels, pseudo-labels and contrast in one loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.training._batch import Target
from medseg_supcon.training._mixed import with_unknown


class SemiSupervisedLoss(nn.Module):
    """segmentation(labels) + u(t) * segmentation(pseudo-labels) + w(t) * contrast(both), at step t = 1, 2, ...

    u(t) = pseudo_weight * exp(-5 (1 - min(1, t / pseudo_warmup))^2), and w(t) = contrast_weight *
    min(1, t / contrast_warmup).

    Args:
        segmentation_loss: called with (logits, labels); leaves voxels of label -1 out.
        contrastive_loss: a ``VoxelSupConLoss``, projection head included.
        contrast_weight: final w; at 0 the contrast is not computed.
        contrast_warmup: steps over which w rises; 0: none.
        pseudo_weight: final u; at 0 the pseudo-labels do not teach the segmentation.
        pseudo_warmup: steps over which u rises; 0: none.
        pseudo_contrast: the contrast takes pseudo-labelled voxels too.
        unknown: class index, in the contrast, of voxels without label or pseudo-label; for
            ``positives="same_voxel"``, which need none. ``None``: they are left out.

    Shape:
        prediction: logits (2B, C, *patch) and features (2B, F, *patch); target: what ``PseudoLabels`` gives.

    Attributes:
        terms: the last call's detached scalars: ``loss``, ``segmentation``, ``pseudo``, ``contrastive``,
            ``pseudo_weight``, ``contrast_weight``, ``confident`` (share of the voxels without a label that have
            a pseudo-label).
        step: steps so far, a buffer that checkpoints carry.

    Raises:
        ValueError: a weight or a number of steps below 0.

    Source:
        Laine and Aila 2017, Temporal ensembling (the rise of u).
    """

    step: Tensor

    def __init__(
        self,
        segmentation_loss: Callable[..., Tensor],
        contrastive_loss: Callable[..., Tensor],
        *,
        contrast_weight: float = 0.1,
        contrast_warmup: int = 0,
        pseudo_weight: float = 1.0,
        pseudo_warmup: int = 0,
        pseudo_contrast: bool = True,
        unknown: int | None = None,
    ) -> None:
        super().__init__()
        numbers = (contrast_weight, contrast_warmup, pseudo_weight, pseudo_warmup)
        if not all(number >= 0 for number in numbers):
            raise ValueError(f"weights and warm-ups must be >= 0, got {numbers}")
        self.segmentation_loss, self.contrastive_loss = segmentation_loss, contrastive_loss
        self.contrast_weight, self.contrast_warmup = float(contrast_weight), contrast_warmup
        self.pseudo_weight, self.pseudo_warmup = float(pseudo_weight), pseudo_warmup
        self.pseudo_contrast, self.unknown = pseudo_contrast, unknown
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: tuple[Tensor, Tensor], target: Target) -> Tensor:
        """The sum, a scalar."""
        logits, features = prediction
        labels, pseudo = target["label"], target["pseudo_label"]
        t = (self.step + 1).to(torch.float32)  # on its device: to look at it would make a GPU wait
        u = self.pseudo_weight * torch.exp(-5 * (1 - _share(t, self.pseudo_warmup)) ** 2)
        w = self.contrast_weight * _share(t, self.contrast_warmup)
        segmentation = self.segmentation_loss(logits, labels)
        by_pseudo = self.segmentation_loss(logits, pseudo)
        contrastive = torch.zeros_like(segmentation)
        loss = segmentation + u * by_pseudo
        if self.contrast_weight > 0:
            known = torch.where(labels == IGNORE_INDEX, pseudo, labels) if self.pseudo_contrast else labels
            known = with_unknown(known, target["pair_ids"], self.unknown)
            contrastive = self.contrastive_loss(
                features,
                known,
                pair_ids=target["pair_ids"],
                view_ids=target["view_ids"],
                scan_ids=target["scan_ids"],
                # a class that the logits do not have cannot be looked up in them
                logits=None if self.unknown is not None else logits.detach(),
            )
            loss = loss + w * contrastive
        if self.training:
            self.step += 1
        asked = target["asked"].clamp_min(1)
        self.terms = {
            "loss": loss.detach(),
            "segmentation": segmentation.detach(),
            "pseudo": by_pseudo.detach(),
            "contrastive": contrastive.detach(),
            "pseudo_weight": u,
            "contrast_weight": w,
            "confident": (pseudo != IGNORE_INDEX).sum() / asked,
        }
        return loss


def _share(step: Tensor, warmup: int) -> Tensor:
    return (step / warmup).clamp(max=1.0) if warmup > 0 else torch.ones_like(step)
