"""Which scans a person means by files and folders, and what each will be called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medseg_supcon.inference._dicom import series_in
from medseg_supcon.inference._nifti import dimensions

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
FORMATS = "NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd), NRRD (.nrrd) or a DICOM series folder"

Kind = Literal["nifti", "itk", "dicom"]


@dataclass(frozen=True)
class Scan:
    """One scan to segment.

    Attributes:
        name: of its mask, ``<name>.nii.gz``: the file's name without its ending, or the DICOM folder's.
        files: one file, one per channel, or the slices of a DICOM series.
        kind: which reader takes it.
        problem: why it cannot be read at all (a sentence), or None.
    """

    name: str
    files: tuple[Path, ...]
    kind: Kind = "nifti"
    problem: str | None = None

    @property
    def source(self) -> Path:
        """What to call it in a message: the file, or the DICOM folder."""
        return self.files[0].parent if self.kind == "dicom" and len(self.files) > 1 else self.files[0]


def find_scans(paths: Iterable[str | Path], channels: int | Sequence[str] = 1) -> list[Scan]:
    """The scans that files and folders hold, in order; what is wrong with one stands in its ``problem``.

    A folder gives every scan directly in it (hidden and other files are passed over), the DICOM series in it,
    or, where it holds neither, the DICOM series of its subfolders. With several channels, 3-D files
    ``case_0000.nii.gz``, ``case_0001.nii.gz``, ... are one scan ``case``, as in nnU-Net. Two scans that would
    get one name are both refused.

    Args:
        paths: files and folders, mixed.
        channels: how many channels the model takes, or their names.

    Example:
        >>> find_scans(["/nowhere/scan.nii.gz"])[0].problem
        '/nowhere/scan.nii.gz: there is no such file or folder. Check the path.'
    """
    count = channels if isinstance(channels, int) else len(channels)
    found: dict[tuple[Path, ...], Scan] = {}
    for path in map(Path, paths):
        for scan in _scans_at(path):
            found.setdefault(tuple(file.absolute() for file in scan.files), scan)
    scans = _group_channels(list(found.values()), count) if count > 1 else list(found.values())
    return _refuse_equal_names(scans)


def scan_name(path: Path) -> str:
    """The file's name without its ending: ``a.b.nii.gz`` -> ``a.b``."""
    for ending in (*NIFTI, *ITK, ".dcm", ".ima"):
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return path.name


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith(NIFTI):
        return "nifti"
    if name.endswith(ITK):
        return "itk"
    return "dicom" if name.endswith((".dcm", ".ima")) else None


def _scans_at(path: Path) -> list[Scan]:
    name = scan_name(path.absolute())
    if not path.exists():
        return [_refused(name, path, "there is no such file or folder. Check the path.")]
    try:
        if path.is_dir():
            scans = _scans_in(path)
            if not scans:
                scans = [_refused(name, path, f"the folder holds no scan. Expected {FORMATS}.")]
            return scans
    except OSError as error:
        return [_refused(name, path, f"the folder cannot be read ({error.strerror}). Check its permissions.")]
    kind = _kind(path)
    if kind is None:
        return [_refused(name, path, f"this is not a scan. Expected {FORMATS}.")]
    slices = [files for _, files in series_in(path.parent) if path in files] if kind == "dicom" else []
    if slices and len(slices[0]) > 1:
        reason = f"this is one of {len(slices[0])} slices of a DICOM series. Give its folder."
        return [_refused(name, path, reason)]
    return [Scan(name, (path,), kind)]


def _scans_in(folder: Path) -> list[Scan]:
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    scans = [Scan(scan_name(p), (p,), kind) for p in entries if (kind := _kind(p)) in ("nifti", "itk")]
    others = any(p.is_file() and _kind(p) in ("dicom", None) for p in entries)
    series = (
        _dicom_scans(folder) if others and (not scans or any(_kind(p) == "dicom" for p in entries)) else []
    )
    if scans or series:
        return scans + series
    return [scan for p in entries if p.is_dir() for scan in _dicom_scans(p)]


def _dicom_scans(folder: Path) -> list[Scan]:
    return [Scan(name, tuple(files), "dicom") for name, files in series_in(folder)]


def _refused(name: str, path: Path, reason: str) -> Scan:
    return Scan(name, (path,), problem=f"{path}: {reason}")


def _group_channels(scans: list[Scan], count: int) -> list[Scan]:
    groups: dict[tuple[Path, str], dict[int, Scan]] = {}
    out: list[Scan | tuple[Path, str]] = []
    for scan in scans:
        match = re.fullmatch(r"(.+)_(\d{4})", scan.name)
        single = scan.problem is None and (
            scan.kind == "itk" or (scan.kind == "nifti" and _is_3d(scan.files[0]))
        )
        if match is None or not single:
            out.append(scan)
            continue
        key = (scan.files[0].parent, match[1])
        if key not in groups:
            out.append(key)
        groups.setdefault(key, {})[int(match[2])] = scan
    grouped = []
    for item in out:
        if isinstance(item, Scan):
            grouped.append(item)
            continue
        folder, name = item
        parts = groups[item]
        files = tuple(parts[i].files[0] for i in sorted(parts))
        problem = None
        if sorted(parts) != list(range(count)):
            have = ", ".join(f"{i:04d}" for i in sorted(parts))
            problem = (
                f"{folder / name}: the model takes {count} channels, {name}_0000 to {name}_{count - 1:04d}, "
                f"and there are {have}. Add what is missing or give one 4-D file."
            )
        grouped.append(Scan(name, files, next(iter(parts.values())).kind, problem))
    return grouped


def _is_3d(path: Path) -> bool:
    return len([n for n in dimensions(path)[3:] if n > 1]) == 0


def _refuse_equal_names(scans: list[Scan]) -> list[Scan]:
    counts = Counter(scan.name for scan in scans)
    refused = []
    for scan in scans:
        if counts[scan.name] > 1 and scan.problem is None:
            rivals = ", ".join(str(s.source) for s in scans if s.name == scan.name and s is not scan)
            problem = (
                f"{scan.source}: its mask would be called {scan.name}.nii.gz, as that of {rivals}. "
                "Rename one, or predict them into different folders."
            )
            scan = replace(scan, problem=problem)
        refused.append(scan)
    return refused
