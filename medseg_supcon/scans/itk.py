"""Reading a scan with SimpleITK: MetaImage, NRRD and DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError
from medseg_supcon.scans.dicom import check_series
from medseg_supcon.scans.grid import NEAR, Affine, Grid, check_affine, check_values, one_place
from medseg_supcon.scans.grid import ScanVolume as Volume
from medseg_supcon.scans.scan_nifti import wrong_channels

# Named, as ITK itself does not know endings in capitals.
READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world is LPS


def ras_affine(image: Any) -> Affine:
    """Voxel indices to RAS+ mm of a 3-D SimpleITK image, to the precision that NIfTI stores.

    MONAI's Spacing aligns its grid by corners or by centres, depending on the last digits of an oblique
    affine: rounded like this, a scan gives one mask whatever format it came in.
    """
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.asarray(RAS @ affine, dtype=np.float32).astype(np.float64)


def read_information(file: Path, dicom: bool = False) -> Any:
    """SimpleITK's reader of a file, which knows its header and has read no voxel.

    Raises:
        RuntimeError: the header cannot be read.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote tags of DICOM files
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO" if dicom else READERS[file.suffix.lower()])
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return reader


def read_itk(files: Sequence[Path], channels: int, dicom: bool = False) -> Volume:
    """One scan from a file, from one file per channel, or from the slices of a DICOM series.

    Raises:
        DataError: it is damaged, is no 3-D scan, has another number of channels, or its slices are uneven.
    """
    parts = [_load(list(files), dicom)] if dicom else [_load([file], dicom) for file in files]
    source = files[0].parent if dicom and len(files) > 1 else files[0]
    affine = check_affine(ras_affine(parts[0]), source)
    for file, image in zip(files[1:], parts[1:], strict=False):
        if image.GetSize() != parts[0].GetSize() or not one_place(image.GetSize(), affine, ras_affine(image)):
            raise DataError(
                f"{file}: its size or position differs from that of {files[0]}. Channels must share a grid."
            )
    data = np.concatenate([_channels_first(image) for image in parts])
    if len(data) != channels:
        raise DataError(wrong_channels(source, len(data), channels))
    grid = Grid.at(tuple(data.shape[1:]), affine)
    return Volume(check_values(data, source), grid, affine)


def _load(files: list[Path], dicom: bool) -> Any:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings quote tags of DICOM files
    source = files[0].parent if len(files) > 1 else files[0]
    try:
        image = _load_series(files, source) if dicom else _load_file(files[0])
    except RuntimeError as error:
        if "allocat" in str(error).lower():  # ITK's own words for a full memory
            raise MemoryError(str(source)) from error
        raise DataError(
            f"{source}: cannot be read. It is damaged or not the format that its name says, or the file that holds its "
            "voxels is missing."
        ) from error
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3:
        raise DataError(
            f"{source}: expected a 3-D scan, found {image.GetDimension()} dimensions {image.GetSize()}. "
            "2-D images and time series are not segmented: give one volume."
        )
    return image


def _load_file(file: Path) -> Any:
    import SimpleITK as sitk

    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes). Copy or export it again.")
    return sitk.ReadImage(str(file), imageIO=READERS[file.suffix.lower()])


def _load_series(files: list[Path], source: Path) -> Any:
    """One volume of slices or frames, each where its own header says."""
    import SimpleITK as sitk

    positions, components = check_series(files, source)
    reader = sitk.ImageSeriesReader() if len(files) > 1 else sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    if len(files) > 1:
        reader.SetFileNames([str(file) for file in files])
        if components == 1:  # each slice may have a scaling of its own, and the first must not set the type
            reader.SetOutputPixelType(sitk.sitkFloat32)
    else:
        reader.SetFileName(str(files[0]))
    image = reader.Execute()
    slices = image.GetSize()[2]
    expected = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(slices)]
    if len(positions) != slices or np.abs(positions - expected).max() > NEAR * min(image.GetSpacing()):
        raise DataError(
            f"{source}: the slices lie elsewhere than the volume that was made of them. Convert the series to NIfTI "
            "with dcm2niix."
        )
    return image


def _channels_first(image: Any) -> npt.NDArray[Any]:
    """A view of the image's memory."""
    import SimpleITK as sitk

    array = sitk.GetArrayViewFromImage(image)  # (z, y, x) or (z, y, x, c)
    array = array[None] if image.GetNumberOfComponentsPerPixel() == 1 else np.moveaxis(array, -1, 0)
    return np.asarray(array.transpose(0, 3, 2, 1))
