"""Voxel values: as 32-bit floats, counted, and in pieces that fit into memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError

SLAB = 4_000_000  # voxels that are worked on at once
SMALL_RANGE = 100_000
SAMPLE = 100_000  # voxels that tell the usual intensities of a scan
FAR = 10.0  # usual ranges beyond which a voxel may be an outlier
GAP = 30.0  # times as far as the next nearer voxel an outlier is: around a PET hot spot there are voxels in between

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_float32(data: npt.NDArray[Any], file: object) -> npt.NDArray[np.float32]:
    """The voxels as float32; DataError for colours, complex numbers, NaN, infinity, and numbers beyond 3.4e38."""
    check_real(data, file)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(data, dtype=np.float32)
        total = values.sum(dtype=np.float64)
    if not np.isfinite(total):
        odd = ~np.isfinite(values)
        if bad := int(np.count_nonzero(odd & ~np.isfinite(data))):
            raise DataError(f"{file}: {bad} voxels are NaN or infinite. Replace them, for example by 0.")
        found = f"{np.count_nonzero(odd)} voxels do not fit into a 32-bit float"
        largest = float(data.flat[np.abs(data).argmax()])
        raise DataError(f"{file}: {found} (the largest is {largest:.3g}, at most 3.4e38 fits). Scale the values down.")
    return values


def check_real(data: npt.NDArray[Any], file: object) -> None:
    """Raises DataError for colours and complex numbers."""
    if data.dtype.kind not in "biuf":
        raise DataError(f"{file}: voxels must be one real number each, found {data.dtype}. Convert it to grey values.")


def outliers(data: npt.NDArray[Any]) -> tuple[float, int] | None:
    """The most extreme value and the number of outliers, if a few of them make up the spread of a scan.

    An outlier is more than ten usual ranges (from the 0.5 to the 99.5 percentile) away from them, and 30
    times as far away as the next nearer voxel. Outliers are reported if the standard deviation is more than twice as large
    with them as without: a normalisation by it then leaves almost nothing of everything else. Finite voxels, any shape.
    """
    flat = data.ravel(order="K")
    low, high = (float(v) for v in np.percentile(flat[:: max(1, flat.size // SAMPLE)], [0.5, 99.5]))
    reach = FAR * (high - low)
    if reach == 0 or (flat.min() >= low - reach and flat.max() <= high + reach):
        return None
    far = np.flatnonzero((flat < low - reach) | (flat > high + reach))
    values = flat[far].astype(np.float64)
    distances = np.maximum(low - values, values - high)
    order = np.argsort(distances)
    steps = np.diff(np.log(distances[order]), prepend=np.log(reach))
    if steps.max() < np.log(GAP):
        return None
    odd = order[steps.argmax() :]
    if not flat.std(dtype=np.float64) > 2 * np.delete(flat, far[odd]).std(dtype=np.float64):
        return None
    return float(values[odd[-1]]), len(odd)


def slabs(length: int, voxels: int) -> Iterator[slice]:
    """Slices along an axis of `length` that cut an array of `voxels` into pieces of a few million."""
    step = max(1, SLAB * length // max(voxels, 1))
    return (slice(start, start + step) for start in range(0, length, step))


def count_values(data: npt.NDArray[Any]) -> dict[float, int]:
    """Finite values of an array and how often each occurs, ascending (fast and lean for label maps)."""
    counts: Counter[float] = Counter()
    flat = data.ravel(order="K")
    for part in slabs(flat.size, flat.size):
        whole = as_whole(flat[part])
        if whole is None:
            values, numbers = np.unique(flat[part][np.isfinite(flat[part])], return_counts=True)
        else:
            low = int(whole.min())
            numbers = np.bincount(whole.astype(np.int64) - low)
            values = np.flatnonzero(numbers) + low
            numbers = numbers[numbers > 0]
        counts.update(dict(zip(values.astype(float).tolist(), numbers.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def as_whole(data: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """The array as integers, if it holds only integers of a small range; None otherwise."""
    if data.size == 0 or not (float(data.min()) >= -SMALL_RANGE and float(data.max()) <= SMALL_RANGE):  # NaN: neither
        return None
    if data.dtype.kind != "f":
        return data
    whole = data.astype(np.int32)
    return whole if np.array_equal(whole, data) else None


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], jobs: int | None = None) -> list[Result]:
    """``[work(item) for item in items]`` on a few threads (decompression and numpy release the lock)."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
