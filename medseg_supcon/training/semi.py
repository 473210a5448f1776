"""Labels, pseudo-labels and contrast in one loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.training.data import EpochSampler, Key
from medseg_supcon.training.loss import Target


class MixedSampler(EpochSampler):
    """An :class:`EpochSampler` over labelled scans (0 .. labelled - 1) and unlabelled ones (those after them).

    Args:
        labelled: labelled scans, the first of the data set.
        unlabelled: unlabelled scans, those after them.
        steps_per_epoch: optimiser steps in an epoch.
        batch_size: scans per step on this rank.
        seed: the run's seed.
        share: share of every batch that is unlabelled, at least one scan of each kind; ``None``: every scan
            counts alike.
        first_epoch: before this epoch only labelled scans are drawn.
        last_epoch: from the next epoch on only labelled scans are drawn; ``None``: never.
        required: without an unlabelled scan, training ends with a sentence.
        rank, world_size: this process among ``world_size``.

    Raises:
        ConfigError: (when iterated) no unlabelled scan though ``required``, or batches too small to hold both.

    Example:
        >>> MixedSampler(2, 3, steps_per_epoch=1, batch_size=4, share=0.5).order(1)
        [1, 0, 2, 4]
    """

    def __init__(
        self,
        labelled: int,
        unlabelled: int,
        steps_per_epoch: int,
        batch_size: int,
        seed: int = 0,
        *,
        share: float | None = None,
        first_epoch: int = 1,
        last_epoch: int | None = None,
        required: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(labelled, steps_per_epoch, batch_size, seed, rank, world_size)
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"unlabelled_share must lie between 0 and 1, got {share}.")
        self.unlabelled, self.share, self.required = unlabelled, share, required
        self.first_epoch, self.last_epoch = first_epoch, last_epoch

    def __iter__(self) -> Iterator[Key]:
        # not in __init__: MONAI would bury the sentence in errors of its own
        if self.required and self.unlabelled == 0:
            raise ConfigError(
                "This recipe learns from unlabelled scans too, and the run has none (configs/datalist.json). "
                "Plan it anew, into another folder, with --unlabelled DIR (further scans) or --labels N (scans "
                "beyond the first N labelled ones count as unlabelled); or choose --recipe joint."
            )
        if self.share is not None and self.unlabelled > 0 and self.batch_size < 2:
            raise ConfigError(
                f"A batch must hold a labelled and an unlabelled scan, but it has {self.batch_size} scan. "
                "Plan the run with --set plan::batch_size=2."
            )
        return super().__iter__()

    def order(self, epoch: int) -> list[int]:
        """The scan of every slot of an epoch, over all ranks; in a batch the labelled ones come first."""
        over = self.last_epoch is not None and epoch > self.last_epoch
        if self.unlabelled == 0 or epoch < self.first_epoch or over:
            return super().order(epoch)
        batches = self.steps * self.world_size
        rng = np.random.default_rng((self.seed, epoch, 1))  # not the stream of labelled scans alone
        if self.share is None:
            return _rounds(rng, self.cases + self.unlabelled, batches * self.batch_size).tolist()
        number = min(max(1, round(self.share * self.batch_size)), self.batch_size - 1)
        known = _rounds(rng, self.cases, batches * (self.batch_size - number))
        others = self.cases + _rounds(rng, self.unlabelled, batches * number)
        mixed = np.concatenate([known.reshape(batches, -1), others.reshape(batches, -1)], axis=1)
        return [int(case) for case in mixed.reshape(-1)]


def _rounds(rng: np.random.Generator, cases: int, slots: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``slots`` cases, each once before any a second time."""
    drawn = [rng.permutation(cases) for _ in range(-(-slots // cases))]
    return np.concatenate(drawn)[:slots]


def with_unknown(labels: Tensor, pair_ids: Tensor | None, unknown: int | None) -> Tensor:
    """Labels in which unlabelled voxels of the scan have a class of their own, for ``positives="same_voxel"``.

    Such positives need no label; the sampler draws labelled voxels only.

    Args:
        labels: (B, 1, *spatial) class indices, -1 unlabelled or outside the scan.
        pair_ids: (B, 1, *spatial), -1 outside the scan or (view 2) outside view 1.
        unknown: index of that class, C of 0 .. C-1; ``None``: the labels as they are.
    """
    if unknown is None or pair_ids is None:
        return labels
    return labels.masked_fill((labels == IGNORE_INDEX) & (pair_ids >= 0), unknown)


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
