"""One DICOM file: its series, where its frames are, what its values mean, whether it is a scan, and its voxels."""

from __future__ import annotations

import io
import logging
import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError
from medseg_supcon.scans.grid import Numbers

DICOM_ENDINGS = (".dcm", ".ima")
INDEX = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, whatever it is called
# Files of a study that hold no scan: documents, drawings, plans, and pictures made of a scan.
NOT_SCANS = (
    *("SR", "PR", "KO", "DOC", "REG", "FID", "AU", "ECG", "HD", "SEG"),
    *("RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "RTIMAGE"),
)
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEADER_BYTES = 2**24  # before the voxels, of a deflated file
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
SEQUENCES = ("PixelMeasures", "PixelValueTransformation", "PlanePosition", "PlaneOrientation")  # in each group
IMAGE_TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence"),
)
PIXEL_TAGS = [*IMAGE_TAGS, "PixelData", "FloatPixelData", "DoubleFloatPixelData"]
HEADER_TAGS = [
    *(*IMAGE_TAGS, *GROUPS, "SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "FrameOfReferenceUID", "Modality"),
    *("ImageType", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImageOrientationPatient"),
    *("ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType"),
]


@dataclass(frozen=True)
class Frame:
    """One slice: a file's only one, or one of a multi-frame file. None: the file does not say, or nothing valid."""

    file: Path
    index: int  # in its file
    position: Numbers | None  # (3,) of the first voxel, LPS mm
    orientation: Numbers | None  # (6,) directions of a row and of a column
    spacing: Numbers | None  # (2,) mm between rows and between columns
    thickness: float | None  # mm from this slice to the next, as far as the header says
    scaling: tuple[float, float] | None  # slope and intercept; one is NaN if it is not valid
    unit: str  # of the values after scaling, such as "HU"; "" if it is not given


@dataclass(frozen=True)
class Header:
    """What is read of a DICOM file; nothing of it that names a patient is shown to anybody."""

    file: Path
    series: str  # identifier
    space: str  # identifier of the frame of reference, in which the positions are; "" if it is not given
    number: int | None  # of the series
    modality: str
    mosaic: bool  # all slices tiled in one picture
    size: tuple[int, int, int]  # columns, rows, frames; a zero if the file holds no image
    photometric: str
    bits: int  # of a stored value
    lut: bool  # whether a Modality LUT replaces the scaling
    frames: tuple[Frame, ...]


def pydicom() -> Any:
    """The library, told to be silent: its warnings quote values."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def looks_like_dicom(file: Path) -> bool:
    """By its ending, or by its first bytes: DICOM files often have no ending."""
    if file.name.lower().endswith(DICOM_ENDINGS):
        return True
    start = b""
    if file.is_file():  # opening a pipe would wait for ever
        with suppress(OSError), file.open("rb") as stream:
            start = stream.read(132)
    return start[128:] == b"DICM" or (file.suffix == "" and start[:4] in (b"\x08\0\x05\0", b"\x08\0\x08\0"))


def read_dicom_header(file: Path) -> Header | None:
    """The header of a DICOM file; None if it is damaged, or neither an image nor a document."""
    if not file.is_file():
        return None
    try:
        with open_dicom(file, HEADER_BYTES) as stream:
            dataset = pydicom().dcmread(stream, force=True, stop_before_pixels=True, specific_tags=HEADER_TAGS)
            # of what was deflated only a part is here
            start = -math.inf if isinstance(stream, io.BytesIO) else stream.tell()
            pixels = stream.seek(0, os.SEEK_END) - start
        return _header(file, dataset, pixels)
    except DataError:
        raise
    except Exception:  # pydicom raises a dozen kinds for damaged files
        return None


def read_whole_header(file: Path) -> Any:
    """All of a readable DICOM file but its voxels, as pydicom's Dataset. It identifies the patient: show nothing of it."""
    with open_dicom(file, HEADER_BYTES) as stream:
        return pydicom().dcmread(stream, force=True, stop_before_pixels=True)


def open_dicom(file: Path, most: int) -> IO[bytes]:
    """The file; a deflated one inflated, but to no more than `most` bytes: pydicom would inflate whatever comes."""
    stream = file.open("rb")
    start = stream.read(1024)
    stream.seek(0)
    if start[128:132] != b"DICM" or DEFLATED not in start:
        return stream
    with stream:
        meta = stream.read(144 + int.from_bytes(start[140:144], "little"))  # the file's meta information
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), most)
    return io.BytesIO(meta.replace(DEFLATED, DEFLATED[:-3] + b"\0\0\0") + plain)


def read_stored(header: Header) -> npt.NDArray[Any]:
    """The values (frames, rows, columns) of a file, through its Modality LUT, but not scaled or inverted."""
    library = pydicom()
    columns, rows, frames = header.size
    try:
        with open_dicom(header.file, HEADER_BYTES + 8 * math.prod(header.size)) as stream:
            dataset = library.dcmread(stream, force=True, specific_tags=PIXEL_TAGS)
        table = dataset.pop("ModalityLUTSequence", None)
        if int(dataset.get("HighBit", 0)) != int(dataset.get("BitsStored", 1)) - 1:
            raise DataError(f"{header.file}: its HighBit and BitsStored disagree. Export the series again.")
        if dataset.file_meta.get("TransferSyntaxUID") is None:
            implicit, little = dataset.original_encoding
            native = library.uid.ImplicitVRLittleEndian if implicit else library.uid.ExplicitVRLittleEndian
            dataset.file_meta.TransferSyntaxUID = native if little else library.uid.ExplicitVRBigEndian
        pixels = _decompressed(dataset) if dataset.file_meta.TransferSyntaxUID.is_encapsulated else None
        if pixels is None:
            pixels = library.pixels.pixel_array(dataset, raw=True)
        if table is not None:
            dataset[table.tag] = table
            pixels = library.pixels.apply_modality_lut(pixels, dataset)
        return np.asarray(pixels).reshape(frames, rows, columns)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pydicom raises a dozen kinds for damaged files
        reason = "It is damaged, cut short, or compressed in an unknown way. Convert the series with dcm2niix."
        raise DataError(f"{header.file}: its voxels cannot be read. {reason}") from error


def _decompressed(dataset: Any) -> npt.NDArray[Any] | None:
    """By ITK's decoders, of a copy without scaling, so that ITK neither rescales nor inverts; None if it has none."""
    import SimpleITK as sitk

    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder, suppress(RuntimeError):
        copy = Path(folder, "pixels.dcm")
        dataset.save_as(copy, enforce_file_format=True)
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(copy), imageIO="GDCMImageIO")))
    return None


def _header(file: Path, dataset: Any, pixels: float) -> Header | None:
    modality, syntax = str(dataset.get("Modality", "")), dataset.file_meta.get("TransferSyntaxUID")
    index = INDEX in (dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID"))
    size = (int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), int(dataset.get("NumberOfFrames") or 1))
    voxels = math.prod(size) * int(dataset.get("SamplesPerPixel") or 1)
    packed = syntax is not None and syntax.is_encapsulated  # how many bytes there must be shows later
    least = 0 if packed else voxels * int(dataset.get("BitsAllocated") or 0) // 8
    if not (index or modality in NOT_SCANS) and (voxels == 0 or pixels <= least):
        return None
    number = str(dataset.get("SeriesNumber", ""))
    return Header(
        file,
        str(dataset.get("SeriesInstanceUID", "")),
        str(dataset.get("FrameOfReferenceUID") or ""),
        int(number) if number.lstrip("-").isdigit() else None,
        modality,
        "MOSAIC" in str(dataset.get("ImageType")).upper(),
        size,
        str(dataset.get("PhotometricInterpretation", "")),
        int(dataset.get("BitsStored") or 0),
        bool(dataset.get("ModalityLUTSequence")),
        tuple(_frames(file, dataset, size[2])) if voxels else (),
    )


def _frames(file: Path, dataset: Any, count: int) -> Iterator[Frame]:
    """The frames; what a functional group says counts before the file's own, and a frame's before the shared."""
    shared, each = (list(dataset.get(name) or ()) for name in GROUPS)
    if each and len(each) != count:
        raise DataError(f"{file}: announces {count} frames and describes {len(each)}. It is damaged: export it again.")
    for index in range(count):
        groups = [*each[index : index + 1], *shared[:1]]
        measures, values, position, orientation = (
            next((group[key].value[0] for group in groups if group.get(key)), dataset)
            for key in (f"{name}Sequence" for name in SEQUENCES)
        )
        spacing = _numbers(measures.get("PixelSpacing"), 2)
        scaling = [values.get(name) for name in ("RescaleSlope", "RescaleIntercept")]
        gaps = [_number(measures.get(name)) for name in ("SpacingBetweenSlices", "SliceThickness")]
        yield Frame(
            file,
            index,
            # a position of the whole file is not one of its frames'
            _numbers(position.get("ImagePositionPatient"), 3) if count == 1 or each else None,
            _numbers(orientation.get("ImageOrientationPatient"), 6),
            spacing if spacing is not None and spacing.min() > 0 else None,
            next((gap for gap in gaps if gap > 0), None),
            None if all(v in (None, "") for v in scaling) else (_number(scaling[0]) or math.nan, _number(scaling[1])),
            str(values.get("RescaleType") or ""),
        )


def _number(value: Any) -> float:
    numbers = _numbers([value], 1)
    return math.nan if numbers is None else float(numbers[0])


def _numbers(value: Any, count: int) -> Numbers | None:
    try:
        numbers = np.array([float(part) for part in value])
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None
