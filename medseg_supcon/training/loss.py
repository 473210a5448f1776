"""What the validation's metrics look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

from medseg_supcon.losses import IGNORE_INDEX, DiceSupConLoss
from medseg_supcon.training.ranks import sum_over_ranks, world_size

Target = dict[str, Tensor]


def prepare_views(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Target]:
    """MONAI ``prepare_batch``: (B, 2, C, *patch) views become 2B patches, view 1 and 2 of a scan side by side.

    Returns:
        image (2B, C, *patch) and the target: ``label`` (2B, 1, *patch) class indices with -1 where nobody
        labelled, ``pair_ids`` (2B, 1, *patch), ``view_ids`` (2B,) 0 or 1, ``scan_ids`` (2B,).
    """
    image: Tensor = batchdata["image"]
    scans, views = image.shape[:2]

    def to(x: Tensor) -> Tensor:
        return x.flatten(0, 1).to(device=device, non_blocking=non_blocking, **kwargs)

    view_ids = torch.arange(views, device=device).repeat(scans)
    scan_ids = torch.arange(scans, device=device).repeat_interleave(views)
    target = {"label": to(batchdata["label"]), "view_ids": view_ids, "scan_ids": scan_ids}
    if "pair_ids" in batchdata:
        target["pair_ids"] = to(batchdata["pair_ids"])
    return to(image), target


class TwoViewLoss(nn.Module):
    """Gives ``DiceSupConLoss`` the face a MONAI trainer calls: ``loss(prediction, target)``.

    Args:
        loss: the joint loss.

    Shape:
        prediction: logits (2B, C, *patch) and features (2B, F, *patch), as ``ContrastiveNetwork`` gives them;
        target: what :func:`prepare_views` returns.
    """

    def __init__(self, loss: DiceSupConLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def terms(self) -> dict[str, Tensor]:
        """The terms of the last call, detached."""
        return self.loss.terms

    def forward(self, prediction: tuple[Tensor, Tensor], target: Target) -> Tensor:
        logits, features = prediction
        loss: Tensor = self.loss(
            logits,
            target["label"],
            features,
            pair_ids=target.get("pair_ids"),
            view_ids=target["view_ids"],
            scan_ids=target["scan_ids"],
        )
        return loss


class DiceCrossEntropy(nn.Module):
    """MONAI's Dice loss plus cross-entropy, both blind to ignored voxels (``DiceCELoss`` cannot be told to).

    With several ranks it is the loss of the batch over all of them, see ``sum_over_ranks``.

    Args:
        dice_weight, ce_weight: factors of the two terms.
        batch: Dice over the whole batch instead of scan by scan; steadier where a patch lacks a class.
        class_weights: (C,) weights of the cross-entropy, or ``None``.
        ignore_index: label of voxels left out.

    Shape:
        logits (B, C, *spatial) and labels (B, 1, *spatial) of class indices give a scalar; 0, attached to the
        graph, where every voxel is ignored.

    Example:
        >>> loss = DiceCrossEntropy()
        >>> float(loss(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), -1)))
        0.0
    """

    class_weights: Tensor | None

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        batch: bool = True,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.dice_weight, self.ce_weight, self.ignore_index = dice_weight, ce_weight, ignore_index
        self.register_buffer("class_weights", class_weights)
        self.dice = DiceLoss(
            include_background=False, to_onehot_y=True, softmax=True, batch=batch, ignore_index=ignore_index
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, target = logits.float(), labels[:, 0].long()
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights
        total = F.cross_entropy(logits, target, weights, ignore_index=self.ignore_index, reduction="sum")
        # the mean by hand: with every voxel ignored torch's is 0 / 0
        seen = (weights[target.clamp_min(0)] * (target != self.ignore_index)).sum()
        sums = sum_over_ranks(torch.stack((total, seen)))
        ce = sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
        dice: Tensor = self.dice(logits, labels) if world_size() == 1 else self._over_ranks(logits, labels)
        return self.dice_weight * dice + self.ce_weight * ce

    def _over_ranks(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``self.dice`` of the batch over all ranks."""
        if not self.dice.batch:
            return sum_over_ranks(self.dice(logits, labels)) / world_size()
        p = logits.softmax(1)[:, 1:] * (labels != self.ignore_index)
        y = F.one_hot(labels[:, 0].long().clamp_min(0), logits.shape[1]).movedim(-1, 1)[:, 1:] * (
            labels != self.ignore_index
        )
        axes = [0, *range(2, p.ndim)]
        overlap, size = sum_over_ranks(torch.stack(((p * y).sum(axes), (p + y).sum(axes))))
        dice: Tensor = (2 * overlap + self.dice.smooth_nr) / (size + self.dice.smooth_dr)
        return 1 - dice.mean()


def label_pairs(output: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Predicted and reference class indices of an evaluator's output, (1, X, Y, Z) each.

    ``ignite`` output transform: the logits' largest class against the label map, ignored voxels (-1) kept
    as they are, for the metric to leave out.
    """
    predictions = [torch.as_tensor(o["pred"]).argmax(0, keepdim=True) for o in output]
    return predictions, [torch.as_tensor(o["label"]) for o in output]
