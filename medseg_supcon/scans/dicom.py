"""DICOM series in a folder, told apart, and a check that the slices of one make a volume."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_supcon.errors import DataError
from medseg_supcon.scans.dicom_header import (
    NOT_SCANS,
    PICTURES_OF_SCANS,
    Header,
    Positions,
    is_document,
    looks_like_dicom,
)
from medseg_supcon.scans.dicom_header import read_dicom_header as read_header
from medseg_supcon.scans.grid import NEAR

SAME_PLACE = 1e-3  # mm
SAME_TURN = 1e-3  # of a unit vector


Series = list[tuple[str, list[Path], str]]


def series_in(folder: Path, name: str = "") -> tuple[Series, list[Path]]:
    """The DICOM series directly in a folder, (name, slices in order, digest) each, and the damaged files.

    One series is called as the folder, or `name`, several ``<folder>_series<number>``. Series identifiers are never
    shown: they identify a patient's examination. A digest tells a series from others of a folder of that name, and
    shows which it is to those alone who hold the identifier. Reports, plans and drawings are passed over.
    """
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.is_file()]
    found: dict[str, list[Header]] = {}
    damaged = []
    for file in filter(looks_like_dicom, files):
        header = read_header(file)
        if header is not None:
            found.setdefault(header.series, []).append(header)
        elif not is_document(file):
            damaged.append(file)
    series = [
        headers for headers in found.values() if headers[0].modality not in (*NOT_SCANS, *PICTURES_OF_SCANS)
    ]
    name = name or folder.resolve().name or "scan"
    if len(series) <= 1:
        return [(name, _in_order(headers), _digest(name, headers[0])) for headers in series], damaged
    numbers = [headers[0].number for headers in series]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(series) + 1))
    order = sorted(range(len(series)), key=lambda i: numbers[i] or 0)
    return [
        (f"{name}_series{numbers[i]}", _in_order(series[i]), _digest(name, series[i][0])) for i in order
    ], damaged


def _digest(name: str, header: Header) -> str:
    return hashlib.sha256(f"{name}\0{header.series}".encode()).hexdigest()[:16]


def _in_order(headers: Sequence[Header]) -> list[Path]:
    """Along the normal of the slices; by name where a slice does not say where it is."""
    first = headers[0]
    if first.orientation is None or any(h.positions is None for h in headers):
        return [h.file for h in headers]
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return [h.file for h in sorted(headers, key=lambda h: float(h.positions[0] @ normal))]  # type: ignore[index]


def is_one_of_many(file: Path, series: Series) -> int:
    """Number of slices of the series that a slice belongs to; 0 for a file that is a volume of its own."""
    own = next((files for _, files, _ in series if file in files), [])
    header = read_header(file) if len(own) > 1 else None
    return 0 if header is None or header.size[2] > 1 else len(own)


def check_series(files: Sequence[Path], source: Path) -> tuple[Positions, int]:
    """Positions (slices, 3) of a series' slices in mm, and values per voxel, if they make one volume.

    Raises:
        DataError: a file is damaged, no scan, a mosaic, or of another grid than the others; a slice is missing or
            says no position; the gantry was tilted; there are several volumes.
    """
    headers = [_readable(file, source) for file in files]
    usual = Counter(map(_kind, headers)).most_common(1)[0][0]
    reference = next(h for h in headers if _kind(h) == usual)
    odd = [h for h in headers if not _alike(h, reference)]
    if odd:
        raise DataError(
            f"{odd[0].file}: its size or direction differs from that of {len(files) - len(odd)} of the {len(files)} "
            "slices of its series (a localiser, or another view). Move it out of the folder."
        )
    first = headers[0]
    if first.size[2] > 1 and len(files) > 1:
        raise DataError(
            f"{source}: the series holds {len(files)} volumes, a file each. Give the file that you want segmented."
        )
    if first.orientation is None or any(h.positions is None for h in headers):
        many = len(files) > 1 or first.size[2] > 1
        raise DataError(
            f"{source}: {'not every slice says' if many else 'does not say'} where it lies in the body (one "
            "ImagePositionPatient a slice). If it is a scan and no picture, convert it to NIfTI with dcm2niix."
        )
    positions = np.concatenate([h.positions for h in headers if h.positions is not None])
    if (sentence := _unevenness(positions, first)) is not None:
        raise DataError(f"{source}: {sentence}")
    return positions, first.channels


def _readable(file: Path, source: Path) -> Header:
    header = read_header(file)
    if header is None:
        raise DataError(
            f"{file}: cannot be read as a DICOM image. It is damaged, cut short, or holds no image."
        )
    if header.modality in (*NOT_SCANS, *PICTURES_OF_SCANS):
        raise DataError(
            f"{source}: is no scan (its DICOM modality is {header.modality}). Give the scan itself."
        )
    if header.mosaic:
        raise DataError(
            f"{source}: is a mosaic, all slices tiled in one picture (Siemens). Convert it to NIfTI with dcm2niix."
        )
    return header


def _kind(header: Header) -> tuple[object, ...]:
    """About the same for slices of one view; `_alike` says it exactly."""
    turn = () if header.orientation is None else tuple(np.round(header.orientation / SAME_TURN))
    return header.size, header.channels, turn


def _alike(one: Header, other: Header) -> bool:
    if (one.size, one.channels) != (other.size, other.channels):
        return False
    if one.orientation is None or other.orientation is None:
        return one.orientation is other.orientation
    return bool(np.abs(one.orientation - other.orientation).max() <= SAME_TURN)


def _unevenness(positions: Positions, header: Header) -> str | None:
    """What is wrong with the slices' places; None for one volume with even gaps."""
    count = len(positions)
    if count == 1 or header.orientation is None:
        return None
    normal = np.cross(header.orientation[:3], header.orientation[3:])
    places = len(np.unique(np.round(positions / SAME_PLACE), axis=0))
    if places < count:
        return (
            f"holds several volumes: {count} slices at {places} places (a time series, echoes, or a copy of slices). "
            "Export one volume."
        )
    step = (positions[-1] - positions[0]) / (count - 1)
    limit = NEAR * min(header.edge, float(np.linalg.norm(step)))
    sideways = (positions - positions[0]) - np.outer((positions - positions[0]) @ normal, normal)
    if np.linalg.norm(sideways, axis=1).max() > limit:
        return (
            f"each slice is shifted sideways against the one before, {np.linalg.norm(sideways[-1]):.1f} mm in all (the "
            "gantry was tilted). Resample the scan onto a straight grid first, for example with dcm2niix."
        )
    off = np.linalg.norm(positions - positions[0] - np.outer(np.arange(count), step), axis=1)
    if off.max() > limit:
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        usual = float(np.median(gaps))
        worst = int(np.abs(gaps - usual).argmax())
        return (
            f"the slices are not evenly spaced: number {worst + 1} and {worst + 2} of {count} are {gaps[worst]:.2f} mm "
            f"apart, others {usual:.2f} mm. A slice is missing, or was taken twice: export the whole series."
        )
    return None
