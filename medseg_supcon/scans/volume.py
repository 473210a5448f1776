"""A scan in memory: where its voxels are, their values, and the rules that every grid must keep."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError

NEAR = 0.1  # of the smallest voxel edge: two grids, or two slices, that are closer than this count as one
MAX_SHEAR_DEGREES = 0.6  # check, train and predict refuse more: over 200 mm it is 2 mm
SLAB = 4_000_000  # voxels that are worked on at once
SMALL_RANGE = 100_000
SAMPLE = 100_000  # voxels that tell the usual intensities of a scan
FAR = 10.0  # usual ranges beyond which a voxel may be an outlier
GAP = 30.0  # times as far as the next nearer voxel an outlier is: around a PET hot spot there are voxels in between

Numbers = npt.NDArray[np.float64]
Affine = Numbers
Item = TypeVar("Item")
Result = TypeVar("Result")


class Issue(NamedTuple):
    """A problem of a scan; ``severity`` is "error" or "warning", for training, and ``sentence`` follows its name."""

    code: str
    severity: str
    sentence: str


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a scan are."""

    shape: tuple[int, ...]  # of the file, (X, Y, Z) and any trailing axes of one
    affine: Affine  # (4, 4), voxel indices to RAS+ mm
    header: Any  # a NIfTI header that says the same; the file's own if it has one

    @property
    def spacing(self) -> Numbers:
        """(3,) mm per axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @classmethod
    def at(cls, shape: tuple[int, ...], affine: Affine) -> Grid:
        """The grid of a file that is not NIfTI: qform and sform alike, code 1 (scanner)."""
        header = nibabel.Nifti1Header()
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
        header.set_xyzt_units("mm")
        return cls(shape, affine, header)


@dataclass(frozen=True)
class Volume:
    """A scan or label map as read."""

    data: npt.NDArray[Any]  # (X, Y, Z) or (X, Y, Z, C), scaling applied
    grid: Grid
    monai_affine: Affine  # (4, 4) in mm, what MONAI uses for the file; a fraction of a voxel from the grid's
    issues: tuple[Issue, ...] = ()  # what is wrong or doubtful about its header and values

    @property
    def affine(self) -> Affine:
        """(4, 4), voxel indices to RAS+ mm."""
        return self.grid.affine

    @property
    def channels_first(self) -> npt.NDArray[Any]:
        """A view (C, X, Y, Z) of the voxels."""
        return np.moveaxis(self.data, -1, 0) if self.data.ndim == 4 else self.data[None]


def affine_issue(affine: Affine) -> Issue | None:
    """What makes an affine unusable: it is not finite, flat, or its axes are not perpendicular. None: nothing."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / np.where(lengths > 0, lengths, 1)
    if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) < 1e-3:
        found = f"its header gives no usable position in space (affine {np.round(affine[:3], 4).tolist()})"
        return Issue("bad_affine", "error", f"{found}: axes must be finite, of a length, and not parallel. Correct it.")
    degrees = math.degrees(math.asin(min(1.0, float(np.abs(axes.T @ axes - np.eye(3)).max()))))
    if degrees > MAX_SHEAR_DEGREES:
        found = f"two axes are {degrees:.1f} degrees off a right angle, at most {MAX_SHEAR_DEGREES:g} are accepted"
        cure = "a tilted gantry does this. Resample it, and its label map, onto perpendicular axes."
        return Issue("sheared", "error", f"its affine is sheared ({found}): {cure}")
    return None


def same_grid(shape: Sequence[int], affine: Affine, other: Affine) -> bool:
    """Whether two affines put each voxel of a shape (X, Y, Z, ...) at the same place; False if one is not finite."""
    edge = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).min()
    return bool(farthest_corner(shape, affine, other) <= NEAR * edge)


def farthest_corner(shape: Sequence[int], one: Affine, other: Affine) -> float:
    """Largest distance between equal corners of a grid (X, Y, Z, ...) under two affines, in their unit of length."""
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape[:3]))))
    change = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.linalg.norm(corners @ change[:3, :3].T + change[:3, 3], axis=1).max())


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
        count, largest = np.count_nonzero(odd), float(data.flat[np.abs(data).argmax()])
        found = f"{count} voxels do not fit into a 32-bit float (the largest is {largest:.3g}, at most 3.4e38 fits)"
        raise DataError(f"{file}: {found}. Scale the values down.")
    return values


def check_real(data: npt.NDArray[Any], file: object) -> None:
    """DataError for colours and complex numbers."""
    if data.dtype.kind not in "biuf":
        raise DataError(f"{file}: voxels must be one real number each, found {data.dtype}. Convert it to grey values.")


def outliers(data: npt.NDArray[Any]) -> tuple[float, int] | None:
    """The most extreme value and the number of outliers, if they double the standard deviation of finite voxels.

    An outlier is more than ten usual ranges (0.5 to 99.5 percentile) away, and 30 times as far as the next nearer voxel.
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
    odd = order[steps.argmax() :]
    if steps.max() < np.log(GAP):
        return None
    spread = flat.std(dtype=np.float64) > 2 * np.delete(flat, far[odd]).std(dtype=np.float64)
    return (float(values[odd[-1]]), len(odd)) if spread else None


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


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[work(item) for item in items]`` on a few threads (decompression and numpy release the lock)."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
