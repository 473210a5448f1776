"""Feeding the trainer: draws that belong to (seed, epoch, slot), endless order of cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from medseg_supcon.errors import DataError
from medseg_supcon.training.cache import cached_dataset

Key = tuple[int, int, int]  # epoch, slot in the epoch, case


def item_seed(seed: int, epoch: int, slot: int, stream: int = 0) -> int:
    """Seed of one training item, a 32-bit integer that depends on its place and on nothing else.

    Streams of one place are independent of each other.

    >>> item_seed(0, 1, 2) == item_seed(0, 1, 2), item_seed(0, 1, 2) == item_seed(0, 2, 1)
    (True, False)
    """
    key = (stream,) if stream else ()
    return int(np.random.SeedSequence((seed, epoch, slot), spawn_key=key).generate_state(1)[0])


class EpochSampler(Sampler[Key]):
    """Endless (epoch, slot, case) keys: every case once before any a second time, shuffled by (seed, epoch).

    An epoch is ``steps_per_epoch`` global batches, whatever the number of cases. The order depends on
    the seed alone; a rank takes its share of every global batch, so that K ranks with ``batch_size`` scans
    each see what one process with K times as many sees.

    Args:
        cases: number of cases to draw from.
        steps_per_epoch: optimiser steps in an epoch.
        batch_size: scans per step on this rank.
        seed: the run's seed.
        rank, world_size: this process among ``world_size``.

    Attributes:
        epoch: where iteration starts; set it before the first batch to resume.
    """

    def __init__(
        self,
        cases: int,
        steps_per_epoch: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if cases < 1:
            raise DataError("There is no case to train on: the training list is empty.")
        self.cases, self.steps, self.batch_size = cases, steps_per_epoch, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 1

    def order(self, epoch: int) -> list[int]:
        """The case of every slot of an epoch, over all ranks."""
        slots = self.steps * self.batch_size * self.world_size
        rng = np.random.default_rng((self.seed, epoch))
        rounds = [rng.permutation(self.cases) for _ in range(-(-slots // self.cases))]
        return [int(c) for c in np.concatenate(rounds)[:slots]]

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        while True:
            order = self.order(epoch)
            for step in range(self.steps):
                first = (step * self.world_size + self.rank) * self.batch_size
                for slot in range(first, first + self.batch_size):
                    yield epoch, slot, order[slot]
            epoch += 1


class SeededDataset(Dataset[Any]):
    """Cases under a random transform whose generator is set anew for every (epoch, slot).

    Args:
        data: cases after preprocessing, indexed by number.
        transform: MONAI ``Randomizable`` transform.
        seed: the run's seed.
    """

    def __init__(self, data: Any, transform: Any, seed: int = 0) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Any:
        epoch, slot, case = key
        self.transform.set_random_state(seed=item_seed(self.seed, epoch, slot))
        return self.transform(dict(self.data[case]))


def two_view_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Any,
    two_views: Any,
    seed: int = 0,
    memory_share: float = 0.4,
    quiet: bool = False,
) -> SeededDataset:
    """The training set: cached cases under ``transform``, then two views drawn anew for every (epoch, slot).

    Args:
        data: items as in ``datalist.json``, with paths that can be read.
        transform: deterministic preprocessing, see :func:`cached_dataset`.
        two_views: random transform of a preprocessed case, see :class:`SeededDataset`.
        seed: the run's seed.
        memory_share, quiet: see :func:`cached_dataset`.
    """
    return SeededDataset(cached_dataset(data, transform, memory_share, quiet), two_views, seed)
