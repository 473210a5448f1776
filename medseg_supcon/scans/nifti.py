"""Reading one NIfTI file, with every fault told as a sentence."""

from __future__ import annotations

import gzip
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
import numpy.typing as npt
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from medseg_supcon.errors import DataError
from medseg_supcon.scans.grid import NEAR, farthest_corner, in_mm, unit_of_length

GZIP = b"\x1f\x8b"
MOST_PACKED = 1032  # bytes that deflate can make of one
NIFTI = tuple(
    struct.pack(order + "i", size) for size in (348, 540) for order in "<>"
)  # a header's first bytes


def not_a_file(path: Path) -> str | None:
    """A sentence where there is nothing to read at `path`, or nothing that ends; None for a plain file.

    Example:
        >>> from pathlib import Path
        >>> from medseg_supcon.scans import not_a_file
        >>> not_a_file(Path("/nowhere/scan.nii.gz"))
        '/nowhere/scan.nii.gz: there is no such file or folder. Check the path.'
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"{path}: is a link to a file that does not exist. Mend the link."
        return f"{path}: there is no such file or folder. Check the path."
    except PermissionError:
        return f"{path}: there is no permission to look into its folder. Check its permissions."
    except (OSError, ValueError) as error:  # a name too long, links in a circle
        return f"{path}: cannot be reached ({getattr(error, 'strerror', None) or error}). Check the path."
    if stat.S_ISDIR(mode):
        return f"{path}: is a folder, expected a file. Give the files in it."
    if not stat.S_ISREG(mode):
        return f"{path}: is a pipe or device, expected a file. Save it as a file."
    return None


def promises_too_much(path: Path, image: Any) -> str | None:
    """A sentence where a NIfTI header announces more voxels than its file can hold; to read them would fill memory."""
    size = path.stat().st_size
    most = size * (MOST_PACKED if path.name.lower().endswith(".gz") else 1)
    bytes_ = image.dataobj.dtype.itemsize * math.prod(int(n) for n in image.shape)
    if bytes_ <= most:
        return None
    return (
        f"{path}: cannot be read as NIfTI (its header announces {bytes_:,} bytes of voxels, the file has {size:,} bytes). "
        "It is damaged or cut short: copy or export it again."
    )


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for a NIfTI file at `path` that raised `error` when it was read."""
    if (sentence := not_a_file(path)) is not None:
        return sentence
    if isinstance(error, PermissionError) or not os.access(path, os.R_OK):  # nibabel hides the one in its own
        return f"{path}: there is no permission to read it. Ask its owner, or run: chmod u+r {path.name}"
    start = _first_bytes(path)
    packed = path.name.lower().endswith(".gz")
    if start == b"":
        return f"{path}: the file is empty (0 bytes). Copy or export it again."
    if packed and start in NIFTI:
        return f"{path}: is called .gz, but is not compressed. Rename it to .nii."
    if not packed and start is not None and start.startswith(GZIP):
        return f"{path}: is compressed, but is not called .gz. Rename it to .nii.gz."
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{path}: cannot be read as NIfTI ({reason}). It is damaged or cut short: copy or export it again."


def _first_bytes(path: Path) -> bytes | None:
    try:
        with path.open("rb") as stream:
            return stream.read(4)
    except OSError:
        return None


SAME_SIZE = 0.01  # by how much sform and pixdim may differ in a voxel's edge

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Doubt:
    """A doubt about a header: its short code, "error" or "warning", and a sentence that follows the file's name."""

    code: str
    severity: str
    sentence: str


def header_doubts(image: Any) -> tuple[Doubt, ...]:
    """What may be wrong with the place of a NIfTI image, whose affine is the sform, or without one the qform.

    MONAI, which reads the scans of a training, takes the qform where pixdim speaks for it: an error where that
    lies elsewhere. The NIfTI standard leaves to the reader which of two forms to believe.

    Args:
        image: as nibabel loads it; other formats than NIfTI have no doubts.
    """
    header = image.header
    if "sform_code" not in header or not np.isfinite(affine := np.asarray(image.affine, np.float64)).all():
        return ()
    if int(header["sform_code"]) <= 0:
        if int(header["qform_code"]) > 0:
            return ()
        sentence = (
            "its header gives no orientation (qform and sform codes 0): left and right are a guess. Convert "
            "it again from its source, or see that left is left."
        )
        return (Doubt("no_orientation", "warning", sentence),)
    if (sizes := two_voxel_sizes(image)) is not None:
        return (Doubt("two_voxel_sizes", "error", sizes),)
    return _two_places(image, affine, np.linalg.norm(affine[:3, :3], axis=0))


def two_voxel_sizes(image: Any) -> str | None:
    """A sentence where sform and pixdim of a NIfTI image differ in a voxel's edge by more than 1 %, else None."""
    edges = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
    stored = np.abs(np.asarray(image.header["pixdim"][1:4], dtype=np.float64))
    if np.allclose(edges, stored, rtol=SAME_SIZE, atol=0):
        return None
    says, differs = (" x ".join(f"{size:.4g}" for size in sizes) for sizes in (edges, stored))
    return (
        f"its header gives two voxel sizes, {says} by its sform and {differs} by its pixdim. Correct the one that "
        "is wrong."
    )


def _two_places(image: Any, affine: Floats, edges: Floats) -> tuple[Doubt, ...]:
    """qform against sform: an error where a training would take the qform, a warning where it would not."""
    shape, near = image.shape[:3], NEAR * float(edges.min())
    extent = float(np.linalg.norm(edges[: len(shape)] * shape))
    read = _apart(shape, affine, lambda: _as_monai_reads(image, affine))
    if not read <= near + SAME_SIZE * extent:  # an edge rounded in pixdim moves corners a little: no fault
        sentence = (
            "its qform and sform disagree, and its pixdim fits the qform better: programs read it in different "
            "places. Make the two forms equal."
        )
        return (Doubt("two_places", "error", sentence),)
    apart = _apart(shape, affine, image.header.get_qform)
    if int(image.header["qform_code"]) > 0 and not apart <= near:
        how = f"{apart:.3g} mm apart" if np.isfinite(apart) else "the qform is no rotation"
        sentence = f"its qform and sform disagree ({how}): the sform is used. See that left is left."
        return (Doubt("forms_disagree", "warning", sentence),)
    return ()


def _apart(shape: Sequence[int], affine: Floats, other: Callable[[], Floats]) -> float:
    """How far a second affine puts a corner from the first; infinity where it cannot be had."""
    try:
        return farthest_corner((*shape, 1, 1)[:3], affine, other())
    except (ValueError, HeaderDataError):  # a quaternion that turns nothing
        return float("inf")


def _as_monai_reads(image: Any, affine: Floats) -> Floats:
    """The affine that LoadImage takes; its correction changes an image, so it gets a hollow one."""
    voxels = np.broadcast_to(np.uint8(0), image.shape)
    hollow = type(image)(voxels, affine, image.header.copy())
    return np.asarray(correct_nifti_header_if_necessary(hollow).affine, dtype=np.float64)


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
