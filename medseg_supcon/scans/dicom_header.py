"""What one DICOM file is: of which series, where its frames are, what its values mean, and whether it is a scan."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
import zlib
from collections.abc import Sequence
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
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType", "Rows", "Columns"),
    *("NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", *GROUPS),
)

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """One slice: a file's only one, or one of a multi-frame file. None: the file does not say, or nothing valid.

    Attributes:
        file: that holds it.
        index: of the frame in its file.
        position: (3,) of the first voxel, LPS mm.
        orientation: (6,) directions of a row and of a column.
        spacing: (2,) mm between rows and between columns.
        thickness: mm from this slice to the next, as far as the header says.
        scaling: slope and intercept; (nan, nan) if they are not valid.
        unit: of the values after scaling, such as "HU"; "" if it is not given.
    """

    file: Path
    index: int
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None
    thickness: float | None
    scaling: tuple[float, float] | None
    unit: str


@dataclass(frozen=True)
class Header:
    """What is read of a DICOM file; nothing of it that names a patient is shown to anybody.

    Attributes:
        file: the file.
        series: the series' identifier.
        number: the series' number, None if it has none.
        modality: "CT", "MR", ...
        image_type: "ORIGINAL\\PRIMARY\\..."
        size: columns, rows, frames; zeros if the file holds no image.
        photometric: "MONOCHROME2", "RGB", ...
        lut: the first stored value and the table of a Modality LUT, which stands in for slope and intercept.
        frames: one per slice.
    """

    file: Path
    series: str
    number: int | None
    modality: str
    image_type: str
    size: tuple[int, int, int]
    photometric: str
    lut: tuple[int, Numbers] | None
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
    if not file.is_file():  # opening a pipe would wait for ever
        return False
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or (file.suffix == "" and start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00"))


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
    if start[128:132] != b"DICM" or DEFLATED not in start:
        stream.seek(0)
        return stream
    with stream:
        end = 144 + int.from_bytes(start[140:144], "little")  # of the file's meta information
        stream.seek(0)
        meta, packed = stream.read(end), stream.read()
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most)
    return io.BytesIO(meta.replace(DEFLATED, DEFLATED[:-3] + b"\0\0\0") + plain)


def _header(file: Path, dataset: Any, pixels: float) -> Header | None:
    document = str(dataset.get("Modality", "")) in NOT_SCANS or INDEX in (
        dataset.get("SOPClassUID"),
        dataset.file_meta.get("MediaStorageSOPClassUID"),
    )
    columns, rows = (int(dataset.get(key) or 0) for key in ("Columns", "Rows"))
    size = (columns, rows, max(1, int(dataset.get("NumberOfFrames") or 1)))
    voxels = math.prod(size) * int(dataset.get("SamplesPerPixel") or 1)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    bytes_ = voxels * int(dataset.get("BitsAllocated") or 0) // 8
    if syntax is not None and syntax.is_encapsulated:
        bytes_ = 0  # how many there must be shows when they are decompressed
    if not document and (voxels == 0 or pixels <= bytes_):
        return None
    number = str(dataset.get("SeriesNumber", ""))
    image_type = dataset.get("ImageType") or ""
    return Header(
        file,
        str(dataset.get("SeriesInstanceUID", "")),
        int(number) if number.lstrip("-").isdigit() else None,
        "index" if document and not dataset.get("Modality") else str(dataset.get("Modality", "")),
        image_type if isinstance(image_type, str) else "\\".join(map(str, image_type)),
        size,
        str(dataset.get("PhotometricInterpretation", "")),
        _lut(dataset),
        tuple(_frames(file, dataset, size[2])) if voxels else (),
    )


def _frames(file: Path, dataset: Any, count: int) -> list[Frame]:
    """The frames; what a functional group says counts before the file's own, and a frame's before the shared."""
    shared, each = (list(dataset.get(name) or ()) for name in GROUPS)
    if each and len(each) != count:
        raise DataError(f"{file}: announces {count} frames and describes {len(each)}. It is damaged: export it again.")
    frames = []
    for index in range(count):
        groups = [*each[index : index + 1], *shared[:1]]

        def item(name: str, groups: Sequence[Any] = groups) -> Any:
            return next((group[name].value[0] for group in groups if group.get(name)), dataset)

        measures, values = item("PixelMeasuresSequence"), item("PixelValueTransformationSequence")
        spacing = _numbers(measures.get("PixelSpacing"), 2)
        gaps = [_numbers(measures.get(name), 1) for name in ("SpacingBetweenSlices", "SliceThickness")]
        frames.append(
            Frame(
                file,
                index,
                # a position of the whole file is none of its frames
                _numbers(item("PlanePositionSequence").get("ImagePositionPatient"), 3) if count == 1 or each else None,
                _numbers(item("PlaneOrientationSequence").get("ImageOrientationPatient"), 6),
                spacing if spacing is not None and spacing.min() > 0 else None,
                next((float(gap[0]) for gap in gaps if gap is not None and gap[0] > 0), None),
                _scaling(values),
                str(values.get("RescaleType") or ""),
            )
        )
    return frames


def _scaling(values: Any) -> tuple[float, float] | None:
    given = [values.get(name) for name in ("RescaleSlope", "RescaleIntercept")]
    if all(value in (None, "") for value in given):
        return None
    numbers = [_numbers(value, 1) for value in given]
    if numbers[0] is None or numbers[1] is None or numbers[0][0] == 0:
        return math.nan, math.nan
    return float(numbers[0][0]), float(numbers[1][0])


def _lut(dataset: Any) -> tuple[int, Numbers] | None:
    """The Modality LUT: values beyond its ends take those of its ends."""
    sequence = dataset.get("ModalityLUTSequence")
    if not sequence:
        return None
    count, first, bits = (int(value) for value in sequence[0].LUTDescriptor)
    data = sequence[0].LUTData
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        data = np.frombuffer(data, order + "u2" if bits > 8 or len(data) >= 2 * (count or 2**16) else "u1")
    table = np.asarray(data, dtype=np.float64).ravel()[: count or 2**16]
    if len(table) != (count or 2**16):
        raise ValueError("a Modality LUT that is cut short")
    signed = int(dataset.get("PixelRepresentation") or 0) == 1
    return first - 2**16 if signed and first >= 2**15 else first, table


def _numbers(value: Any, count: int) -> Numbers | None:
    try:
        numbers = np.array([float(part) for part in ([value] if count == 1 else value)])
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None
