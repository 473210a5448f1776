"""From class indices to a mask file: largest components, label values, writing, and whether one is whole."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg_supcon.files import write_whole
from medseg_supcon.scans.grid import Grid


def keep_largest(classes: npt.NDArray[Any], which: Sequence[int]) -> None:
    """Turns all but the largest component (26 neighbours) of some classes into background, in place."""
    for index in which:
        boxes = ndimage.find_objects((classes == index).astype(np.uint8))
        if not boxes:
            continue
        part = classes[boxes[0]]
        components, count = ndimage.label(part == index, structure=np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            part[(components > 0) & (components != sizes.argmax())] = 0


def write_nifti(path: Path, data: npt.NDArray[Any], grid: Grid) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, K) as NIfTI-1 in the scan's grid: its shape, forms, codes and unit.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    shape = grid.shape if data.ndim == 3 else (*grid.shape[:3], data.shape[3])
    kind = nibabel.Nifti1Image if max(shape) < 2**15 else nibabel.Nifti2Image  # NIfTI-1 counts to 32767
    image = kind(data.reshape(shape), None, dtype=data.dtype)
    grid.place(image.header)

    def write(file: IO[bytes]) -> None:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3, mtime=0) as packed:
            image.to_stream(packed)

    write_whole(path, write)


def is_whole(path: Path) -> bool:
    """Whether a packed NIfTI file is there to its last byte, with the checksum that it was written with."""
    try:
        voxels = nibabel.load(path).dataobj
        with gzip.open(path) as stream:
            size = 0
            while part := stream.read(2**24):
                size += len(part)
    except Exception:  # whatever is wrong with it, it is not what was written
        return False
    return bool(size >= voxels.offset + voxels.dtype.itemsize * int(np.prod(voxels.shape)))
