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
from medseg_supcon.datasets.findings import Finding
from medseg_supcon.datasets.fingerprint import CaseFingerprint, measure_case
from medseg_supcon.datasets.labels import TOLERANCE
from medseg_supcon.errors import DataError
from medseg_supcon.scans import Volume, affine_issue, count_values, farthest_corner, read_nifti

Floats = npt.NDArray[np.float64]


@dataclass
class Looked:
    """What one case showed.

    Attributes:
        case: the case.
        findings: its faults.
        contents: (file, hash of the voxels) per channel.
        spacing: (3,) mm in RAS order; None without a readable image.
        extent: (3,) mm in RAS order.
        classes: names of the classes that its label map shows.
        fingerprint: what planning needs, of a labelled case without an error.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    contents: list[tuple[Path, bytes]] = field(default_factory=list)
    spacing: Floats | None = None
    extent: Floats | None = None
    classes: set[str] = field(default_factory=set)
    fingerprint: CaseFingerprint | None = None

    def tell(self, file: Path, code: str, sentence: str, severity: str = "error") -> None:
        """Add a finding on a file; the sentence follows the file's name."""
        self.findings.append(Finding(self.case.name, file, severity, code, f"{file}: {sentence}"))

    def read(self, file: Path) -> Volume | None:
        """The file's voxels; None, and a finding, if there is no reading it."""
        try:
            return read_nifti(file)
        except DataError as error:
            missing = "no such file" in str(error) or "does not exist" in str(error)
            code = "missing" if missing else "unreadable"
            self.findings.append(Finding(self.case.name, file, "error", code, str(error)))
            return None


def same_grid(
    looked: Looked, path: Path, volume: Volume, scan: Path, reference: Volume, tolerance: float, mismatch: str
) -> None:
    """Whether a label map, or a further channel, lies on the grid of the scan."""
    own, expected = volume.data.shape[:3], reference.data.shape[:3]
    if own != expected:
        looked.tell(
            path,
            "shape_mismatch",
            f"has {own} voxels, its scan {scan} has {expected}. Export it on the scan's grid.",
        )
        return
    farthest = farthest_corner(own, volume.affine, reference.affine)
    smallest = float(np.linalg.norm(reference.affine[:3, :3], axis=0).min())
    if not farthest <= tolerance * smallest:
        looked.tell(
            path,
            "affine_mismatch",
            f"lies up to {farthest:.3g} mm from its scan {scan}: their affines differ. Export it on its "
            f"grid, or give --allow-affine-mismatch if the voxels do match.",
            mismatch,
        )


def look_at_label(
    looked: Looked,
    path: Path,
    dataset: Dataset,
    scan: tuple[Path, Volume] | None,
    tolerance: float,
    mismatch: str,
) -> Volume | None:
    """List the faults of the label map at `path`, and return it; `scan` is its case's first usable image."""
    if path in looked.case.images:
        looked.tell(path, "label_is_image", "is named as scan and as label map. Correct the data list.")
        return None
    volume = looked.read(path)
    if volume is None:
        return None
    data = volume.data
    if data.ndim == 4:
        overlap = int(np.count_nonzero(np.count_nonzero(data, axis=3) > 1))
        what = f"its one-hot labels overlap in {overlap} voxels" if overlap else "it is one-hot"
        code = "overlapping_labels" if overlap else "one_hot_label"
        looked.tell(
            path, code, f"is 4-D (shape {data.shape}): {what}. Save one 3-D map with one value per class."
        )
        return None
    if data.ndim != 3 or data.size == 0:
        looked.tell(path, "not_3d", f"is {data.ndim}-D (shape {data.shape}), expected a 3-D label map.")
        return None
    for issue in volume.issues:
        if issue.code != "no_orientation":  # its scan has the same fault, or another grid
            looked.tell(path, issue.code, issue.sentence, issue.severity)
    if scan is not None:
        same_grid(looked, path, volume, *scan, tolerance, mismatch)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        looked.tell(
            path, "not_finite", "holds NaN or Inf. Set these voxels to the background or the ignore label."
        )
    _values(looked, path, data, dataset)
    return volume


def _values(looked: Looked, path: Path, data: npt.NDArray[Any], dataset: Dataset) -> None:
    counts = count_values(data)
    declared = dict(dataset.labels)
    if dataset.ignore_label is not None:
        declared["ignore"] = dataset.ignore_label
    stray = [v for v in counts if not any(abs(v - known) <= TOLERANCE for known in declared.values())]
    fractions = [value for value in stray if value != round(value)]
    known = ", ".join(f"{value:g}" for value in declared.values())
    if fractions:
        few = ", ".join(f"{value:.4g}" for value in fractions[:3])
        looked.tell(
            path,
            "fractional_label",
            f"holds {len(fractions)} values that are no class ({few}, ...); declared are {known}. It was "
            f"resampled with interpolation: resample it with nearest neighbour.",
        )
    if whole := [value for value in stray if value == round(value)]:
        few = ", ".join(f"{value:.0f} ({counts[value]} voxels)" for value in whole[:5])
        looked.tell(
            path,
            "undeclared_label",
            f"holds {few}, declared are {known}. Correct the label map, or declare the value under "
            f'"labels" in dataset.json.',
        )
    shown = {
        name for name, value in dataset.labels.items() if any(abs(v - value) <= TOLERANCE for v in counts)
    }
    looked.classes |= shown
    if not stray and not shown - {next(iter(dataset.labels))}:
        looked.tell(
            path,
            "empty_label",
            "no structure is drawn in it. Leave the case out if that is no intent.",
            "warning",
        )


def look_at(case: Case, dataset: Dataset, tolerance: float, mismatch: str) -> Looked:
    """Read a case once, list its faults, measure it if it is sound; `mismatch`: severity of differing affines."""
    looked = Looked(case)
    images = [(path, volume) for path in case.images if (volume := looked.read(path)) is not None]
    complete = len(images) == len(case.images)
    images = [(path, volume) for path, volume in images if _is_scan(looked, path, volume, dataset)]
    if complete and len(images) == len(case.images):
        _channels(looked, images, dataset)
    for path, volume in images:
        _intensities(looked, path, volume)
    usable = [(path, volume) for path, volume in images if _geometry(looked, path, volume)]
    for path, volume in usable[1:]:
        same_grid(looked, path, volume, *usable[0], tolerance, mismatch)
    if case.label is not None:
        label = look_at_label(looked, case.label, dataset, usable[0] if usable else None, tolerance, mismatch)
        if label is not None and all(finding.severity != "error" for finding in looked.findings):
            looked.fingerprint = measure_case(case, dataset, [volume for _, volume in images], label)
    return looked


def _is_scan(looked: Looked, path: Path, volume: Volume, dataset: Dataset) -> bool:
    shape = volume.data.shape
    if 0 in shape:
        looked.tell(path, "empty_image", f"has no voxels (shape {shape}). Export it again.")
    elif len(shape) < 3:
        looked.tell(path, "not_3d", f"is {len(shape)}-D (shape {shape}), expected a 3-D scan. Leave it out.")
    elif len(shape) > 4 or (len(shape) == 4 and (len(looked.case.images) > 1 or len(dataset.channels) == 1)):
        looked.tell(
            path,
            "not_3d",
            f"is {len(shape)}-D (shape {shape}), expected one 3-D scan. Save one volume of the series, or "
            f"declare its channels in dataset.json.",
        )
    else:
        return True
    return False


def _channels(looked: Looked, images: list[tuple[Path, Volume]], dataset: Dataset) -> None:
    found = sum(volume.data.shape[3] if volume.data.ndim == 4 else 1 for _, volume in images)
    if found != len(dataset.channels):
        looked.tell(
            images[0][0],
            "channels",
            f"the case has {found} channel{'s' * (found != 1)}, the data set {len(dataset.channels)} "
            f"({', '.join(dataset.channels)}). Add or remove channels, or correct the declaration.",
        )


def _intensities(looked: Looked, path: Path, volume: Volume) -> None:
    channels = list(volume.channels_first)
    for number, channel in enumerate(channels):
        where = f"channel {number} " if len(channels) > 1 else ""
        if channel.dtype.kind == "f" and not (finite := np.isfinite(channel)).all():
            bad = int(channel.size - np.count_nonzero(finite))
            looked.tell(
                path, "not_finite", f"{where}holds {bad} voxels that are NaN or Inf. Repair or leave it out."
            )
            continue
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            looked.tell(
                path,
                "constant_image",
                f"{where}has the value {low:g} everywhere: an empty scan. Leave it out.",
            )
            continue
        voxels = np.ascontiguousarray(channel.T, dtype=np.float32)  # NIfTI lies in Fortran order
        content = hashlib.blake2b(voxels.data, digest_size=16, person=b"voxels")
        content.update(repr(voxels.shape).encode())
        looked.contents.append((path, content.digest()))


def _geometry(looked: Looked, path: Path, volume: Volume) -> bool:
    shape, axes = volume.data.shape[:3], volume.affine[:3, :3]
    issue = affine_issue(volume.affine)
    issues = [*volume.issues, *([issue] if issue else [])]
    for one in issues:
        looked.tell(path, one.code, one.sentence, one.severity)
    if any(one.code in ("bad_affine", "unit") for one in issues):
        return False
    spacing = np.linalg.norm(axes, axis=0)
    order = np.argsort(nibabel.orientations.io_orientation(volume.affine)[:, 0])
    if looked.spacing is None:
        looked.spacing, looked.extent = spacing[order], (spacing * shape)[order]
        if 1 in shape:
            looked.tell(
                path, "single_slice", f"is a single slice (shape {shape}). Training is in 3-D.", "warning"
            )
    return True
