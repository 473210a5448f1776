"""DICOM series written with pydicom: what a scanner or an export may give, of voxels that the test knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

SHAPE = (7, 6, 5)  # X, Y, Z
SPACING = (0.9, 1.1, 1.2)
STORED = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
AFFINE = np.array([[0.9, 0, 0, -17], [0, 1.1, 0, 12], [0, 0, 1.2, -30], [0, 0, 0, 1.0]])  # RAS+
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
Change = Callable[[Dataset, int], Any]


def base(pixels: np.ndarray, uid: str, sop: str = "1.2.840.10008.5.1.4.1.1.4") -> FileDataset:
    """An image of (..., rows, columns), int16, without a place."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID, image.Modality = sop, uid, "MR"
    image.PatientName, image.PatientID = "SECRET^NAME", "SECRETID"
    image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
    image.SeriesNumber, image.Rows, image.Columns = 1, *pixels.shape[-2:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = np.ascontiguousarray(pixels).astype("<i2").tobytes()
    return image


def position(k: float) -> list[str]:
    """LPS mm of the first voxel of slice k."""
    x, y, z = AFFINE[:3] @ [0, 0, k, 1]
    return [f"{-x:.6f}", f"{-y:.6f}", f"{z:.6f}"]


def group(**values: Any) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item
