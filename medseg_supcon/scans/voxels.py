"""Voxel values: as 32-bit floats, counted, and in pieces that fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError

SLAB = 4_000_000  # voxels that are worked on at once
SMALL_RANGE = 100_000
SAMPLE = 100_000  # voxels that tell the usual intensities of a scan
FAR = 10.0  # usual ranges beyond which a voxel counts as an outlier

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_float32(data: npt.NDArray[Any], file: object) -> npt.NDArray[np.float32]:
    """The voxels as float32, if each is a finite real number that float32 can hold.

    Raises:
        DataError: colours, complex numbers, NaN, infinity, or numbers beyond 3.4e38.
    """
    check_real(data, file)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(data, dtype=np.float32)
        total = values.sum(dtype=np.float64)
    if not np.isfinite(total):
        odd = ~np.isfinite(values)
        if bad := int(np.count_nonzero(odd & ~np.isfinite(data))):
            raise DataError(f"{file}: {bad} voxels are NaN or infinite. Replace them, for example by 0.")
        if odd.any():
            largest = float(data.flat[np.abs(data).argmax()])
            raise DataError(
                f"{file}: {int(np.count_nonzero(odd))} voxels do not fit into a 32-bit float (the largest is "
                f"{largest:.3g}, at most 3.4e38 fits). Replace them, or scale the values down."
            )
    return values


def check_real(data: npt.NDArray[Any], file: object) -> None:
    """Raises DataError for colours and complex numbers."""
    if data.dtype.kind not in "biuf":
        raise DataError(
            f"{file}: voxels must be one real number each, found {data.dtype}. Convert it to a grey-value scan."
        )


def outliers(data: npt.NDArray[Any]) -> tuple[float, int] | None:
    """The most extreme value and the number of outliers, if a few of them make up the spread of a scan.

    A voxel is an outlier if it is more than ten usual ranges (from the 0.5 to the 99.5 percentile) away from
    them. Outliers are reported if the standard deviation is more than twice as large with them as without: a
    normalisation by it then leaves almost nothing of everything else.

    Args:
        data: finite numbers, any shape.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.scans import outliers
        >>> scan = np.random.default_rng(0).normal(size=(20, 20, 20))
        >>> outliers(scan) is None
        True
        >>> scan[3, 4, 5] = 1e6
        >>> outliers(scan)
        (1000000.0, 1)
    """
    flat = data.ravel(order="K")
    if flat.size == 0:
        return None
    low, high = (float(v) for v in np.percentile(flat[:: max(1, flat.size // SAMPLE)], [0.5, 99.5]))
    reach = FAR * (high - low)
    least, most = float(flat.min()), float(flat.max())
    if reach == 0 or (least >= low - reach and most <= high + reach):
        return None
    far = (flat < low - reach) | (flat > high + reach)
    usual = flat[~far]
    if not flat.std(dtype=np.float64) > 2 * usual.std(dtype=np.float64):
        return None
    return (most if most - high > low - least else least), int(np.count_nonzero(far))


def slabs(length: int, voxels: int) -> Iterator[slice]:
    """Slices along an axis of `length` that cut an array of `voxels` into pieces of a few million."""
    step = max(1, SLAB * length // max(voxels, 1))
    return (slice(start, start + step) for start in range(0, length, step))


def count_values(data: npt.NDArray[Any]) -> dict[float, int]:
    """Finite values of an array and how often each occurs, ascending (fast and lean for label maps)."""
    counts: dict[float, int] = {}
    flat = data.ravel(order="K")
    for part in slabs(flat.size, flat.size):
        for value, count in _count(flat[part]):
            counts[value] = counts.get(value, 0) + count
    return dict(sorted(counts.items()))


def _count(flat: npt.NDArray[Any]) -> Iterator[tuple[float, int]]:
    whole = as_whole(flat)
    if whole is None:
        values = np.unique(flat[np.isfinite(flat)], return_counts=True)
        return ((float(value), int(count)) for value, count in zip(*values, strict=True))
    low = int(whole.min())
    numbers = np.bincount(whole.astype(np.int64) - low)
    return ((float(i + low), int(numbers[i])) for i in np.flatnonzero(numbers))


def as_whole(data: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """The array as integers, if it holds only integers of a small range; None otherwise."""
    if data.size == 0:
        return None
    low, high = float(data.min()), float(data.max())
    if not (low >= -SMALL_RANGE and high <= SMALL_RANGE):  # NaN fails both
        return None
    if data.dtype.kind != "f":
        return data
    whole = data.astype(np.int32)
    return whole if np.array_equal(whole, data) else None


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], jobs: int | None = None) -> list[Result]:
    """``[work(item) for item in items]`` on a few threads (decompression and numpy release the lock)."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    jobs = jobs or min(4, os.cpu_count() or 1)
    if jobs == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, items))
