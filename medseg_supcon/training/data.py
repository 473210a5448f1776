"""Feeding the trainer: preprocessed cases held in memory, and an order and random draws that depend on the seed."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from itertools import count, islice
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import psutil
import torch
from monai.transforms import convert_to_contiguous
from torch.utils.data import Dataset, Sampler

from medseg_supcon.bundle import innermost
from medseg_supcon.errors import ConfigError, DataError, MedsegError
from medseg_supcon.scans import read_header, read_nifti
from medseg_supcon.training.log import CountDisplay
from medseg_supcon.training.ranks import ranks_here

MOST_THREADS = 16
BYTES_PER_VOXEL = 60  # of a stored scan while it and its label map are prepared; 54 were measured
Key = tuple[int, int, int]  # epoch, slot in the epoch, case
Items = Sequence[Mapping[str, Any]]


class CachedDataset(Dataset[Any]):
    """Cases after ``transform``; the first ones, up to ``budget`` bytes, are held, the others prepared at every use."""

    # not MONAI's CacheDataset: when a scan cannot be read, its threads still run while the program ends, and abort it
    def __init__(self, data: Items, transform: Any, budget: float, threads: int = 1, quiet: bool = True) -> None:
        self.data, self.transform = list(data), transform
        self.held: list[Any] = []
        own = local()

        def prepare(item: Mapping[str, Any]) -> Any:
            if not hasattr(own, "transform"):  # MONAI's transforms may not be shared
                own.transform = deepcopy(transform)
            return prepare_case(own.transform, item)

        with (
            CountDisplay("preparing scans", len(self.data), quiet) as display,
            closing(_in_order(prepare, self.data, threads)) as cases,
        ):
            for case in cases:
                budget -= sum(v.nbytes for v in case.values() if isinstance(v, torch.Tensor))
                if self.held and budget < 0:
                    break
                self.held.append(case)
                display.show(len(self.held))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Any:
        return self.held[number] if number < len(self.held) else prepare_case(self.transform, self.data[number])


def _in_order(work: Callable[[Any], Any], items: Sequence[Any], threads: int) -> Generator[Any, None, None]:
    """``map(work, items)`` on threads that run a little ahead; no thread runs after it ends or is closed."""
    if threads == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        rest = iter(items)
        ahead = deque(pool.submit(work, item) for item in islice(rest, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def cached_dataset(data: Items, transform: Any, memory_share: float = 0.4, quiet: bool = False) -> CachedDataset:
    """Cases after the preprocessing ``transform``, as many held as fit into ``memory_share`` (0..1) of the free memory."""
    if not 0 <= memory_share <= 1:
        raise ConfigError(f"memory_share must be between 0 and 1, got {memory_share}.")
    if len(data) == 0:  # MONAI would run an epoch of nothing
        raise DataError("The list of cases is empty. Check configs/datalist.json.")
    available = psutil.virtual_memory().available
    room = (1 - memory_share) * available / 2 / ranks_here()
    return CachedDataset(data, transform, memory_share * available, _threads(data, room), quiet)


def prepare_case(transform: Any, item: Mapping[str, Any]) -> Any:
    """A case after the transform; a `DataError` names the case, or the file at fault."""
    try:
        return convert_to_contiguous(transform(dict(item)))
    except Exception as error:
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        for file in _files(item, "image", "label"):
            read_nifti(file)  # raises a sentence if the file is at fault
        reason = " ".join(str(cause).split())[:200]
        raise DataError(
            f"{item.get('name', item.get('image', 'A case'))}: cannot be prepared ({type(cause).__name__}: {reason}). "
            "Look at its files, and at the preprocessing in the run's configs/inference.yaml and plan.json."
        ) from error


def _threads(data: Items, room: float) -> int:
    """How many of the cases may be prepared at once in ``room`` bytes."""
    # torchrun gives each process one torch thread
    usable = (os.cpu_count() or 1) // ranks_here() if ranks_here() > 1 else torch.get_num_threads()
    most = min(usable, MOST_THREADS, len(data))
    if most <= 1:
        return 1
    largest = max(sum(math.prod(read_header(file)[0]) for file in _files(item, "image")) for item in data)
    return max(1, min(most, int(room // max(1, BYTES_PER_VOXEL * largest))))


def _files(item: Mapping[str, Any], *keys: str) -> list[Path]:
    """The files under these keys; a key may hold one, a list, or nothing."""
    values = [item.get(key) or () for key in keys]
    return [Path(f) for value in values for f in ([value] if isinstance(value, str | Path) else value)]


def item_seed(seed: int, epoch: int, slot: int, stream: int = 0) -> int:
    """Seed of one training item, a 32-bit integer. Streams of one place are independent of each other."""
    spawn_key = (stream,) if stream else ()
    return int(np.random.SeedSequence((seed, epoch, slot), spawn_key=spawn_key).generate_state(1)[0])


class EpochSampler(Sampler[Key]):
    """Endless (epoch, slot, case) keys: every case once before any a second time, shuffled by (seed, epoch).

    An epoch is ``steps_per_epoch`` global batches, whatever the number of cases. Each rank takes its share of every
    global batch, so K ranks with ``batch_size`` scans each see what one process with K times as many sees.

    ``cases`` labelled scans are the first of the data set, and ``unlabelled`` ones follow. ``share`` of every batch, at
    least one scan of each kind, is unlabelled (``None``: every scan counts alike) from ``first_epoch`` to ``last_epoch``.
    """

    def __init__(
        self, cases: int, steps_per_epoch: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, *,
        unlabelled: int = 0, share: float | None = None, first_epoch: int = 1, last_epoch: int | None = None,
        required: bool = False,
    ) -> None:  # fmt: skip
        if cases < 1:
            raise DataError("The training list is empty. Check configs/datalist.json.")
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"unlabelled_share must be above 0 and below 1, got {share}.")
        self.cases, self.steps, self.batch_size = cases, steps_per_epoch, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.unlabelled, self.share, self.required = unlabelled, share, required
        self.first_epoch, self.last_epoch = first_epoch, last_epoch
        self.epoch = 1  # where iteration starts

    def order(self, epoch: int) -> list[int]:
        """The scan of every slot of an epoch, over all ranks; in a batch the labelled ones come first."""
        batches = self.steps * self.world_size
        over = self.last_epoch is not None and epoch > self.last_epoch
        if self.unlabelled == 0 or epoch < self.first_epoch or over:
            rng = np.random.default_rng((self.seed, epoch))
            return _rounds(rng, self.cases, batches * self.batch_size).tolist()
        rng = np.random.default_rng((self.seed, epoch, 1))  # not the stream of labelled scans alone
        if self.share is None:
            return _rounds(rng, self.cases + self.unlabelled, batches * self.batch_size).tolist()
        number = min(max(1, round(self.share * self.batch_size)), self.batch_size - 1)
        known = _rounds(rng, self.cases, batches * (self.batch_size - number))
        others = self.cases + _rounds(rng, self.unlabelled, batches * number)
        mixed = np.concatenate([known.reshape(batches, -1), others.reshape(batches, -1)], axis=1)
        return [int(case) for case in mixed.reshape(-1)]

    def __iter__(self) -> Iterator[Key]:
        # checked here, because MONAI would wrap an error of __init__ in its own
        if self.required and self.unlabelled == 0:
            raise ConfigError(
                "This recipe also needs unlabelled scans, but configs/datalist.json lists none. Plan it into another "
                "folder with --unlabelled DIR or --labels N (the other labelled scans count as unlabelled), or use joint."
            )
        if self.share is not None and self.unlabelled > 0 and self.batch_size < 2:
            raise ConfigError("A batch needs a labelled and an unlabelled scan. Use --set plan::batch_size=2.")
        for epoch in count(self.epoch):  # read with the first key, after a checkpoint was loaded
            order = self.order(epoch)
            for step in range(self.steps):
                first = (step * self.world_size + self.rank) * self.batch_size
                for slot in range(first, first + self.batch_size):
                    yield epoch, slot, order[slot]


def _rounds(rng: np.random.Generator, cases: int, slots: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``slots`` cases, each once before any a second time."""
    drawn = [rng.permutation(cases) for _ in range(-(-slots // cases))]
    return np.concatenate(drawn)[:slots]


class SeededDataset(Dataset[Any]):
    """Cases under a random transform (MONAI's ``Randomizable``) that is seeded for every (epoch, slot)."""

    def __init__(self, data: Any, transform: Any, seed: int = 0) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Any:
        epoch, slot, case = key
        self.transform.set_random_state(seed=item_seed(self.seed, epoch, slot))
        return self.transform(dict(self.data[case]))


def two_view_dataset(
    data: Items, transform: Any, two_views: Any, seed: int = 0, memory_share: float = 0.4, quiet: bool = False
) -> SeededDataset:
    """The training set: `cached_dataset` of ``transform``, then ``two_views`` for every (epoch, slot)."""
    return SeededDataset(cached_dataset(data, transform, memory_share, quiet), two_views, seed)
