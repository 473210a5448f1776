"""The faults of one case: its images, and whether label map and images fit each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets.dataset import Case, Dataset
from medseg_supcon.datasets.fingerprints import CaseFingerprint, measure_case
from medseg_supcon.datasets.labels import TOLERANCE, reorient, value_text
from medseg_supcon.errors import DataError
from medseg_supcon.scans import Volume, affine_issue, count_values, farthest_corner, outliers, read_nifti
from medseg_supcon.text import counted

NEAR = 0.01  # voxels by which a corner of a label map's grid may be off its scan's
MOST_VALUES = 64  # undeclared values above which a label map looks like a scan
SAMPLE = 100_000  # voxels that give the usual intensities of a scan

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """One fault or doubt, with a short name of its kind for machines, e.g. "affine_mismatch"."""

    case: str  # its name; empty for the whole data set
    file: Path | None  # None if it is not a single file
    severity: str  # "error" (training refuses) or "warning"
    code: str
    message: str  # a sentence: the file, what was expected, what was found, how to fix it


@dataclass
class CaseReport:
    """What reading one case showed."""

    case: Case
    findings: list[Finding] = field(default_factory=list)
    contents: list[tuple[Path, bytes]] = field(default_factory=list)  # file and hash of the voxels, per channel
    intensities: list[tuple[float, float, float]] = field(default_factory=list)  # lowest, 0.5 and 99.5 %, per channel
    spacing: Floats | None = None  # (3,) mm in RAS order
    extent: Floats | None = None  # (3,) mm in RAS order
    classes: set[str] = field(default_factory=set)  # that the label map shows
    fingerprint: CaseFingerprint | None = None  # of a labelled case without an error

    def add(self, file: Path, code: str, sentence: str, severity: str = "error") -> None:
        """Add a finding on a file; the sentence follows the file's name."""
        self.findings.append(Finding(self.case.name, file, severity, code, f"{file}: {sentence}"))

    def read(self, file: Path) -> Volume | None:
        """The file's voxels; None, and a finding, if it cannot be read."""
        try:
            return read_nifti(file)
        except DataError as error:
            missing = "no such file" in str(error) or "does not exist" in str(error)
            code = "missing" if missing else "unreadable"
            self.findings.append(Finding(self.case.name, file, "error", code, str(error)))
            return None


def case_report(case: Case, dataset: Dataset, mismatch: str) -> CaseReport:
    """Read a case once, list its faults, measure it if it has none; `mismatch`: severity of differing affines."""
    report = CaseReport(case)
    images = [(path, volume) for path in case.images if (volume := report.read(path)) is not None]
    complete = len(images) == len(case.images)
    images = [(path, volume) for path, volume in images if _is_scan(report, path, volume, dataset)]
    number, names = sum(len(volume.channels_first) for _, volume in images), dataset.channels
    if complete and len(images) == len(case.images) and number != len(names):
        sentence = f"the case has {counted(number, 'channel')}, the data set {len(names)} ({', '.join(names)})"
        report.add(case.images[0], "channels", f"{sentence}. Add or remove channels, or correct the declaration.")
    for path, volume in images:
        _check_intensities(report, path, volume)
    usable = [(path, volume) for path, volume in images if _check_geometry(report, path, volume)]
    for path, volume in usable[1:]:
        _check_grid(report, path, volume, usable[0], mismatch)
    if case.label is not None:
        label = _check_label(report, case.label, dataset, usable[0] if usable else None, mismatch)
        if label is not None and all(finding.severity != "error" for finding in report.findings):
            report.fingerprint = measure_case(case, dataset, [volume for _, volume in images], label)
    return report


def _is_scan(report: CaseReport, path: Path, volume: Volume, dataset: Dataset) -> bool:
    shape = volume.data.shape
    one_channel = len(report.case.images) > 1 or len(dataset.channels) == 1
    code, what = "not_3d", f"is {len(shape)}-D (shape {shape}), expected"
    if 0 in shape:
        code, what = "empty_image", f"has no voxels (shape {shape}). Export it again."
    elif len(shape) < 3:
        what += " a 3-D scan. Leave it out."
    elif len(shape) > 4 or (len(shape) == 4 and one_channel):
        what += " one 3-D scan. Save one volume of the series, or declare its channels in dataset.json."
    else:
        return True
    report.add(path, code, what)
    return False


def _check_intensities(report: CaseReport, path: Path, volume: Volume) -> None:
    for number, channel in enumerate(volume.channels_first):
        where = f"channel {number} " if len(volume.channels_first) > 1 else ""
        with np.errstate(over="ignore"):
            voxels = np.ascontiguousarray(channel.T, dtype=np.float32)  # NIfTI is stored in Fortran order
        if bad := int(np.count_nonzero(~np.isfinite(voxels))):
            sentence = f"{where}holds {bad} voxels that are NaN, Inf or beyond 3.4e38. Repair or leave it out."
            report.add(path, "not_finite", sentence)
            continue
        low = float(channel.min())
        if low == float(channel.max()):
            report.add(path, "constant_image", f"{where}has the value {low:g} everywhere: an empty scan. Leave it out.")
            continue
        if (outlier := outliers(voxels)) is not None:
            sentence = (
                f"{where}has {outlier[1]} voxels far outside all others (up to {outlier[0]:.3g}): after normalisation the "
                "others hardly differ. Repair these voxels, or leave the case out."
            )
            report.add(path, "outlier_voxels", sentence, "warning")
        sample = voxels.ravel()[:: max(1, voxels.size // SAMPLE)]
        usual = np.percentile(sample, [0.5, 99.5]).astype(np.float64)
        report.intensities.append((low, float(usual[0]), float(usual[1])))
        content = hashlib.blake2b(voxels.data, digest_size=16, person=b"voxels")
        content.update(repr(voxels.shape).encode())
        report.contents.append((path, content.digest()))


def _check_geometry(report: CaseReport, path: Path, volume: Volume) -> bool:
    shape, axes = volume.data.shape[:3], volume.affine[:3, :3]
    issues = list(filter(None, (*volume.issues, affine_issue(volume.affine))))
    for issue in issues:
        report.add(path, issue.code, issue.sentence, issue.severity)
    if any(issue.code in ("bad_affine", "unit") for issue in issues):
        return False
    spacing = np.linalg.norm(axes, axis=0)
    order = np.argsort(nibabel.orientations.io_orientation(volume.affine)[:, 0])
    if report.spacing is None:
        report.spacing, report.extent = spacing[order], (spacing * shape)[order]
        if 1 in shape:
            report.add(path, "single_slice", f"is a single slice (shape {shape}). Training is in 3-D.", "warning")
    return True


def _check_grid(report: CaseReport, path: Path, volume: Volume, scan: tuple[Path, Volume], mismatch: str) -> None:
    """Whether a label map, or a further channel, is on the grid of the scan."""
    file, reference = scan
    own, expected = volume.data.shape[:3], reference.data.shape[:3]
    near = NEAR * float(np.linalg.norm(reference.affine[:3, :3], axis=0).min())
    farthest = farthest_corner(own, volume.affine, reference.affine)
    if own == expected and farthest <= near:
        return
    turned, affine = reorient(volume.data, volume.affine, reference.affine)
    if turned.shape[:3] == expected and farthest_corner(expected, affine, reference.affine) <= near:
        axes = ["".join(nibabel.aff2axcodes(one.affine)) for one in (volume, reference)]
        sentence = (
            f"is at the place of its scan {file}, but its axes run along {axes[0]}, those of the scan along {axes[1]}. "
            "Save it with the axes of the scan (nibabel's as_reoriented does)."
        )
        report.add(path, "turned", sentence)
    elif own != expected:
        sentence = f"has {own} voxels, its scan {file} has {expected}. Export it on the scan's grid."
        report.add(path, "shape_mismatch", sentence)
    else:
        sentence = (
            f"is up to {farthest:.3g} mm away from its scan {file}: their affines differ. Export it on the scan's "
            "grid, or give --allow-affine-mismatch if the voxels do match."
        )
        report.add(path, "affine_mismatch", sentence, mismatch)


def _check_label(
    report: CaseReport, path: Path, dataset: Dataset, scan: tuple[Path, Volume] | None, mismatch: str
) -> Volume | None:
    """List the faults of the label map at `path` and return it; `scan` is its case's first usable image."""
    if path in report.case.images:
        report.add(path, "label_is_image", "is named as scan and as label map. Correct the data list.")
        return None
    if (volume := report.read(path)) is None:
        return None
    data = volume.data
    if data.ndim == 4:
        overlap = int(np.count_nonzero(np.count_nonzero(data, axis=3) > 1))
        what = f"its one-hot labels overlap in {overlap} voxels" if overlap else "it is one-hot"
        code = "overlapping_labels" if overlap else "one_hot_label"
        report.add(path, code, f"is 4-D (shape {data.shape}): {what}. Save one 3-D map with one value per class.")
        return None
    if data.ndim != 3 or data.size == 0:
        report.add(path, "not_3d", f"is {data.ndim}-D (shape {data.shape}), expected a 3-D label map.")
        return None
    for issue in volume.issues:
        if issue.code != "no_orientation":  # its scan has the same fault, or another grid
            report.add(path, issue.code, issue.sentence, issue.severity)
    if scan is not None:
        _check_grid(report, path, volume, scan, mismatch)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        report.add(path, "not_finite", "holds NaN or Inf. Set these voxels to the background or the ignore label.")
    _check_values(report, path, data, dataset)
    return volume


def _check_values(report: CaseReport, path: Path, data: npt.NDArray[Any], dataset: Dataset) -> None:
    counts = count_values(data)
    declared = list(dataset.labels.values())
    declared += [] if dataset.ignore_label is None else [dataset.ignore_label]
    stray = [v for v in counts if not any(abs(v - known) <= TOLERANCE for known in declared)]
    known = ", ".join(map(value_text, declared[:20])) + ", ..." * (len(declared) > 20)
    if stray:
        fractional = [value for value in stray if value != round(value)]
        few = ", ".join(f"{value_text(value)} ({counts[value]} voxels)" for value in (fractional or stray)[:5])
        code = "fractional_label" if fractional else "undeclared_label"
        sentence = f"holds {few}, declared are {known}. {_why_stray(path, stray, bool(fractional))}"
        report.add(path, code, sentence)
    classes = dataset.labels.items()
    report.classes |= {name for name, value in classes if any(abs(v - value) <= TOLERANCE for v in counts)}
    if not stray and not report.classes - {next(iter(dataset.labels))}:
        sentence = "no structure is drawn in it. Leave the case out if that is not intended."
        report.add(path, "empty_label", sentence, "warning")


def _why_stray(path: Path, stray: list[float], fractional: bool) -> str:
    """Why a label map may hold undeclared values, and how to fix it."""
    stored = nibabel.load(path).dataobj
    if len(stray) > MOST_VALUES:
        return (
            f"With {len(stray)} such values it looks like a scan (are scan and label map swapped in the list?) or was "
            "resampled with interpolation (use nearest neighbour)."
        )
    if (stored.slope, stored.inter) != (1, 0):
        return (
            f"Its header scales the stored values (scl_slope {stored.slope:.6g}, scl_inter {stored.inter:g}). Save "
            "the class values as whole numbers, without scaling."
        )
    if fractional:
        return "If it was resampled, use nearest neighbour; if these are probabilities, save class values."
    return 'Correct the label map, or declare the value under "labels" in dataset.json.'
