"""Reading one NIfTI file, for training and prediction alike."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.volumeutils import apply_read_scaling

from medseg_supcon.errors import DataError
from medseg_supcon.scans.file_faults import MOST_BEHIND, not_a_file, too_long, unreadable, wrong_size
from medseg_supcon.scans.grid import Affine, Grid, Volume, in_mm
from medseg_supcon.scans.nifti_header import check_header
from medseg_supcon.scans.voxels import check_real, slabs

NIFTI_ENDINGS = (".nii.gz", ".nii")
NIFTI_2 = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540 bytes of header
LARGEST = float(np.finfo(np.float32).max)


def stem(path: str | Path) -> str:
    """File name without the NIfTI ending: ``stem("x/a.b.nii.gz") == "a.b"``."""
    name = Path(path).name
    for ending in NIFTI_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).stem


def read_header(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape, and affine in mm, of a NIfTI file, without its voxels.

    Raises:
        DataError: the file is missing, not NIfTI or damaged.
    """
    image = open_nifti(path)
    return _squeezed(tuple(int(n) for n in image.shape)), in_mm(image.affine, image.header)


def read_nifti(path: Path) -> Volume:
    """Voxels as stored, grid, and what is wrong with the header.

    Whether the shape, the values and the grid are of use is for the caller to decide: `medseg check` reports
    what `read_scan` refuses.

    Raises:
        DataError: the file is missing, not NIfTI, damaged, cut short, or holds colours or complex numbers.
    """
    image = open_nifti(path)
    try:
        if (problem := wrong_size(path, image)) is not None:
            raise DataError(problem)
        data = _read_voxels(image, path)
        check_real(data, path)
        shape = tuple(int(n) for n in image.shape)
        data = data.reshape(_squeezed(shape), order="F")
        monai_affine, issues = check_header(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # gzip, zlib, OS and nibabel errors alike
        raise DataError(unreadable(path, error)) from error
    header = image.header.copy()
    grid = Grid(shape if data.ndim <= 3 else shape[:3], in_mm(image.affine, header), header)
    return Volume(data, grid, in_mm(monai_affine, header), issues)


def open_nifti(path: Path) -> Any:
    """The file as nibabel opens it, with no voxel read and nothing after the header.

    Raises:
        DataError: it is missing, not NIfTI or damaged.
    """
    if (problem := not_a_file(path)) is not None:
        raise DataError(problem)
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise DataError(f"{path}: expected NIfTI (.nii or .nii.gz). Convert this file.")
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as stream:
            second = stream.read(4) in NIFTI_2  # nibabel.load would read on, whatever is behind
        return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_filename(path)
    except Exception as error:  # nibabel raises a dozen kinds for broken headers
        raise DataError(unreadable(path, error)) from error


def _read_voxels(image: Any, path: Path) -> npt.NDArray[Any]:
    """The voxels of a NIfTI file that nibabel has opened."""
    if not path.name.lower().endswith(".gz"):
        return _scaled(image.dataobj)
    with gzip.open(path) as stream:
        holder = nibabel.FileHolder(fileobj=stream)
        voxels = _scaled(type(image).from_file_map({"image": holder}).dataobj)
        if not ends_soon(stream):
            raise DataError(too_long(path))
    return voxels


def ends_soon(stream: gzip.GzipFile) -> bool:
    """Reads to the end, where gzip's checksum is (nibabel alone never sees it); False if the end is far away."""
    behind = 0
    while (part := stream.read(2**16)) and behind <= MOST_BEHIND:
        behind += len(part)
    return behind <= MOST_BEHIND


def _scaled(stored: Any) -> npt.NDArray[Any]:
    """The values of nibabel's array proxy, which are float64: never all of them at once, unless float32 is too small."""
    values: npt.NDArray[Any] = np.asanyarray(stored.get_unscaled())
    if (stored.slope, stored.inter) == (1, 0) or values.dtype.kind not in "iuf":
        return values
    slope, inter = np.float64(stored.slope), np.float64(stored.inter)
    with np.errstate(all="ignore"):
        wide = values.dtype == np.float64 or (
            values.dtype.kind != "f" and not np.iinfo(values.dtype).max * abs(slope) + abs(inter) < LARGEST
        )
        flat, out = values.ravel(order="F"), np.empty(values.size, dtype=np.float64 if wide else np.float32)
        for part in slabs(flat.size, flat.size):
            out[part] = apply_read_scaling(flat[part], slope, inter)
    return out.reshape(values.shape, order="F")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one after the third: ITK writes channels as (X, Y, Z, 1, C)."""
    return (*shape[:3], *(length for length in shape[3:] if length != 1))
