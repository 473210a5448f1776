"""Batches of labelled and unlabelled scans."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.training._data import EpochSampler, Key


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
        [1, 0, 3, 4]
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
