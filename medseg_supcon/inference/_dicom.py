"""DICOM series in a folder, told apart, and a check that the slices of one lie where the volume says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import DataError


def series_in(folder: Path) -> list[tuple[str, list[Path]]]:
    """(name, slices in order) of each DICOM series directly in a folder; none: an empty list.

    One series is called as the folder, several ``<folder>_series<number>``. Series identifiers are never
    used: they identify a patient's examination.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageSeriesReader()
    identifiers = sorted(reader.GetGDCMSeriesIDs(str(folder)))
    series = [[Path(f) for f in reader.GetGDCMSeriesFileNames(str(folder), uid)] for uid in identifiers]
    series = [files for files in series if files]
    name = folder.absolute().name
    if len(series) <= 1:
        return [(name, files) for files in series]
    numbers = [_series_number(files[0]) for files in series]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(series) + 1))
    order = sorted(range(len(series)), key=lambda i: numbers[i] or 0)
    return [(f"{name}_series{numbers[i]}", series[i]) for i in order]


def _series_number(file: Path) -> int | None:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
        return int(reader.GetMetaData("0020|0011"))
    except (RuntimeError, ValueError):
        return None


def check_slices(reader: Any, image: Any, folder: Path) -> None:
    """A missing slice, a tilted gantry, or several volumes in one series would shift the mask: refuse them.

    Args:
        reader: the SimpleITK.ImageSeriesReader that read ``image``, with its slices' headers.
        image: the volume.
        folder: for the message.

    Raises:
        DataError: a slice's own position differs from the volume's by a tenth of a voxel or more.
    """
    spacing = min(image.GetSpacing())
    for k in range(image.GetSize()[2]):
        if not reader.HasMetaDataKey(k, "0020|0032"):
            raise DataError(
                f"{folder}: slice {k + 1} has no position (ImagePositionPatient). Export the series again."
            )
        position = np.array([float(v) for v in reader.GetMetaData(k, "0020|0032").split("\\")])
        expected = np.array(image.TransformIndexToPhysicalPoint((0, 0, k)))
        if np.linalg.norm(position - expected) > 0.1 * spacing:
            raise DataError(
                f"{folder}: the slices are not evenly spaced along one line (slice {k + 1} of "
                f"{image.GetSize()[2]} lies {np.linalg.norm(position - expected):.2f} mm off). A slice is "
                "missing, the gantry was tilted, or the series holds several volumes: export one complete "
                "volume."
            )
