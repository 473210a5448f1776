"""DICOM files written by hand, element for element (explicit VR, little endian): whatever a scanner may export."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

SPACING = (0.8, 0.9, 2.4)
ORIGIN = np.array([-12.0, 34.0, 56.0])
DIRECTION = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix()
MR, ENHANCED_MR, DIRECTORY = (
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.1.3.10",
)
LONG = ("OB", "OW", "SQ", "UN")
SECRETS = ("DOE", "4711", "1.9.9", "19500101")


def element(tag: int, kind: str, value: Any) -> bytes:
    if kind == "US":
        data = struct.pack("<H", value)
    elif kind == "SQ":
        data = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in value)
    elif isinstance(value, bytes):
        data = value
    else:
        text = value if isinstance(value, str) else "\\".join(f"{v:.10g}" for v in np.ravel(value))
        data = text.encode()
    data += b"\0" if len(data) % 2 and kind == "UI" else b" " * (len(data) % 2)
    length = b"\0\0" + struct.pack("<I", len(data)) if kind in LONG else struct.pack("<H", len(data))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode() + length + data


def write_dicom(path: Path, tags: dict[int, tuple[str, Any]], sop: str = MR) -> Path:
    """A file of these elements, (VR, value) by tag, with a patient's name, number and birthday."""
    patient = {
        0x00100010: ("PN", "DOE^JANE"),
        0x00100020: ("LO", "PATIENT4711"),
        0x00100030: ("DA", "19500101"),
    }
    meta = [(0x00020002, "UI", sop), (0x00020003, "UI", "1.9.9.1"), (0x00020010, "UI", "1.2.840.10008.1.2.1")]
    head = b"".join(element(*entry) for entry in meta)
    body = b"".join(element(tag, *entry) for tag, entry in sorted({**patient, **tags}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + element(0x00020000, "UL", struct.pack("<I", len(head))) + head + body)
    return path


def image_tags(pixels: np.ndarray, series: str = "1.9.9.7", number: int = 1, **more: Any) -> dict[int, tuple[str, Any]]:
    """Elements of an image (rows, columns), or (frames, rows, columns), int16."""
    return {
        0x00080008: ("CS", more.get("image_type", "ORIGINAL\\PRIMARY\\M")),
        0x00080016: ("UI", MR),
        0x00080018: ("UI", more.get("uid", "1.9.9.1")),
        0x00080060: ("CS", more.get("modality", "MR")),
        0x0020000D: ("UI", "1.9.9"),
        0x0020000E: ("UI", series),
        0x00200011: ("IS", str(number)),
        0x00180050: ("DS", [SPACING[2]]),
        0x00280002: ("US", 1),
        0x00280004: ("CS", "MONOCHROME2"),
        0x00280010: ("US", pixels.shape[-2]),
        0x00280011: ("US", pixels.shape[-1]),
        0x00280030: ("DS", [SPACING[1], SPACING[0]]),
        0x00280100: ("US", 16),
        0x00280101: ("US", 16),
        0x00280102: ("US", 15),
        0x00280103: ("US", 1),
        0x00281052: ("DS", [0]),
        0x00281053: ("DS", [more.get("slope", 1)]),
        0x7FE00010: ("OW", pixels.astype("<i2").tobytes()),
    }


def place_of(k: int) -> np.ndarray:
    return np.asarray(ORIGIN + DIRECTION[:, 2] * SPACING[2] * k)


def write_series(
    folder: Path,
    scan: np.ndarray,
    series: str = "1.9.9.7",
    number: int = 1,
    skip: Sequence[int] = (),
    place: Callable[[int], np.ndarray] = place_of,
    change: Callable[[int, dict[int, tuple[str, Any]]], None] | None = None,
    ending: str = ".dcm",
    **more: Any,
) -> list[Path]:
    """A file a slice of (X, Y, Z), in an order of names that is not the order of places."""
    files = []
    for k in range(scan.shape[2]):
        if k in skip:
            continue
        tags = image_tags(scan[:, :, k].T, series, number, uid=f"{series}.{k}", **more)
        tags[0x00200013] = ("IS", str(k))
        tags[0x00200032] = ("DS", place(k))
        tags[0x00200037] = ("DS", DIRECTION.T[:2])
        if change is not None:
            change(k, tags)
        files.append(write_dicom(folder / f"{number:02d}_{(7 * k) % 31:03d}{ending}", tags))
    return files


def write_multi_frame(path: Path, scan: np.ndarray, place: Callable[[int], np.ndarray] = place_of) -> Path:
    """An enhanced MR: all slices in one file, each frame's place in a sequence."""
    tags = image_tags(scan.transpose(2, 1, 0))
    tags[0x00080016] = ("UI", ENHANCED_MR)
    tags[0x00280008] = ("IS", str(scan.shape[2]))
    del tags[0x00280030], tags[0x00180050]
    measures = element(0x00180050, "DS", [SPACING[2]]) + element(0x00280030, "DS", [SPACING[1], SPACING[0]])
    turn = element(0x00200037, "DS", DIRECTION.T[:2])
    rescale = element(0x00281052, "DS", [0]) + element(0x00281053, "DS", [1]) + element(0x00281054, "LO", "US")
    shared = element(0x00209116, "SQ", [turn]) + element(0x00289110, "SQ", [measures])
    frames = [
        element(0x00209113, "SQ", [element(0x00200032, "DS", place(k))]) + element(0x00289145, "SQ", [rescale])
        for k in range(scan.shape[2])
    ]
    tags[0x52009229] = ("SQ", [shared])
    tags[0x52009230] = ("SQ", frames)
    return write_dicom(path, tags, ENHANCED_MR)
