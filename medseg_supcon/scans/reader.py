"""Any scan to voxels and a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from medseg_supcon.errors import DataError
from medseg_supcon.scans.dicom import DICOM_ENDINGS, check_series, looks_like_dicom, read_dicom
from medseg_supcon.scans.itk import ITK_ENDINGS, read_itk, read_itk_header
from medseg_supcon.scans.nifti import NIFTI_ENDINGS, not_a_file, read_header, read_nifti
from medseg_supcon.scans.volume import Affine, Volume, affine_issue, as_float32, same_grid

Kind = Literal["nifti", "itk", "dicom"]
# Errors for a training, which must read scan and label map in one place. A mask is on its scan's own voxels.
WARNED_OF = ("unit", "two_places")


@dataclass(frozen=True)
class Scan:
    """One scan to segment."""

    name: str  # of its mask, <name>.nii.gz: the file's name without its ending, or the DICOM folder's
    files: tuple[Path, ...]  # one file, one per channel, or the slices of a DICOM series
    kind: Kind = "nifti"
    problem: str | None = None  # why it cannot be read at all, as a sentence
    series: str = ""  # of a DICOM folder: what tells its series from the others
    warnings: tuple[str, ...] = ()  # about the folder it was found in

    @property
    def source(self) -> Path:
        """What to call it in a message: the file, or the DICOM folder."""
        return self.files[0].parent if self.kind == "dicom" and len(self.files) > 1 else self.files[0]


def stem(path: str | Path) -> str:
    """File name without the ending of a scan: ``stem("x/a.b.nii.gz") == "a.b"``."""
    name, endings = Path(path).name, (*NIFTI_ENDINGS, *ITK_ENDINGS, *DICOM_ENDINGS)
    ending = next((e for e in endings if name.lower().endswith(e) and len(name) > len(e)), "")
    return name[: len(name) - len(ending)]


def kind_of(path: Path) -> Kind | None:
    """The format of a file, by its ending or DICOM's first bytes; None if it is none that is read."""
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return "nifti"
    if name.endswith(ITK_ENDINGS):
        return "itk"
    return "dicom" if looks_like_dicom(path) else None


def read_scan(scan: Scan, channels: int) -> Volume:
    """A scan for a model of so many channels: finite float32 voxels on a valid grid; DataError if it is unusable."""
    for problem in (scan.problem, *map(not_a_file, scan.files)):
        if problem is not None:
            raise DataError(problem)
    read = read_nifti if scan.kind == "nifti" else read_itk
    if scan.kind == "dicom":
        volumes = [_usable(read_dicom(scan.files), scan.source)]
    else:
        volumes = [_usable(read(file), file) for file in scan.files]
    first = volumes[0]
    for file, volume in zip(scan.files[1:], volumes[1:], strict=False):
        if volume.data.shape != first.data.shape or not same_grid(first.grid.shape, first.affine, volume.affine):
            raise DataError(f"{file}: its shape or affine differs from {scan.files[0]}'s. Channels must share a grid.")
    count = sum(len(volume.channels_first) for volume in volumes)
    if count != channels:
        found, cure = f"{count} channels", "Pass one 4-D file, channels last, or 3-D files NAME_0000, NAME_0001, ..."
        if channels == 1:
            found, cure = f"{count} volumes (a time series or several channels)", "Split it and pass one volume."
        raise DataError(f"{scan.source}: contains {found}, but the model takes {channels}. {cure}")
    if len(volumes) == 1:
        return first
    return replace(first, data=np.moveaxis(np.concatenate([v.channels_first for v in volumes]), 0, -1))


def is_mask_of(mask: Path, scan: Scan) -> bool:
    """Whether a mask has the grid of a scan, by the headers; True if one cannot be read (reading it will say why)."""
    try:
        shape, affine = read_header(mask)
        expected, place = scan_header(scan)
    except Exception:  # nibabel and SimpleITK raise a dozen kinds for broken headers
        return True
    return (*shape, 1, 1)[:3] == (*expected, 1, 1)[:3] and same_grid(expected, place, affine)


def scan_header(scan: Scan) -> tuple[tuple[int, ...], Affine]:
    """Shape (X, Y, Z) or (X, Y, Z, C), and affine to RAS+ mm, of a scan's first file or its series, without voxels."""
    if scan.kind == "dicom":
        frames, affine = check_series(scan.files)
        return (*frames[0].size[:2], len(frames)), affine
    return (read_header if scan.kind == "nifti" else read_itk_header)(scan.files[0])


def _usable(volume: Volume, file: Path) -> Volume:
    shape = volume.data.shape
    if 0 in shape or len(shape) not in (3, 4):
        raise DataError(f"{file}: expected a 3-D scan, or channels in a fourth axis: {shape}. 2-D images are not read.")
    for issue in (affine_issue(volume.affine), *volume.issues):
        if issue is not None and issue.severity == "error" and issue.code not in WARNED_OF:
            raise DataError(f"{file}: {issue.sentence}")
    return replace(volume, data=as_float32(volume.data, file))
