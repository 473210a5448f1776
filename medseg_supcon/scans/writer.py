"""Writing a mask as NIfTI in the grid of its scan, and whether one that is there is whole."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.files import write_whole
from medseg_supcon.scans.file_faults import wrong_size
from medseg_supcon.scans.grid import Grid
from medseg_supcon.scans.nifti import ends_soon, open_nifti


def write_nifti(path: Path, data: npt.NDArray[Any], grid: Grid) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, K) as NIfTI-1 in the scan's grid: its shape, forms, codes and unit.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    shape = grid.shape if data.ndim == 3 else (*grid.shape[:3], data.shape[3])
    kind = nibabel.Nifti1Image if max(shape) < 2**15 else nibabel.Nifti2Image  # NIfTI-1 counts to 32767
    image = kind(data.reshape(shape), None, dtype=data.dtype)
    grid.copy_to(image.header)

    def write(file: IO[bytes]) -> None:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3, mtime=0) as packed:
            image.to_stream(packed)

    write_whole(path, write)


def is_whole(path: Path) -> bool:
    """Whether a packed NIfTI file is there to its last byte, with the checksum that it was written with."""
    try:
        image = open_nifti(path)
        if wrong_size(path, image) is not None:
            return False
        voxels = image.dataobj
        left = voxels.offset + voxels.dtype.itemsize * int(np.prod(voxels.shape))
        with gzip.open(path) as stream:
            while left > 0 and (part := stream.read(min(left, 2**24))):
                left -= len(part)
            return left <= 0 and ends_soon(stream)
    except Exception:  # whatever is wrong with it, it is not what was written
        return False
