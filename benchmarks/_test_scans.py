"""Degradations of test scans that the quality model was not fitted on, and test scans written as DICOM series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medseg_supcon.quality import Degraded

Change = Callable[[Degraded, float, np.random.Generator], Degraded]


def of_image(change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]) -> Change:
    return lambda d, strength, rng: Degraded(change(d.image, strength, rng).astype(np.float32), d.label)


def truncation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """k-space is cut off: ringing."""
    spectrum = np.fft.fftshift(np.fft.fftn(image, axes=(1, 2, 3)), axes=(1, 2, 3))
    axes = [np.abs(np.arange(n) - n // 2) / n for n in image.shape[1:]]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    spectrum *= radius < 0.5 * (1 - 0.85 * strength)
    return np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(1, 2, 3)), axes=(1, 2, 3)).real


def salt_and_pepper(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    dice, (low, high) = rng.random(image.shape), np.percentile(image, (0.5, 99.5))
    return np.where(dice < 0.15 * strength, low, np.where(dice > 1 - 0.15 * strength, high, image))


def equalised(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    rank = np.argsort(np.argsort(image.ravel())).reshape(image.shape) / image.size
    return (1 - strength) * image + strength * rank * np.ptp(image)


def stripes(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Every slice has another brightness."""
    axis = int(rng.integers(1, 4))
    factor = 1 + 0.9 * strength * rng.uniform(-1, 1, image.shape[axis])
    return image * factor.reshape([-1 if a == axis else 1 for a in range(4)])


def box(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A box of one value hides a part of the scan."""
    size = [max(1, int(n * (0.2 + 0.4 * strength))) for n in image.shape[1:]]
    start = [int(rng.integers(0, n - s + 1)) for n, s in zip(image.shape[1:], size, strict=True)]
    hidden = image.copy()
    value = np.percentile(image, 99) if rng.random() < 0.5 else np.median(image)
    hidden[(slice(None), *(slice(a, a + s) for a, s in zip(start, size, strict=True)))] = value
    return hidden


def rician(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    sigma, signal = 0.35 * strength * np.ptp(image), image - image.min()
    first, second = (sigma * rng.standard_normal(image.shape) for _ in range(2))
    return np.sqrt((signal + first) ** 2 + second**2)


def solarised(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    low, high = np.percentile(image, (0.5, 99.5))
    unit = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.where(unit > 1 - 0.6 * strength, 1 - unit, unit)


def rotated(d: Degraded, strength: float, rng: np.random.Generator) -> Degraded:
    axes = ((0, 1), (0, 2), (1, 2))[int(rng.integers(3))]
    how: dict[str, Any] = {"angle": 15 + 45 * strength, "axes": axes, "reshape": False}
    image = np.stack([ndimage.rotate(c, order=1, mode="nearest", **how) for c in d.image])
    return Degraded(image, ndimage.rotate(d.label, order=0, **how))


def warped(d: Degraded, strength: float, rng: np.random.Generator) -> Degraded:
    shape = np.array(d.label.shape)
    shift = [
        ndimage.zoom(rng.uniform(-1, 1, (4, 4, 4)), shape / 4, order=2, grid_mode=True, mode="nearest") for _ in "xyz"
    ]
    where = [
        a + 10 * strength * s for a, s in zip(np.meshgrid(*map(np.arange, shape), indexing="ij"), shift, strict=True)
    ]
    image = np.stack([ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in d.image])
    return Degraded(image.astype(np.float32), ndimage.map_coordinates(d.label, where, order=0))


UNKNOWN: dict[str, Change] = {
    "rotated": rotated,
    "warped": warped,
    **{f.__name__: of_image(f) for f in (truncation, salt_and_pepper, equalised, stripes, box, rician, solarised)},
}


def write_dicom(folder: Path, image: np.ndarray, affine: np.ndarray) -> None:
    """A series of one file per slice along the last axis of a scan (X, Y, Z), in 16 bits with one slope for all.

    ``affine`` is that of NIfTI, voxel indices to RAS+ mm.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    low, slope = float(image.min()), max(float(np.ptp(image)), 1e-6) / 32000
    lps = np.diag([-1, -1, 1]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(image.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID, file.Modality = MRImageStorage, meta.MediaStorageSOPInstanceUID, "MR"
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, series, frame
        file.SeriesNumber, file.InstanceNumber = 1, k + 1
        file.Columns, file.Rows = image.shape[:2]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
        file.RescaleSlope, file.RescaleIntercept = f"{slope:.10g}", f"{low:.10g}"
        file.ImagePositionPatient = [f"{v:.6f}" for v in lps @ [0, 0, k, 1]]
        file.ImageOrientationPatient = [f"{v:.8f}" for v in (lps[:, :2] / spacing[:2]).T.ravel()]
        file.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]  # between rows, between columns
        file.SliceThickness = f"{spacing[2]:.6f}"
        file.PixelData = np.round((image[..., k].T - low) / slope).astype("<i2").tobytes()
        file.save_as(folder / f"{k:04d}.dcm", enforce_file_format=True)
