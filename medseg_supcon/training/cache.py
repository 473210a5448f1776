"""Cases after preprocessing, as many as memory allows: prepared once, on several threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from itertools import islice
from pathlib import Path
from threading import local
from typing import Any

import psutil
import torch
from monai.transforms import convert_to_contiguous
from torch.utils.data import Dataset

from medseg_supcon.bundle import innermost
from medseg_supcon.errors import DataError, MedsegError
from medseg_supcon.scans import read_header, read_nifti
from medseg_supcon.training.progress import CountDisplay
from medseg_supcon.training.ranks import ranks_here

MOST_THREADS = 16
BYTES_PER_VOXEL = 60  # of a stored scan, while it is prepared together with its label map; 54 were measured


class CachedDataset(Dataset[Any]):
    """Cases after ``transform``; the first ones are held in memory, the others prepared at every use.

    Not MONAI's ``CacheDataset``: where a scan cannot be read, its threads are still at work while the program ends,
    which aborts it.

    Args:
        data: items.
        transform: deterministic preprocessing; each thread has a copy of its own.
        budget: bytes of tensors that may be held; the first case is, whatever its size.
        threads: cases that are prepared at once.
        quiet: show no progress.

    Raises:
        DataError: a case cannot be prepared; the sentence names its file.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Any,
        budget: float,
        threads: int = 1,
        quiet: bool = True,
    ) -> None:
        self.data, self.transform = list(data), transform
        self.held: list[Any] = []
        own = local()

        def prepare(item: Mapping[str, Any]) -> Any:
            if not hasattr(own, "transform"):  # MONAI's may not be shared
                own.transform = deepcopy(transform)
            return _prepare(own.transform, item)

        with (
            CountDisplay("preparing scans", len(self.data), quiet) as display,
            closing(in_order(prepare, self.data, threads)) as cases,
        ):
            for case in cases:
                budget -= sum(
                    v.numel() * v.element_size() for v in case.values() if isinstance(v, torch.Tensor)
                )
                if self.held and budget < 0:
                    break
                self.held.append(case)
                display.show(len(self.held))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Any:
        return self.held[number] if number < len(self.held) else _prepare(self.transform, self.data[number])


def in_order(work: Callable[[Any], Any], items: Sequence[Any], threads: int) -> Generator[Any, None, None]:
    """``map(work, items)`` on threads that run a little ahead; when it ends or is closed, none is at work any more.

    Args:
        work: called once for each item.
        items: taken in their order.
        threads: how many; 1: everything happens in the caller's own.
    """
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


def cached_dataset(
    data: Sequence[Mapping[str, Any]], transform: Any, memory_share: float = 0.4, quiet: bool = False
) -> CachedDataset:
    """Cases after ``transform``, as many of them held in memory as fit into ``memory_share`` of what is free.

    They are prepared on several threads: as many as this process may use, and as have room in half of the memory
    that the cache leaves.

    Args:
        data: items as in ``datalist.json``, at least one.
        transform: deterministic preprocessing.
        memory_share: share (0 to 1) of the machine's available memory that the cache may take.
        quiet: show no progress.

    Raises:
        DataError: without an item (MONAI would run an epoch of nothing, silently), or with one that cannot be read.
    """
    if len(data) == 0:
        raise DataError(
            "There is no case to work on: the list of cases is empty. Check configs/datalist.json."
        )
    available = psutil.virtual_memory().available
    room = (1 - memory_share) * available / 2 / ranks_here()
    return CachedDataset(data, transform, memory_share * available, _threads(data, room), quiet)


def _prepare(transform: Any, item: Mapping[str, Any]) -> Any:
    """A case after the transform; what goes wrong is told by the name of its file."""
    try:
        return convert_to_contiguous(transform(dict(item)))
    except Exception as error:
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        for file in _files(item, "image", "label"):
            read_nifti(file)  # which says what is wrong with it
        reason = " ".join(str(cause).split())[:200]
        raise DataError(
            f"{item.get('name', item.get('image', 'A case'))}: cannot be prepared ({type(cause).__name__}: {reason}). "
            "Look at its files, and at the preprocessing in the run's configs/inference.yaml and plan.json."
        ) from error


def _threads(data: Sequence[Mapping[str, Any]], room: float) -> int:
    """How many of the cases may be prepared at once in ``room`` bytes."""
    # torchrun gives each process one thread, for there may be many
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
