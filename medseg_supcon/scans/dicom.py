"""DICOM: the series in a folder, a check that the slices of one make a volume, and its voxels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg_supcon.errors import DataError
from medseg_supcon.scans.dicom_file import (
    NOT_SCANS,
    Frame,
    Header,
    looks_like_dicom,
    read_dicom_header,
    read_stored,
)
from medseg_supcon.scans.grid import NEAR, Affine, Grid, Issue, Numbers, Volume
from medseg_supcon.scans.itk import ras_affine

SAME_PLACE = 1e-3  # mm
SAME_TURN = 1e-3  # of a unit vector
SAME_SIZE = 1e-3  # of a pixel's edge

Series = list[tuple[str, list[Path], str]]


def series_in(folder: Path, name: str = "") -> tuple[Series, list[Path]]:
    """The DICOM series directly in a folder, (name, slices in order, digest) each, and the damaged files.

    One series is called as the folder, or `name`, several ``<folder>_series<number>``. Series identifiers are never
    shown: they identify a patient's examination. A digest tells series apart. Reports, plans and drawings are skipped.
    """
    by_series: dict[str, list[Header]] = {}
    damaged = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.is_dir() or not looks_like_dicom(file):
            continue
        header = None
        with suppress(DataError):
            header = read_dicom_header(file)
        if header is None:
            damaged.append(file)
        elif header.frames and header.modality not in NOT_SCANS:
            by_series.setdefault(header.series, []).append(header)
    name = name or folder.resolve().name or "scan"
    numbers = [headers[0].number for headers in by_series.values()]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(numbers) + 1))
    series = []
    for number, (uid, headers) in sorted(zip(numbers, by_series.items(), strict=True), key=lambda pair: pair[0] or 0):
        files = [frame.file for frame in _in_order([header.frames[0] for header in headers])]
        digest = hashlib.sha256(f"{name}\0{uid}".encode()).hexdigest()[:16]
        series.append((name if len(numbers) == 1 else f"{name}_series{number}", files, digest))
    return series, damaged


def _in_order(frames: Sequence[Frame]) -> list[Frame]:
    """Along the normal of the slices; as they come if one does not say where it is."""
    first = frames[0].orientation
    if first is None or any(frame.position is None for frame in frames):
        return list(frames)
    normal = np.cross(first[:3], first[3:])
    return sorted(frames, key=lambda frame: float(frame.position @ normal))  # type: ignore[operator]


def is_one_of_many(file: Path, series: Series) -> int:
    """Number of slices of the series that a slice belongs to; 0 for a file that is a volume of its own."""
    own = next((files for _, files, _ in series if file in files), [])
    header = read_dicom_header(file) if len(own) > 1 else None
    return 0 if header is None or header.size[2] > 1 else len(own)


def read_dicom(files: Sequence[Path]) -> Volume:
    """The volume (X, Y, Z) that the slices of a series, or the frames of a file, make; DataError if they make none.

    Values are what the header defines: stored values through the slice's own slope and intercept, or through its
    Modality LUT. MONOCHROME1 says how to show them, and changes none.
    """
    headers, frames, affine = check_series(files)
    columns, rows, _ = headers[0].size
    data = np.empty((len(frames), rows, columns), dtype=np.float32)
    place = {(frame.file, frame.index): k for k, frame in enumerate(frames)}
    for header in headers:
        for frame, stored in zip(header.frames, read_stored(header), strict=True):
            k = place[frame.file, frame.index]
            slope, intercept = frame.scaling or (1.0, 0.0)
            data[k] = stored if (slope, intercept) == (1.0, 0.0) else stored * np.float64(slope) + intercept
    grid = Grid.at((columns, rows, len(frames)), affine)
    return Volume(data.transpose(2, 1, 0), grid, affine, _doubts(headers))


def check_series(files: Sequence[Path]) -> tuple[list[Header], list[Frame], Affine]:
    """Headers as the files, frames in the order of their places, and the affine to RAS+ mm; raises as `read_dicom`."""
    source = files[0].parent if len(files) > 1 else files[0]
    headers = [_readable(file, source) for file in files]
    if headers[0].size[2] > 1 and len(files) > 1:
        raise DataError(f"{source}: the series holds {len(files)} volumes, a file each. Give the file to be segmented.")
    frames = _in_order([frame for header in headers for frame in header.frames])
    _check_alike(headers, frames)
    _check_scales(headers)
    first, positions = frames[0], np.array([frame.position for frame in frames if frame.position is not None])
    if first.orientation is None or len(positions) < len(frames):
        what = "not every slice says" if len(frames) > 1 else "does not say"
        raise DataError(f"{source}: {what} where it is in the body (ImagePositionPatient). Convert it with dcm2niix.")
    if first.spacing is None:
        raise DataError(f"{first.file}: does not say how large a pixel is (no valid PixelSpacing). Export it again.")
    row, column = first.orientation[:3], first.orientation[3:]
    axes = np.array([row, column, np.cross(row, column)])
    if np.abs(axes @ axes.T - np.eye(3)).max() > 10 * SAME_TURN:
        raise DataError(
            f"{first.file}: its ImageOrientationPatient is not a pair of perpendicular axes. Export it again."
        )
    if len(frames) > 1:
        _check_even(positions, axes[2], float(first.spacing.min()), source)
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
    elif first.thickness is not None:
        step = axes[2] * first.thickness
    else:
        raise DataError(f"{source}: is a single slice, and does not say how thick it is. Give the whole series.")
    lps = np.eye(4)
    lps[:3] = np.stack([row * first.spacing[1], column * first.spacing[0], step, positions[0]], axis=1)
    return headers, frames, ras_affine(lps)


def _readable(file: Path, source: Path) -> Header:
    header = read_dicom_header(file)
    if header is None or not header.frames:
        raise DataError(f"{file}: cannot be read as a DICOM image. It is damaged, cut short, or holds no image.")
    if header.modality in NOT_SCANS:
        raise DataError(f"{source}: is not a scan (its DICOM modality is {header.modality}). Give the scan itself.")
    if header.mosaic:
        raise DataError(f"{source}: is a mosaic, all slices tiled in one picture. Convert it with dcm2niix.")
    if header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        found = header.photometric or "no PhotometricInterpretation"
        raise DataError(f"{file}: is in colour ({found}), expected grey values. Give the scan it was made of.")
    return header


def _check_alike(headers: Sequence[Header], frames: Sequence[Frame]) -> None:
    """Whether all slices have one size, one direction and one pixel spacing."""
    size = Counter(header.size for header in headers).most_common(1)[0][0]
    odd = [header.file for header in headers if header.size != size]
    odd += [frames[i].file for i in _odd([frame.orientation for frame in frames], SAME_TURN)]
    if odd:
        raise DataError(
            f"{odd[0]}: its size or direction differs from that of other slices. Move it out of the folder."
        )
    for i in _odd([frame.spacing for frame in frames], SAME_SIZE):
        own = frames[i].spacing
        given = "not given" if own is None else f"{own[0]:g} x {own[1]:g} mm"
        where = f"{frames[i].file}: frame {i + 1}" if size[2] > 1 else frames[i].file
        raise DataError(f"{where}: its PixelSpacing is {given}, and other slices have another. Export it again.")


def _odd(values: Sequence[Numbers | None], limit: float) -> list[int]:
    """Which values are missing, or differ from the usual one; none if all are missing."""
    given = [value for value in values if value is not None]
    if not given:
        return []
    usual = np.percentile(given, 50, axis=0, method="lower")
    return [i for i, v in enumerate(values) if v is None or np.abs(v - usual).max() > limit]


def _check_scales(headers: Sequence[Header]) -> None:
    """Whether the values of all slices are on one scale: slopes may differ, as PET's do, but none may be missing."""
    rules, units = dict[str, Path](), dict[str, Path]()  # to the first file of each
    for header in headers:
        for frame in header.frames:
            rule = "a Modality LUT" if header.lut else "no rescale slope and intercept"
            if frame.scaling is not None:
                rule = "a rescale slope and intercept"
                if header.lut or not np.isfinite(frame.scaling).all():
                    besides = "there is a Modality LUT besides" if header.lut else "one is missing or not valid"
                    raise DataError(f"{header.file}: its rescale slope is contradictory ({besides}). Export it again.")
            rules.setdefault(rule, header.file)
            if frame.unit:
                units.setdefault(f"values in {frame.unit}", header.file)
    for seen in (rules, units):
        if len(seen) > 1:
            (one, first), (other, second) = list(seen.items())[:2]
            raise DataError(f"{second}: has {other}, {first} {one}: values must be on one scale. Export it again.")


def _check_even(positions: Numbers, normal: Numbers, edge: float, source: Path) -> None:
    """Whether positions in order make one volume with even gaps."""
    count, way = len(positions), positions - positions[0]
    places = len(np.unique(np.round(positions / SAME_PLACE), axis=0))
    if places < count:
        found = f"{count} slices at {places} places (a time series, echoes, or copies)"
        raise DataError(f"{source}: holds several volumes: {found}. Export one volume.")
    step = way[-1] / (count - 1)
    limit = NEAR * min(edge, float(np.linalg.norm(step)))
    sideways = np.linalg.norm(way - np.outer(way @ normal, normal), axis=1)
    if sideways.max() > limit:
        found = f"its slices are shifted sideways by up to {sideways.max():.2g} mm (a tilted gantry, or a slice out of line)"
        raise DataError(f"{source}: {found}. Resample it onto a straight grid first, for example with dcm2niix.")
    if np.linalg.norm(way - np.outer(np.arange(count), step), axis=1).max() > limit:
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        usual = float(np.median(gaps))
        worst = int(np.abs(gaps - usual).argmax())
        found = f"number {worst + 1} and {worst + 2} of {count} are {gaps[worst]:.2f} mm apart, others {usual:.2f} mm"
        raise DataError(f"{source}: slices are not evenly spaced: {found}. Export the whole series.")


def _doubts(headers: Sequence[Header]) -> tuple[Issue, ...]:
    header, doubts = headers[0], {}
    unit, scaled = header.frames[0].unit, header.frames[0].scaling is not None or header.lut
    if header.modality == "CT" and (not scaled or unit not in ("", "HU", "US")):
        what = f"gives values in {unit}" if scaled else "gives no rescale slope and intercept"
        doubts["not_hounsfield"] = f"is CT and {what}: they may not be Hounsfield units"
    if header.photometric == "MONOCHROME1" and header.modality != "CT":
        doubts["monochrome1"] = "is MONOCHROME1 (shows small values bright): the stored values are used, not inverted"
    if len({header.bits for header in headers}) > 1:
        doubts["bits"] = "its slices have different BitsStored: values of some may be cut. Check them"
    if (count := len({header.space for header in headers if header.space})) > 1:
        doubts["frame_of_reference"] = f"its slices have {count} FrameOfReferenceUIDs. Check that they fit together"
    return tuple(Issue(code, "warning", sentence) for code, sentence in doubts.items())
