"""What one DICOM file is: of which series, where its frames are, what its values mean, and whether it is a scan."""

from __future__ import annotations

import io
import logging
import math
import os
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

DICOM_ENDINGS = (".dcm", ".ima")
INDEX = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, whatever it is called
# Files of a study that hold no scan (documents, drawings, plans), and pictures made of a scan.
NOT_SCANS = ("SR", "PR", "KO", "DOC", "REG", "FID", "AU", "ECG", "HD", "RTSTRUCT", "RTPLAN", "RTRECORD")
PICTURES_OF_SCANS = ("SEG", "RTDOSE", "RTIMAGE")
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEADER_BYTES = 2**24  # before the voxels, of a deflated file
SEQUENCES = (
    *("PixelMeasuresSequence", "PixelValueTransformationSequence"),
    *("PlanePositionSequence", "PlaneOrientationSequence"),
)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS = (
    *(
        "SOPClassUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "SeriesNumber",
        "Modality",
        "ImageType",
        "Rows",
        "Columns",
    ),
    *("NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", *GROUPS),
)

Numbers = npt.NDArray[np.float64]


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
    image_type: str
    size: tuple[int, int, int]  # columns, rows, frames; a zero if the file holds no image
    photometric: str
    lut: tuple[int, Numbers] | None  # first stored value and table of a Modality LUT, which replaces the scaling
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
            dataset = pydicom().dcmread(stream, force=True, stop_before_pixels=True, specific_tags=list(TAGS))
            # of what was deflated only a part is here
            start = -math.inf if isinstance(stream, io.BytesIO) else stream.tell()
            pixels = stream.seek(0, os.SEEK_END) - start
        return _header(file, dataset, pixels)
    except DataError:
        raise
    except Exception:  # pydicom raises a dozen kinds for damaged files
        return None


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


def _header(file: Path, dataset: Any, pixels: float) -> Header | None:
    modality, syntax = str(dataset.get("Modality", "")), dataset.file_meta.get("TransferSyntaxUID")
    index = INDEX in (dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID"))
    columns, rows, frames, samples, bits = (
        int(dataset.get(key) or default)
        for key, default in zip(
            ("Columns", "Rows", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"), (0, 0, 1, 1, 0), strict=True
        )
    )
    size = (columns, rows, max(1, frames))
    voxels = math.prod(size) * samples
    # how many bytes there must be of compressed voxels shows when they are decompressed
    least = 0 if syntax is not None and syntax.is_encapsulated else voxels * bits // 8
    if not (index or modality in NOT_SCANS) and (voxels == 0 or pixels <= least):
        return None
    number, image_type = str(dataset.get("SeriesNumber", "")), dataset.get("ImageType") or ""
    return Header(
        file,
        str(dataset.get("SeriesInstanceUID", "")),
        str(dataset.get("FrameOfReferenceUID") or ""),
        int(number) if number.lstrip("-").isdigit() else None,
        modality or ("index" if index else ""),
        image_type if isinstance(image_type, str) else "\\".join(map(str, image_type)),
        size,
        str(dataset.get("PhotometricInterpretation", "")),
        _lut(dataset),
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
            next((group[name].value[0] for group in groups if group.get(name)), dataset) for name in SEQUENCES
        )
        spacing = _numbers(measures.get("PixelSpacing"), 2)
        gaps = [_number(measures.get(name)) for name in ("SpacingBetweenSlices", "SliceThickness")]
        yield Frame(
            file,
            index,
            # a position of the whole file is not one of its frames'
            _numbers(position.get("ImagePositionPatient"), 3) if count == 1 or each else None,
            _numbers(orientation.get("ImageOrientationPatient"), 6),
            spacing if spacing is not None and spacing.min() > 0 else None,
            next((gap for gap in gaps if gap > 0), None),
            _scaling(values),
            str(values.get("RescaleType") or ""),
        )


def _scaling(values: Any) -> tuple[float, float] | None:
    given = [values.get(name) for name in ("RescaleSlope", "RescaleIntercept")]
    return None if all(value in (None, "") for value in given) else (_number(given[0]) or math.nan, _number(given[1]))


def _lut(dataset: Any) -> tuple[int, Numbers] | None:
    """The Modality LUT: values beyond its ends take those of its ends."""
    sequence = dataset.get("ModalityLUTSequence")
    if not sequence:
        return None
    count, first, bits = (int(value) for value in sequence[0].LUTDescriptor)
    data, count = sequence[0].LUTData, count or 2**16
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        data = np.frombuffer(data, order + "u2" if bits > 8 or len(data) >= 2 * count else "u1")
    table = np.asarray(data, dtype=np.float64).ravel()[:count]
    if len(table) != count:
        raise ValueError("a Modality LUT that is cut short")
    signed = int(dataset.get("PixelRepresentation") or 0) == 1
    return first - 2**16 if signed and first >= 2**15 else first, table


def _number(value: Any) -> float:
    numbers = _numbers([value], 1)
    return math.nan if numbers is None else float(numbers[0])


def _numbers(value: Any, count: int) -> Numbers | None:
    try:
        numbers = np.array([float(part) for part in value])
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None
