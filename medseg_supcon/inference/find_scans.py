"""Which scans files and folders contain, and the names of their masks."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from medseg_supcon.errors import DataError
from medseg_supcon.scans import Scan, Series, is_one_of_many, kind_of, not_a_file, scan_header, series_in, stem

# Formats that are not read: in a folder they are refused by name; notes and tables are passed over.
FOREIGN = (
    ".hdr", ".mgh", ".mgz", ".mnc", ".par", ".head", ".gipl", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip",
    ".mha.gz", ".nrrd.gz", ".dcm.gz", ".gipl.gz",
)  # fmt: skip
FORMATS = "NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd), NRRD (.nrrd) or a DICOM series folder"
DAMAGED = (
    "cannot be read as DICOM. It is damaged, cut short or contains no image; a slice of its series may be missing now."
)


def find_scans(paths: Iterable[str | Path], channels: int | Sequence[str] = 1) -> list[Scan]:
    """The scans in files and folders, in order; what is wrong with one is its ``problem``.

    A folder gives every scan directly in it and all DICOM series in and below it, ``PATIENT/STUDY/SERIES`` called
    ``PATIENT_STUDY_SERIES``. Other scans in its subfolders are passed over, as ``warnings`` of the first scan say;
    hidden files and what is not a scan are passed over, damaged DICOM files are not. With several channels, 3-D
    files ``case_0000.nii.gz``, ``case_0001.nii.gz``, ... are one scan ``case``, as in nnU-Net. Two scans that
    would get one name are both refused.

    Args:
        paths: files and folders, mixed.
        channels: how many channels the model takes, or their names.

    Example:
        >>> find_scans(["/nowhere/scan.nii.gz"])[0].problem
        '/nowhere/scan.nii.gz: there is no such file or folder. Check the path.'
    """
    number = channels if isinstance(channels, int) else len(channels)
    found: dict[tuple[Path, ...], Scan] = {}
    series_of = cache(series_in)
    for path in map(Path, paths):
        for scan in _scans_at(path, series_of):
            # A link to a file has a name of its own, a link to a folder gives its files none.
            key = tuple(Path(os.path.realpath(file.parent), file.name) for file in scan.files)
            found.setdefault(key, scan)
    scans = list(found.values())
    return refuse_equal_names(_group_channels(scans, number) if number > 1 else scans)


def _group_channels(scans: list[Scan], channels: int) -> list[Scan]:
    """Files ``case_0000``, ``case_0001``, ... of a folder as one scan ``case``; what does not fit is its problem."""
    groups: dict[Scan | tuple[str, str], list[tuple[int, Scan]]] = {}
    for scan in scans:
        match = re.fullmatch(r"(.+)_(\d{4})", scan.name)
        if match is None or scan.problem is not None or not _is_single(scan):
            groups[scan] = []
        else:
            key = os.path.realpath(scan.files[0].parent), match[1]
            groups.setdefault(key, []).append((int(match[2]), scan))
    return [key if isinstance(key, Scan) else _one(key[1], group, channels) for key, group in groups.items()]


def _is_single(scan: Scan) -> bool:
    """Whether a file contains one channel; also if it cannot be read (reading it will say why)."""
    with suppress(DataError):
        return scan.kind != "dicom" and len(scan_header(scan)[0]) <= 3
    return True


def _one(name: str, numbered: list[tuple[int, Scan]], channels: int) -> Scan:
    numbered.sort(key=lambda part: part[0])
    numbers, parts = [number for number, _ in numbered], [scan for _, scan in numbered]
    problem, whole = None, parts[0].source.parent / name
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        rivals = ", ".join(scan.source.name for n, scan in numbered if n == twice[0])
        problem = f"{whole}: there are two files for channel {twice[0]:04d} ({rivals}). Keep one."
    elif len({scan.kind for scan in parts}) > 1:
        names = ", ".join(scan.source.name for scan in parts)
        problem = f"{whole}: all channels must have the same format, found {names}. Convert them to NIfTI."
    elif numbers != list(range(channels)):
        have = ", ".join(f"{number:04d}" for number in numbers)
        expected = f"the model needs {channels} channels, {name}_0000 to {name}_{channels - 1:04d}"
        problem = f"{whole}: {expected}, but found {have}. Add the missing files, or use one 4-D file."
    return replace(parts[0], name=name, files=tuple(scan.files[0] for scan in parts), problem=problem)


def _name(path: Path) -> str:
    # Not resolve(): the mask is called as the link, not as what it leads to; but ".." has no name.
    return stem(os.path.abspath(path)) or "scan"  # noqa: PTH100


def _refused(name: str, path: Path, reason: str) -> Scan:
    return Scan(name, (path,), problem=f"{path}: {reason}")


def _scans_at(path: Path, series_of: Callable[[Path], tuple[Series, list[Path]]]) -> list[Scan]:
    name = _name(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises without permission
        return _scans_in(path) or [_refused(name, path, f"the folder contains no scans. Expected {FORMATS}.")]
    if (problem := not_a_file(path)) is not None:
        return [Scan(name, (path,), problem=problem)]
    kind = kind_of(path)
    if kind is None:
        return [_refused(name, path, f"this is not a scan. Expected {FORMATS}.")]
    if kind == "dicom" and (slices := is_one_of_many(path, series_of(path.parent)[0])):
        reason = f"this is one of {slices} slices of a DICOM series. Pass the folder of the series."
        return [_refused(name, path, reason)]
    return [Scan(name, (path,), kind)]


def _scans_in(folder: Path) -> list[Scan]:
    """The scans in a folder, and the DICOM series in its subfolders."""
    files, series = _directly_in(folder)
    scans, passed = [*files, *series], []
    for below in _folders_below(folder):
        way = below.relative_to(folder)
        files, series = _directly_in(below, "_".join(way.parts))
        scans += series
        if not all(scan.source.is_dir() for scan in files):
            passed.append(str(way))
    if passed:
        names = ", ".join(passed[:3]) + (f" and {len(passed) - 3} more" if len(passed) > 3 else "")
        reason = f"in subfolders only DICOM is searched for, but {names} contain other scans. Pass those folders too."
        first = next((i for i, scan in enumerate(scans) if scan.problem is None), None)
        if first is None:
            return [*scans, _refused(_name(folder), folder, reason)]
        scans[first] = replace(scans[first], warnings=(f"{folder}: {reason}",))
    return scans


def _folders_below(folder: Path) -> Iterator[Path]:
    """Subfolders at any depth, in order, each once even if links form a ring."""
    seen = {os.path.realpath(folder)}
    for place, names, _ in os.walk(folder, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in list(names):
            below = Path(place, name)
            if (real := os.path.realpath(below)) in seen:
                names.remove(name)
            else:
                seen.add(real)
                yield below  # even if it cannot be read


def _directly_in(folder: Path, name: str = "") -> tuple[list[Scan], list[Scan]]:
    """The scans in single files of a folder, and its DICOM series; also those that cannot be read."""
    try:
        series, damaged = series_in(folder, name)
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        reason = f"the folder cannot be read ({error.strerror}). Check its permissions."
        return [], [_refused(_name(folder), folder, reason)]
    files = []
    for path in paths:
        kind = kind_of(path)
        if kind in ("nifti", "itk") and path.is_dir():
            files.append(_refused(_name(path), path, "is a folder, expected a file. Pass the files in it."))
        elif kind in ("nifti", "itk"):
            files.append(Scan(_name(path), (path,), kind))
        elif path.name.lower().endswith(FOREIGN):
            files.append(_refused(path.name, path, f"this format is not supported. Convert it to {FORMATS}."))
    return files, [
        *(Scan(name, tuple(slices), "dicom", series=digest) for name, slices, digest in series),
        *(_refused(file.name, file, DAMAGED) for file in damaged),
    ]


def refuse_equal_names(scans: Sequence[Scan]) -> list[Scan]:
    """The scans; those whose masks would get the same name have that as their problem."""
    by_name: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.problem is None:
            by_name[scan.name].append(scan)

    def checked(scan: Scan) -> Scan:
        rivals = ", ".join(str(other.source) for other in by_name.get(scan.name, ()) if other is not scan)
        if scan.problem is not None or not rivals:
            return scan
        problem = f"{scan.source}: its mask would be called {scan.name}.nii.gz, like that of {rivals}"
        return replace(scan, problem=f"{problem}. Rename one, or predict them into different folders.")

    return [checked(scan) for scan in scans]


def keep_names(scans: Sequence[Scan], earlier: Mapping[str, Mapping[str, Any]]) -> list[Scan]:
    """The scans, with DICOM series under the names of an earlier call and new ones under names that are free.

    A folder's only series has the folder's name, and several have numbers: without this, an added series would
    rename the first one. ``earlier`` has the manifest's entries by name.
    """
    given = {str(entry["series"]): name for name, entry in earlier.items() if entry.get("series")}
    kept = [replace(scan, name=given.get(scan.series, scan.name)) for scan in scans]
    taken = {scan.name for scan in kept if scan.series in given}
    # names of other new series, or of masks whose series is gone
    used = {scan.name for scan in kept} | {n for n, entry in earlier.items() if entry["status"] != "failed"}
    settled = []
    for scan in kept:
        if scan.series and scan.series not in given and scan.name in taken:
            base = re.sub(r"_series\d+$", "", scan.name)
            names = (f"{base}_series{number}" for number in count(1))
            scan = replace(scan, name=next(name for name in names if name not in used))
            used.add(scan.name)
        settled.append(scan)
    return refuse_equal_names(settled)
