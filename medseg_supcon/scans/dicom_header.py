"""What one DICOM file is: of which series, where its slices lie, and whether it is a scan at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.float64]

ENDINGS = (".dcm", ".ima")
HEADER_BYTES = 2**20
INDEX = b"1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, whatever it is called
# Files of a study that hold no scan (documents, drawings, plans), and pictures made of a scan.
NOT_SCANS = ("SR", "PR", "KO", "DOC", "REG", "FID", "AU", "ECG", "HD", "RTSTRUCT", "RTPLAN", "RTRECORD")
PICTURES_OF_SCANS = ("SEG", "RTDOSE", "RTIMAGE")


@dataclass(frozen=True)
class Header:
    """What is read of a DICOM file; nothing of it that names a patient is shown to anybody.

    Attributes:
        series: the series' identifier.
        number: the series' number, None where it has none.
        modality: "CT", "MR", ...
        mosaic: a whole volume tiled into one picture (Siemens).
        size: columns, rows, frames.
        channels: values per voxel.
        edge: of the smaller side of a pixel, mm.
        orientation: (6,) directions of a row and of a column, None where the file does not say.
        positions: (frames, 3) of the frames' first voxels in mm, None where the file does not say.
    """

    file: Path
    series: str
    number: int | None
    modality: str
    mosaic: bool
    size: tuple[int, int, int]
    channels: int
    edge: float
    orientation: Positions | None
    positions: Positions | None


def looks_like_dicom(file: Path) -> bool:
    """By its ending, or by its first bytes: DICOM files often have no ending."""
    if file.name.lower().endswith(ENDINGS):
        return True
    if not file.is_file():  # to open a pipe is to wait for ever
        return False
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or (
        file.suffix == "" and start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
    )


def is_document(file: Path) -> bool:
    """Whether a DICOM file that is no image is a report, a drawing, a plan or an index of files, not damaged."""
    try:
        with file.open("rb") as stream:
            content = stream.read(HEADER_BYTES)
    except OSError:
        return False
    modality = re.search(rb"\x08\x00\x60\x00(?:CS..|....)([A-Z]{2,10})", content, re.DOTALL)
    return INDEX in content[:1024] or (modality is not None and modality[1].decode() in NOT_SCANS)


def read_dicom_header(file: Path) -> Header | None:
    """The header of a DICOM image; None where there is no image in the file, or it is damaged."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings quote tags
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
        size = (*reader.GetSize(), 1)[:3]
    except RuntimeError:
        return None
    number = _tag(reader, "0020|0011")
    orientation = _numbers(_tag(reader, "0020|0037"), 6)
    position = _numbers(_tag(reader, "0020|0032"), 3)
    positions = None if position is None else position[None]
    if size[2] > 1:
        orientation, positions = _of_frames(file, size[2])
    return Header(
        file,
        _tag(reader, "0020|000e"),
        int(number) if re.fullmatch(r"-?\d+", number) else None,
        _tag(reader, "0008|0060"),
        "MOSAIC" in _tag(reader, "0008|0008").upper(),
        (int(size[0]), int(size[1]), int(size[2])),
        int(reader.GetNumberOfComponents()),
        float(min(reader.GetSpacing()[:2])),
        orientation,
        positions,
    )


def _tag(reader: Any, key: str) -> str:
    return str(reader.GetMetaData(key)).strip("\0 ") if reader.HasMetaDataKey(key) else ""


def _numbers(text: str, count: int) -> Positions | None:
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _of_frames(file: Path, frames: int) -> tuple[Positions | None, Positions | None]:
    """Orientation and positions that a multi-frame file gives its frames, one each; None where it does not.

    SimpleITK shows no tag within a sequence, so they are looked for in the bytes: a position for each frame in
    turn, and one orientation, given once or for each.
    """
    content = file.read_bytes()
    positions = _all(content, b"\x20\x00\x32\x00", 3)
    orientations = _all(content, b"\x20\x00\x37\x00", 6)
    if len(positions) != frames or not orientations or np.ptp(orientations, axis=0).max() > 1e-4:
        return None, None
    return orientations[0], np.array(positions)


def _all(content: bytes, tag: bytes, count: int) -> list[Positions]:
    """Every decimal string of `count` numbers under a tag (little endian, with or without its type)."""
    pattern = re.escape(tag) + rb"(?:DS(..)|(..)\x00\x00)([-+0-9.eE\\ ]{1,255})"
    found = []
    for match in re.finditer(pattern, content, re.DOTALL):
        length = int.from_bytes(match[1] or match[2], "little")
        values = _numbers(match[3][:length].decode(), count)
        if values is not None:
            found.append(values)
    return found
