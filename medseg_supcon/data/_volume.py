"""Reading one NIfTI file, with every fault told as a sentence."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.volumeutils import apply_read_scaling

from medseg_supcon.data._forms import Doubt, header_doubts
from medseg_supcon.data._place import in_mm, unit_of_length
from medseg_supcon.data._unreadable import not_a_file, promises_too_much, unreadable
from medseg_supcon.errors import DataError

__all__ = [
    "NIFTI_ENDINGS",
    "Volume",
    "as_whole",
    "count_values",
    "in_parallel",
    "read_header",
    "read_volume",
    "read_voxels",
    "slabs",
    "stem",
]

NIFTI_ENDINGS = (".nii.gz", ".nii")
SLAB = 4_000_000
SMALL_RANGE = 100_000

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Volume:
    """A scan or label map as stored.

    Attributes:
        data: voxels (X, Y, Z) or (X, Y, Z, C), scaling applied; further axes of one are dropped.
        affine: (4, 4), voxel indices to RAS+, in `unit`.
        unit: of the affine as the header says it: "mm" (or nothing), "metres" or "microns".
        doubts: what the header says twice, or not at all, about place.
    """

    data: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    unit: str = "mm"
    doubts: tuple[Doubt, ...] = ()

    @property
    def affine_mm(self) -> npt.NDArray[np.float64]:
        """(4, 4), voxel indices to RAS+ mm, whatever the header's unit of length."""
        return in_mm(self.affine, self.unit)


def stem(path: str | Path) -> str:
    """File name without the NIfTI ending: ``stem("x/a.b.nii.gz") == "a.b"``."""
    name = Path(path).name
    for ending in NIFTI_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).stem


def _open(path: Path) -> Any:
    if (problem := not_a_file(path)) is not None:
        raise DataError(problem)
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise DataError(f"{path}: training data must be NIfTI (.nii or .nii.gz). Convert this file.")
    try:
        return nibabel.load(path)
    except Exception as error:  # nibabel raises a dozen kinds for broken headers
        raise DataError(unreadable(path, error)) from error


def read_header(path: Path) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
    """Shape and affine of a NIfTI file, without its voxels.

    Raises:
        DataError: the file is missing, not NIfTI or damaged.
    """
    image = _open(path)
    return _squeezed(tuple(int(n) for n in image.shape)), np.asarray(image.affine, dtype=np.float64)


def read_volume(path: Path) -> Volume:
    """Voxels and affine of a NIfTI file.

    Raises:
        DataError: the file is missing, not NIfTI, damaged, cut short, or holds colours or complex numbers.
    """
    image = _open(path)
    try:
        if (problem := promises_too_much(path, image)) is not None:
            raise DataError(problem)
        data = read_voxels(image, path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # gzip, zlib, OS and nibabel errors alike
        raise DataError(unreadable(path, error)) from error
    if data.dtype.kind not in "buif":
        raise DataError(
            f"{path}: voxels must be plain numbers, found {data.dtype}. Export a grey-value image."
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    data = data.reshape(_squeezed(data.shape))
    return Volume(data, affine, unit_of_length(image.header), header_doubts(image))


def read_voxels(image: Any, path: Path) -> npt.NDArray[Any]:
    """The voxels of a NIfTI file that nibabel has opened; scaled ones are float32, an overflow Inf.

    Raises:
        Exception: whatever gzip, zlib, nibabel or the system raise for a damaged file.
    """
    if not path.name.lower().endswith(".gz"):
        return _scaled(image.dataobj)
    with gzip.open(path) as stream:
        holder = nibabel.FileHolder(fileobj=stream)
        voxels = _scaled(type(image).from_file_map({"image": holder}).dataobj)
        while stream.read(SLAB):  # to the end, where gzip's checksum stands: nibabel alone never sees it
            pass
    return voxels


def _scaled(stored: Any) -> npt.NDArray[Any]:
    """The values of nibabel's array proxy, which are float64: never all of them at once."""
    values: npt.NDArray[Any] = np.asanyarray(stored.get_unscaled())
    if (stored.slope, stored.inter) == (1, 0) or values.dtype.kind not in "iuf":
        return values
    flat, out = values.ravel(order="F"), np.empty(values.size, dtype=np.float32)
    slope, inter = np.float64(stored.slope), np.float64(stored.inter)
    with np.errstate(all="ignore"):
        for part in slabs(flat.size, flat.size):
            out[part] = apply_read_scaling(flat[part], slope, inter)
    return out.reshape(values.shape, order="F")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one behind the third: ITK writes channels as (X, Y, Z, 1, C)."""
    return (*shape[:3], *(length for length in shape[3:] if length != 1))


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
        found = np.unique(flat[np.isfinite(flat)], return_counts=True)
        return ((float(value), int(count)) for value, count in zip(*found, strict=True))
    low = int(whole.min())
    numbers = np.bincount(whole.astype(np.int64) - low)
    return ((float(i + low), int(numbers[i])) for i in np.flatnonzero(numbers))


def as_whole(data: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """The array as integers of a small range, if it holds nothing else; None otherwise."""
    if data.size == 0:
        return None
    low, high = float(data.min()), float(data.max())
    if not (low >= -SMALL_RANGE and high <= SMALL_RANGE):  # NaN fails both
        return None
    if data.dtype.kind != "f":
        return data
    whole = data.astype(np.int32)
    return whole if np.array_equal(whole, data) else None


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int | None = None
) -> list[Result]:
    """``[work(item) for item in items]`` on a few threads (decompression and numpy release the lock)."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    jobs = jobs or min(4, os.cpu_count() or 1)
    if jobs == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, items))
