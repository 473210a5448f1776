"""NIfTI: reading a file, what its header says about its place, why it cannot be read, and writing a mask."""

from __future__ import annotations

import gzip
import math
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import numpy.typing as npt
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from medseg_supcon.errors import DataError
from medseg_supcon.files import write_whole
from medseg_supcon.scans.volume import NEAR, Affine, Grid, Issue, Volume, check_real, farthest_corner, slabs

NIFTI_ENDINGS = (".nii.gz", ".nii")
FORMS = ("qform", "quatern", "qoffset", "sform", "srow")  # fields of a header that start like this
NIFTI_1 = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")  # a header's first bytes: it has 348
NIFTI_2 = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # it has 540
MOST_PACKED = 1032  # bytes that deflate can make of one
MOST_BEFORE = 2**26  # bytes of header and extensions before the voxels
MOST_BEHIND = 2**20  # bytes that may follow the voxels: some programs pad
UNITS = {1: ("metres", 1000.0), 3: ("microns", 0.001)}  # whatever else a header says counts as mm
SAME_SIZE = 0.01  # by how much sform and pixdim may differ in a voxel's edge
GUESS = "left and right are a guess. Convert it again from its source, or check that left is left."
ERRORS = ("unit", "two_voxel_sizes", "two_places")  # for a training; the rest are warnings
DAMAGED = "It is damaged or cut short: copy or export it again."
TOO_LONG = f"goes on for more than {MOST_BEHIND:,} bytes after its voxels: file or header is damaged. Export it again."


def not_a_file(path: Path) -> str | None:
    """None for a plain file; otherwise a sentence that says what is at `path`."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        what = "is a link to a file that does not exist" if path.is_symlink() else "there is no such file or folder"
        return f"{path}: {what}. Check the path."
    except (OSError, ValueError) as error:  # no permission, a name too long, links in a circle
        reason = getattr(error, "strerror", None) or error
        return f"{path}: cannot be reached ({reason}). Check the path and its permissions."
    if stat.S_ISDIR(mode):
        return f"{path}: is a folder, expected a file. Pass the files in it."
    return None if stat.S_ISREG(mode) else f"{path}: is a pipe or device, expected a file. Save it as a file."


def read_header(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape, and affine in mm, of a NIfTI file, without its voxels; raises DataError if it cannot be read."""
    image = _open(path)
    return _squeezed(image.shape), _in_mm(image.affine, image.header)


def read_nifti(path: Path) -> Volume:
    """Voxels as stored, grid, and what is wrong with the header; DataError if the file cannot be read as real numbers."""
    image = _open(path)
    try:
        _check_size(path, image)
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as stream:
                data = _scaled(type(image).from_file_map({"image": nibabel.FileHolder(fileobj=stream)}).dataobj)
                behind = 0  # to the end, where gzip's checksum is, which nibabel alone never sees
                while part := stream.read(2**16):
                    if (behind := behind + len(part)) > MOST_BEHIND:
                        raise DataError(f"{path}: {TOO_LONG}")
        else:
            data = _scaled(image.dataobj)
        check_real(data, path)
        shape = tuple(int(n) for n in image.shape)
        data = data.reshape(_squeezed(shape), order="F")
        monai_affine, issues = _check_header(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # gzip, zlib, OS and nibabel errors alike
        raise _unreadable(path, error) from error
    header = image.header.copy()
    grid = Grid(shape if data.ndim <= 3 else shape[:3], _in_mm(image.affine, header), header)
    return Volume(data, grid, _in_mm(monai_affine, header), issues)


def write_nifti(path: Path, data: npt.NDArray[Any], grid: Grid) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, K) as NIfTI in the scan's grid; an OSError leaves nothing behind."""
    shape = grid.shape if data.ndim == 3 else (*grid.shape[:3], data.shape[3])
    kind = nibabel.Nifti1Image if max(shape) < 2**15 else nibabel.Nifti2Image  # NIfTI-1 counts to 32767
    image = kind(data.reshape(shape), None, dtype=data.dtype)
    for name in image.header:  # the scan's forms, codes, voxel sizes and unit of length, to the last bit
        if name.startswith(FORMS):
            image.header[name] = grid.header[name]
    image.header["pixdim"][:4] = grid.header["pixdim"][:4]
    image.header["xyzt_units"] = int(grid.header["xyzt_units"]) & 7

    def write(file: IO[bytes]) -> None:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3, mtime=0) as packed:
            image.to_stream(packed)

    write_whole(path, write)


def is_whole(path: Path) -> bool:
    """Whether a NIfTI file is there to its last byte, with the checksum that it was written with."""
    with suppress(DataError):
        return bool(read_nifti(path))
    return False


def _open(path: Path) -> Any:
    """The file as nibabel opens it, with no voxel read and nothing after the header."""
    if (problem := not_a_file(path)) is not None:
        raise DataError(problem)
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise DataError(f"{path}: expected NIfTI (.nii or .nii.gz). Convert this file.")
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
            start = stream.read(540)  # nibabel.load would read extensions without a limit
        kind: Any = nibabel.Nifti2Image if start[:4] in NIFTI_2 else nibabel.Nifti1Image
        image = kind.from_filename(path)
        stored = kind.header_class(start[: kind.header_class.template_dtype.itemsize], check=False)
    except Exception as error:  # nibabel raises a dozen kinds for broken headers
        raise _unreadable(path, error) from error
    # nibabel reads a size of 0 as 1 mm
    if stored["sform_code"] <= 0 and (stored["pixdim"][1 : 1 + min(3, len(image.shape))] == 0).any():
        raise DataError(f"{path}: its header does not say how large a voxel is (pixdim 0). Convert it from its source.")
    if (offset := image.dataobj.offset) < len(stored.binaryblock):
        raise DataError(f"{path}: its voxels begin inside the header (vox_offset {offset}). Export it again.")
    return image


def _scaled(stored: Any) -> npt.NDArray[Any]:
    """The values of nibabel's array proxy, which are float64: never all at once, unless float32 is too small."""
    values: npt.NDArray[Any] = np.asanyarray(stored.get_unscaled())
    if (stored.slope, stored.inter) == (1, 0) or values.dtype.kind not in "iuf":
        return values
    slope, inter = np.float64(stored.slope), np.float64(stored.inter)
    with np.errstate(all="ignore"):
        largest = 0.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max * abs(slope) + abs(inter)
        wide = values.dtype == np.float64 or not largest < float(np.finfo(np.float32).max)
        flat, out = values.ravel(order="F"), np.empty(values.size, dtype=np.float64 if wide else np.float32)
        for part in slabs(flat.size, flat.size):
            out[part] = apply_read_scaling(flat[part], slope, inter)
    return out.reshape(values.shape, order="F")


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without axes of one after the third: ITK writes channels as (X, Y, Z, 1, C)."""
    return tuple(int(length) for axis, length in enumerate(shape) if axis < 3 or length != 1)


def _unit(header: Any) -> tuple[str, float]:
    """The unit of length of a NIfTI header, and how many mm it is."""
    return UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))


def _in_mm(affine: npt.NDArray[Any], header: Any) -> Affine:
    mm = _unit(header)[1]
    return np.asarray(affine * np.array([[mm], [mm], [mm], [1.0]]))  # no matrix product: Inf x 0 would warn


def _check_size(path: Path, image: Any) -> None:
    """Whether the file can hold as many voxels as its header announces, and not far more."""
    size, packed, offset = path.stat().st_size, path.suffix.lower() == ".gz", int(image.dataobj.offset)
    voxels = image.dataobj.dtype.itemsize * math.prod(int(n) for n in image.shape)
    if offset > MOST_BEFORE or voxels > size * (MOST_PACKED if packed else 1):
        found = f"its header announces {voxels:,} bytes of voxels after byte {offset:,}, the file has {size:,} bytes"
        raise DataError(f"{path}: cannot be read as NIfTI ({found}). {DAMAGED}")
    if size > (offset + voxels) * (1.01 if packed else 1) + MOST_BEHIND:  # deflate adds less than 1 % to noise
        raise DataError(f"{path}: {TOO_LONG}")


def _unreadable(path: Path, error: Exception) -> DataError:
    """What is wrong with a NIfTI file that raised `error` when it was read."""
    start, reason = b"?", " ".join(str(error).split())[:120] or type(error).__name__
    packed = path.suffix.lower() == ".gz"
    with suppress(OSError), path.open("rb") as stream:
        start = stream.read(4)
    problem = f"cannot be read as NIfTI ({reason}). {DAMAGED}"
    if isinstance(error, PermissionError) or not os.access(path, os.R_OK):  # nibabel hides the one in its own
        problem = f"there is no permission to read it. Ask its owner, or run: chmod u+r {path.name}"
    elif start == b"":
        problem = "the file is empty (0 bytes). Copy or export it again."
    elif packed and start in (*NIFTI_1, *NIFTI_2):
        problem = "is called .gz, but is not compressed. Rename it to .nii."
    elif not packed and start.startswith(b"\x1f\x8b"):
        problem = "is compressed, but is not called .gz. Rename it to .nii.gz."
    return DataError(f"{path}: {problem}")


def _check_header(image: Any) -> tuple[Affine, tuple[Issue, ...]]:
    """The affine that MONAI uses (in the header's unit, near `image.affine`), and what may be wrong with the place.

    nibabel takes the sform if there is one; MONAI takes the qform if pixdim fits it better.
    """
    affine, shape, header = np.array(image.affine, dtype=np.float64), image.shape[:3], image.header
    if not np.isfinite(affine).all():
        return affine, ()
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    near = NEAR * float(edges.min())
    q_code, s_code = int(header["qform_code"]), int(header["sform_code"])
    found: dict[str, str] = {}
    if (unit := _unit(header)[0]) != "mm":
        found["unit"] = f"its header gives lengths in {unit}, expected mm. Correct the header, or convert it."
    hollow = type(image)(np.broadcast_to(np.uint8(0), image.shape), affine, header.copy())  # MONAI changes an image
    theirs, monai_apart = _apart(shape, affine, lambda: correct_nifti_header_if_necessary(hollow).affine)
    sizes = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    if q_code <= 0 and s_code <= 0:
        found["no_orientation"] = f"its header gives no orientation (qform and sform codes 0): {GUESS}"
    elif not np.allclose(edges, sizes, rtol=SAME_SIZE, atol=0):
        one, other = (" x ".join(f"{size:.4g}" for size in three) for three in (edges, sizes))
        found["two_voxel_sizes"] = f"its voxel size is {one} by its sform and {other} by its pixdim. Correct one."
    # an edge that is rounded in pixdim moves the corners a little, which is not an error
    elif s_code > 0 and not monai_apart <= near + SAME_SIZE * float(np.linalg.norm(edges[: len(shape)] * shape)):
        why = "its pixdim fits the qform better: programs read it in different places"
        found["two_places"] = f"its qform and sform disagree, and {why}. Make the two forms equal."
    elif s_code > 0 and q_code > 0 and not (apart := _apart(shape, affine, header.get_qform)[1]) <= near:
        how = f"{apart:.3g} mm apart" if np.isfinite(apart) else "the qform is not a rotation"
        found["forms_disagree"] = f"its qform and sform disagree ({how}): the sform is used. Check left and right."
    issues = [Issue(code, "error" if code in ERRORS else "warning", sentence) for code, sentence in found.items()]
    return (theirs if monai_apart <= near else affine), tuple(issues)


def _apart(shape: Sequence[int], affine: Affine, read: Callable[[], Affine]) -> tuple[Affine, float]:
    """A second affine, and how far it puts a corner from the first; infinity if it is not valid."""
    try:
        other = np.asarray(read(), dtype=np.float64)
        return other, farthest_corner((*shape, 1, 1)[:3], affine, other)
    except (ValueError, HeaderDataError):  # a quaternion that is not a rotation
        return affine, float("inf")
