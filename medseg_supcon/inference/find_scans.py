"""Which scans files and folders contain, and the names of their masks."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from medseg_supcon.errors import DataError
from medseg_supcon.scans import (
    DICOM_ENDINGS,
    ITK_ENDINGS,
    NIFTI_ENDINGS,
    Kind,
    Scan,
    Series,
    is_one_of_many,
    looks_like_dicom,
    not_a_file,
    scan_header,
    series_in,
)


def group_channels(scans: list[Scan], count: int) -> list[Scan]:
    """Files ``case_0000``, ``case_0001``, ... of a folder as one scan ``case``; what does not fit is its problem."""
    groups: dict[tuple[str, str], list[tuple[int, Scan]]] = {}
    out: list[Scan | tuple[str, str]] = []
    for scan in scans:
        match = re.fullmatch(r"(.+)_(\d{4})", scan.name)
        if match is None or scan.problem is not None or not _is_single(scan):
            out.append(scan)
            continue
        key = (os.path.realpath(scan.files[0].parent), match[1])
        if key not in groups:
            out.append(key)
        groups.setdefault(key, []).append((int(match[2]), scan))
    return [_one(item[1], groups[item], count) if isinstance(item, tuple) else item for item in out]


def _one(name: str, numbered: list[tuple[int, Scan]], count: int) -> Scan:
    numbered.sort(key=lambda part: part[0])
    numbers, parts = [number for number, _ in numbered], [scan for _, scan in numbered]
    whole = parts[0].source.parent / name
    problem = None
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        rivals = ", ".join(scan.source.name for n, scan in numbered if n == twice[0])
        problem = f"{whole}: there are two files for channel {twice[0]:04d} ({rivals}). Keep one."
    elif len({scan.kind for scan in parts}) > 1:
        names = ", ".join(scan.source.name for scan in parts)
        problem = f"{whole}: all channels must have the same format, found {names}. Convert them to NIfTI."
    elif numbers != list(range(count)):
        have = ", ".join(f"{number:04d}" for number in numbers)
        problem = (
            f"{whole}: the model needs {count} channels, {name}_0000 to {name}_{count - 1:04d}, "
            f"but found {have}. Add the missing files, or use one 4-D file."
        )
    return replace(parts[0], name=name, files=tuple(scan.files[0] for scan in parts), problem=problem)


def _is_single(scan: Scan) -> bool:
    """Whether a file contains one channel; also if it cannot be read (reading it will say why)."""
    if scan.kind == "dicom":
        return False
    try:
        return len(scan_header(scan)[0]) <= 3
    except DataError:
        return True


# Formats that are not read: in a folder they are refused by name; notes and tables are passed over.
FOREIGN = (
    ".hdr", ".mgh", ".mgz", ".mnc", ".par", ".head", ".gipl", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip",
    ".mha.gz", ".nrrd.gz", ".dcm.gz", ".gipl.gz",
)  # fmt: skip
FORMATS = "NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd), NRRD (.nrrd) or a DICOM series folder"


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
    count = channels if isinstance(channels, int) else len(channels)
    found: dict[tuple[Path, ...], Scan] = {}
    folders: dict[Path, Series] = {}  # each is looked through once
    for path in map(Path, paths):
        for scan in _scans_at(path, folders):
            # A link to a file has a name of its own, a link to a folder gives its files none.
            key = tuple(Path(os.path.realpath(file.parent), file.name) for file in scan.files)
            found.setdefault(key, scan)
    scans = group_channels(list(found.values()), count) if count > 1 else list(found.values())
    return refuse_equal_names(scans)


def scan_name(path: Path) -> str:
    """The file's name without its ending: ``a.b.nii.gz`` -> ``a.b``."""
    for ending in (*NIFTI_ENDINGS, *ITK_ENDINGS, *DICOM_ENDINGS):
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return path.name


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return "nifti"
    if name.endswith(ITK_ENDINGS):
        return "itk"
    return "dicom" if looks_like_dicom(path) else None


def _scans_at(path: Path, folders: dict[Path, Series]) -> list[Scan]:
    # Not resolve(): the mask is called as the link, not as what it leads to; but ".." has no name.
    name = scan_name(Path(os.path.abspath(path))) or "scan"  # noqa: PTH100
    problem = not_a_file(path)
    if problem is not None and "is a folder" not in problem:
        return [Scan(name, (path,), problem=problem)]
    if problem is not None:
        scans = _scans_in(path)
        return scans or [_refused(name, path, f"the folder contains no scans. Expected {FORMATS}.")]
    kind = _kind(path)
    if kind is None:
        return [_refused(name, path, f"this is not a scan. Expected {FORMATS}.")]
    if kind == "dicom":
        if path.parent not in folders:
            folders[path.parent] = series_in(path.parent)[0]
        if slices := is_one_of_many(path, folders[path.parent]):
            reason = f"this is one of {slices} slices of a DICOM series. Pass the folder of the series."
            return [_refused(name, path, reason)]
    return [Scan(name, (path,), kind)]


def _scans_in(folder: Path) -> list[Scan]:
    """The scans in a folder, and the DICOM series in its subfolders."""
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        name = folder.resolve().name
        return [_refused(name, folder, f"the folder cannot be read ({error.strerror}). Check its permissions.")]
    scans = []
    for path in entries:
        kind = _kind(path) if not path.is_dir() else None
        if kind in ("nifti", "itk"):
            scans.append(Scan(scan_name(path), (path,), kind))
        elif path.is_dir() and path.name.lower().endswith((*NIFTI_ENDINGS, *ITK_ENDINGS)):
            scans.append(_refused(scan_name(path), path, "is a folder, expected a file. Pass the files in it."))
        elif path.name.lower().endswith(FOREIGN):
            scans.append(_refused(path.name, path, f"this format is not supported. Convert it to {FORMATS}."))
    scans += _dicom_scans(folder)
    passed: list[str] = []
    for below in _folders_below(folder):
        way = below.relative_to(folder)
        scans += _dicom_scans(below, "_".join(way.parts))
        if _holds_files(below):
            passed.append(str(way))
    if passed:
        names = ", ".join(passed[:3]) + (f" and {len(passed) - 3} more" if len(passed) > 3 else "")
        reason = f"in subfolders only DICOM is searched for, but {names} contain other scans. Pass those folders too."
        first = next((i for i, scan in enumerate(scans) if scan.problem is None), None)
        if first is None:
            return [*scans, _refused(folder.resolve().name or "scan", folder, reason)]
        scans[first] = replace(scans[first], warnings=(f"{folder}: {reason}",))
    return scans


def _folders_below(folder: Path) -> Iterator[Path]:
    """Subfolders at any depth, in order, each once though links may make rings."""
    seen = {os.path.realpath(folder)}
    for place, names, _ in os.walk(folder, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in list(names):
            real = os.path.realpath(os.path.join(place, name))  # noqa: PTH118
            if real in seen:
                names.remove(name)
                continue
            seen.add(real)
            yield Path(place, name)  # even if it cannot be read


def _holds_files(folder: Path) -> bool:
    """Whether a folder contains scans that are not DICOM, of a format that is read or not."""
    try:
        return any(
            path.name.lower().endswith((*NIFTI_ENDINGS, *ITK_ENDINGS, *FOREIGN))
            and not path.name.startswith(".")
            and path.is_file()
            for path in folder.iterdir()
        )
    except OSError:
        return False


def _dicom_scans(folder: Path, name: str = "") -> list[Scan]:
    try:
        series, damaged = series_in(folder, name)
    except OSError as error:
        reason = f"the folder cannot be read ({error.strerror}). Check its permissions."
        return [_refused(folder.name, folder, reason)]
    bad = "cannot be read as DICOM. It is damaged, cut short or contains no image; a slice of its series may be missing now."
    return [
        *(Scan(name, tuple(files), "dicom", series=digest) for name, files, digest in series),
        *(_refused(file.name, file, bad) for file in damaged),
    ]


def _refused(name: str, path: Path, reason: str) -> Scan:
    return Scan(name, (path,), problem=f"{path}: {reason}")


def refuse_equal_names(scans: Sequence[Scan]) -> list[Scan]:
    """The scans; those whose masks would get the same name have that as their problem."""
    counts = Counter(scan.name for scan in scans if scan.problem is None)
    refused = []
    for scan in scans:
        if counts[scan.name] > 1 and scan.problem is None:
            rivals = ", ".join(
                str(s.source) for s in scans if s.name == scan.name and s is not scan and s.problem is None
            )
            problem = (
                f"{scan.source}: its mask would be called {scan.name}.nii.gz, like that of {rivals}. "
                "Rename one, or predict them into different folders."
            )
            scan = replace(scan, problem=problem)
        refused.append(scan)
    return refused


def keep_names(scans: Sequence[Scan], earlier: Mapping[str, Mapping[str, Any]]) -> list[Scan]:
    """The scans, with DICOM series under the names of an earlier call and new ones under names that are free.

    A folder's only series has the folder's name, and several have numbers: without this, an added series would
    rename the first one.

    Args:
        scans: from `find_scans`.
        earlier: name -> entry of the manifest.
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
