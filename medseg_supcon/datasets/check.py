"""`check_dataset`: reads every file once and reports problems of single cases and of the whole data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets.dataset import Case, Dataset, normalisation, patient_on_both_sides
from medseg_supcon.datasets.fingerprints import CaseFingerprint, geometry, measure_case
from medseg_supcon.datasets.labels import is_near, reorient, stray_values, value_text
from medseg_supcon.datasets.regions import Regions, mask_labels, values_of
from medseg_supcon.errors import DataError
from medseg_supcon.scans import Volume, affine_issue, count_values, farthest_corner, in_parallel, outliers, read_nifti
from medseg_supcon.text import counted

NEAR = 0.01  # voxels by which a corner of a label map's grid may be off its scan's
SAMPLE = 100_000  # voxels that give the usual intensities of a scan
OUTLIER = 2.5  # factor from the median, of voxel size and field of view
FEWEST_FOR_OUTLIERS = 4
INTENSITY_OUTLIER = {"ct": 5.0, "nonorm": 5.0, "rgb_to_0_1": 5.0}  # factor from the median range
MR_OUTLIER = 10_000.0  # of channels that are normalised per scan: MR scanners differ by factors of 500
LEAST_CT_RANGE = 50.0  # HU; scans scaled to -1..1 have less
CT_SHIFT = 300.0  # HU by which both ends of a scan's range are off
RARE = {
    "absent_class": "no label map contains the class {}, so it cannot be learnt. Check its value, or remove the class.",
    "class_not_trained": "only validation cases contain the class {}, so it cannot be learnt. Use one of them for training.",
    "class_in_one_case": "only one case contains the class {}. If it is used for validation, the class cannot be learnt.",
}


@dataclass(frozen=True)
class Finding:
    """One fault or doubt, with a short name of its kind for machines, e.g. "affine_mismatch"."""

    case: str  # its name; empty for the whole data set
    file: Path | None  # None if it is not a single file
    severity: str  # "error" (training refuses) or "warning"
    code: str
    message: str  # a sentence: the file, what was expected, what was found, how to fix it


@dataclass(frozen=True)
class Report:
    """All findings on a data set: errors first, then in the order of the cases."""

    dataset: Dataset
    findings: tuple[Finding, ...]
    fingerprints: Mapping[Case, CaseFingerprint]  # of labelled cases without an error

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that prevent training; the others are warnings."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def has_errors(self) -> bool:
        """Whether training must refuse."""
        return bool(self.errors)

    def summary(self) -> str:
        """One closing sentence."""
        cases, bare = len(self.dataset.cases), len(self.dataset.cases) - len(self.dataset.labelled)
        errors, warnings = len(self.errors), len(self.findings) - len(self.errors)
        found = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}" if self.findings else "no problems found"
        without = f", {bare} without label map" if bare else ""
        return f"{self.dataset.name}: {counted(cases, 'case')} checked{without}, {found}."

    def __str__(self) -> str:
        """The findings, one per line, and the closing sentence."""
        lines = [f"{finding.severity}: {finding.case or '(all)'}: {finding.message}" for finding in self.findings]
        return "\n".join([*lines, self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        findings = [{**asdict(f), "file": None if f.file is None else str(f.file)} for f in self.findings]
        counts = {"cases": len(self.dataset.cases), "labelled": len(self.dataset.labelled), "errors": len(self.errors)}
        counts["warnings"] = len(self.findings) - counts["errors"]
        return {"dataset": self.dataset.name, "root": str(self.dataset.root), **counts, "findings": findings}


@dataclass
class CaseReport:
    """The result of reading one case."""

    case: Case
    findings: list[Finding] = field(default_factory=list)
    contents: dict[bytes, Path] = field(default_factory=dict)  # hash of the voxels -> file, per channel
    intensities: list[tuple[float, float, float]] = field(default_factory=list)  # lowest, 0.5 and 99.5 %, per channel
    spacing: tuple[float, ...] = ()  # (3,) mm in RAS order, of the first usable image
    shape: tuple[int, ...] = ()  # (3,) its voxels in RAS order
    classes: set[str] = field(default_factory=set)  # that the label map shows
    fingerprint: CaseFingerprint | None = None  # of a labelled case without an error

    def add(self, file: Path, code: str, sentence: str, severity: str = "error") -> None:
        """Add a finding on a file; the sentence follows the file's name."""
        self.findings.append(Finding(self.case.name, file, severity, code, f"{file}: {sentence}"))


def check_dataset(dataset: Dataset, *, allow_affine_mismatch: bool = False) -> Report:
    """What is wrong with a data set, case by case. Never raises for a bad file: it is a finding.

    Errors: files that are missing, unreadable, 2-D or 4-D; shapes, axes or affines of scan and label map that differ (a
    warning if `allow_affine_mismatch`: the scan's affine is then the right one); NaN or Inf; a constant image; undeclared,
    fractional or overlapping labels; only empty label maps; differing channel counts; one image in two cases; an invalid
    or sheared affine; a header in metres or microns, or with two voxel sizes.

    Warnings: what reading the data set did not use; an empty label map; a class that is in no case, in one case only, or in
    no training case; a single slice; a qform that disagrees with the sform; a header without orientation; outliers of
    spacing, size and intensity; CT that is not in Hounsfield units; a patient with scans on both sides of the split.
    """
    mismatch = "warning" if allow_affine_mismatch else "error"
    reports = in_parallel(lambda case: _case_report(case, dataset, mismatch), dataset.cases)
    _find_duplicates(reports)
    _find_geometry_outliers(reports)
    of_all = [("data_list", warning) for warning in dataset.warnings]
    of_all += [*_intensity_outliers(dataset, reports), *_rare_classes(dataset, reports), *_lost_regions(dataset)]
    if (mixed := patient_on_both_sides(dataset)) is not None:
        of_all.append(("patient_on_both_sides", mixed))
    findings = [finding for report in reports for finding in report.findings]
    findings += [Finding("", None, "error" if c == "no_structure" else "warning", c, message) for c, message in of_all]
    order = {case.name: number for number, case in enumerate(dataset.cases)}
    findings.sort(key=lambda f: (f.severity != "error", order.get(f.case, len(order))))
    measured = {report.case: report.fingerprint for report in reports if report.fingerprint is not None}
    return Report(dataset, tuple(findings), measured)


def _case_report(case: Case, dataset: Dataset, mismatch: str) -> CaseReport:
    """Read a case once, list its faults, measure it if it has none; `mismatch`: severity of differing affines."""
    report, names = CaseReport(case), dataset.channels
    most = 3 if len(case.images) > 1 or len(names) == 1 else 4
    images = [(path, volume) for path in case.images if (volume := _read(report, path, most)) is not None]
    number = sum(len(volume.channels_first) for _, volume in images)
    if len(images) == len(case.images) and number != len(names):
        sentence = f"the case has {counted(number, 'channel')}, but the data set has {len(names)} ({', '.join(names)})"
        report.add(case.images[0], "channels", f"{sentence}. Add or remove channels, or correct their names.")
    for path, volume in images:
        _check_intensities(report, path, volume)
    usable = [image for image in images if _has_geometry(report, *image)]
    for image in usable[1:]:
        _check_grid(report, image, usable[0], mismatch)
    label = None if case.label is None else _read_label(report, case.label)
    if case.label is not None and label is not None:
        if usable:
            _check_grid(report, (case.label, label), usable[0], mismatch)
        _check_values(report, case.label, label.data, dataset)
        if all(finding.severity != "error" for finding in report.findings):
            report.fingerprint = measure_case(case, dataset, [volume for _, volume in images], label)
    return report


def _read(report: CaseReport, file: Path, most: int) -> Volume | None:
    """The voxels of a file with 3 to `most` axes; None, and a finding, if it cannot be read or has others."""
    try:
        volume = read_nifti(file)
    except DataError as error:
        missing = "no such file" in str(error) or "does not exist" in str(error)
        code = "missing" if missing else "unreadable"
        report.findings.append(Finding(report.case.name, file, "error", code, str(error)))
        return None
    shape = volume.data.shape
    if 0 in shape:
        report.add(file, "empty_image", f"has no voxels (shape {shape}). Export it again.")
        return None
    if not 3 <= len(shape) <= most:
        series = "Save one volume of the series, or declare its channels in dataset.json."
        cure = series if len(shape) > 3 else "Leave the case out."
        report.add(file, "not_3d", f"is {len(shape)}-D (shape {shape}), expected one 3-D volume. {cure}")
        return None
    return volume


def _check_intensities(report: CaseReport, path: Path, volume: Volume) -> None:
    for number, channel in enumerate(volume.channels_first):
        where = f"channel {number} " if len(volume.channels_first) > 1 else ""
        with np.errstate(over="ignore"):
            voxels = np.ascontiguousarray(channel.T, dtype=np.float32)  # NIfTI is stored in Fortran order
        if bad := int(np.count_nonzero(~np.isfinite(voxels))):
            report.add(path, "not_finite", f"{where}contains {bad} voxels that are NaN or beyond 3.4e38. Repair it.")
            continue
        low = float(channel.min())
        if low == float(channel.max()):
            report.add(
                path, "constant_image", f"{where}has the value {low:g} everywhere, so it is empty. Leave it out."
            )
            continue
        if (outlier := outliers(voxels)) is not None:
            found = f"{where}has {outlier[1]} voxels far outside all others (up to {outlier[0]:.3g})"
            cure = "after normalisation the others hardly differ. Repair these voxels, or leave the case out."
            report.add(path, "outlier_voxels", f"{found}: {cure}", "warning")
        usual = np.percentile(voxels.ravel()[:: max(1, voxels.size // SAMPLE)], [0.5, 99.5])
        report.intensities.append((low, float(usual[0]), float(usual[1])))
        content = hashlib.blake2b(voxels.data, digest_size=16, person=b"voxels")
        content.update(repr(voxels.shape).encode())
        if (twin := report.contents.get(content.digest())) is not None:
            what = f"the same voxels as another channel of the case, {twin}"
            report.add(path, "duplicate_image", f"contains {what}. Give each channel its own file.", "warning")
        report.contents[content.digest()] = path


def _has_geometry(report: CaseReport, path: Path, volume: Volume) -> bool:
    issues = list(filter(None, (*volume.issues, affine_issue(volume.affine))))
    for issue in issues:
        report.add(path, issue.code, issue.sentence, issue.severity)
    if any(issue.code in ("bad_affine", "unit") for issue in issues):
        return False
    if not report.spacing:
        shape = volume.data.shape[:3]
        report.shape, report.spacing, _ = geometry(path, shape, volume.affine)
        if 1 in shape:
            report.add(path, "single_slice", f"is a single slice (shape {shape}). Training needs 3-D scans.", "warning")
    return True


def _check_grid(report: CaseReport, image: tuple[Path, Volume], scan: tuple[Path, Volume], mismatch: str) -> None:
    """Whether a label map, or a further channel, is on the grid of the scan."""
    (path, volume), (file, reference) = image, scan
    own, expected = volume.data.shape[:3], reference.data.shape[:3]
    near = NEAR * float(reference.grid.spacing.min())
    farthest = farthest_corner(own, volume.affine, reference.affine)
    if own == expected and farthest <= near:
        return
    turned, affine = reorient(volume.data, volume.affine, reference.affine)
    if turned.shape[:3] == expected and farthest_corner(expected, affine, reference.affine) <= near:
        axes = ["".join(nibabel.aff2axcodes(one.affine)) for one in (volume, reference)]
        found = f"covers the same space as {file}, but its axes are {axes[0]} and the scan's are {axes[1]}"
        report.add(path, "turned", f"{found}. Save it with the axes of the scan (nibabel's as_reoriented does).")
    elif own != expected:
        found = f"has {own} voxels, but its scan {file} has {expected}"
        report.add(path, "shape_mismatch", f"{found}. Export it on the scan's grid.")
    else:
        found = f"is up to {farthest:.3g} mm away from its scan {file}: their affines differ"
        cure = "Export it on the scan's grid, or give --allow-affine-mismatch if the voxels do match."
        report.add(path, "affine_mismatch", f"{found}. {cure}", mismatch)


def _read_label(report: CaseReport, path: Path) -> Volume | None:
    """The label map at `path`; None, and a finding, if it is not one 3-D map."""
    if path in report.case.images:
        report.add(path, "label_is_image", "is listed both as a scan and as a label map. Correct the data list.")
        return None
    if (volume := _read(report, path, 4)) is None:
        return None
    if volume.data.ndim == 4:
        overlap = int(np.count_nonzero(np.count_nonzero(volume.data, axis=3) > 1))
        what = f"its one-hot labels overlap in {overlap} voxels" if overlap else "it is one-hot"
        code = "overlapping_labels" if overlap else "one_hot_label"
        found = f"is 4-D (shape {volume.data.shape}): {what}"
        report.add(path, code, f"{found}. Save one 3-D map with one value per class.")
        return None
    for issue in volume.issues:
        if issue.code != "no_orientation":  # its scan has the same fault, or another grid
            report.add(path, issue.code, issue.sentence, issue.severity)
    return volume


def _check_values(report: CaseReport, path: Path, data: npt.NDArray[Any], dataset: Dataset) -> None:
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        report.add(
            path, "not_finite", "contains NaN or infinity. Set these voxels to the background or the ignore label."
        )
    counts, ignored = count_values(data), [] if dataset.ignore_label is None else [dataset.ignore_label]
    stray = stray_values(path, counts, [*dataset.labels.values(), *ignored])
    if stray is not None:
        report.add(path, *stray)
    report.classes |= {name for name, value in dataset.labels.items() if is_near(value, counts)}
    if stray is None and not report.classes - {next(iter(dataset.labels))}:
        report.add(
            path, "empty_label", "contains no structure. If that is not intended, leave the case out.", "warning"
        )


def _find_duplicates(reports: Sequence[CaseReport]) -> None:
    """Images with the same voxels as an earlier case."""
    first: dict[bytes, CaseReport] = {}
    for report in reports:
        for content, path in report.contents.items():
            if (other := first.setdefault(content, report)) is not report:
                what = f"the same voxels as case {other.case.name}, {other.contents[content]}"
                report.add(path, "duplicate_image", f"contains {what}. Remove one of the two cases.")


def _find_geometry_outliers(reports: Sequence[CaseReport]) -> None:
    measured = [report for report in reports if report.spacing]
    if len(measured) < FEWEST_FOR_OUTLIERS:
        return
    spacings = np.array([report.spacing for report in measured])
    extents = spacings * np.array([report.shape for report in measured])
    lost: Any = (abs(spacings - 1) < 1e-4).all(axis=1)  # 1 x 1 x 1 mm is what programs write if they lose the size
    if lost.sum() > len(lost) // 4 or (abs(np.median(spacings, axis=0) - 1) < 0.2).all():
        lost[:] = False
    for code, what, values, odd, cure in (
        ("spacing_outlier", "voxel size", spacings, lost, "Check the header"),
        ("size_outlier", "field of view", extents, np.zeros_like(lost), "Check the body part"),
    ):
        median = np.median(values, axis=0)
        ratio = values / median
        for i in np.flatnonzero(odd | (ratio > OUTLIER).any(axis=1) | (ratio < 1 / OUTLIER).any(axis=1)):
            own, usual = (" x ".join(f"{mm:.3g}" for mm in size) + " mm (RAS)" for size in (values[i], median))
            sentence = f"its {what} is {own}, but {usual} is usual in this data set. {cure}, or leave the case out."
            measured[i].add(measured[i].case.images[0], code, sentence, "warning")


def _intensity_outliers(dataset: Dataset, reports: Sequence[CaseReport]) -> list[tuple[str, str]]:
    """Scans whose range of intensities is far from the others', and (returned) CT that is not in Hounsfield units."""
    measured = [report for report in reports if len(report.intensities) == len(dataset.channels)]
    findings = []
    for number, channel in enumerate(dataset.channels if measured else ()):
        least, low, high = np.array([report.intensities[number] for report in measured]).T
        kind = normalisation(channel)
        factor = INTENSITY_OUTLIER.get(kind, MR_OUTLIER)
        ratio = (high - low) / max(float(np.median(high - low)), 1e-30)
        odd = (ratio > factor) | (ratio < 1 / factor)
        cure = "Check its units, or leave the case out."
        if kind == "ct":
            ends = np.stack([low - np.median(low), high - np.median(high)])
            odd |= (ends.min(axis=0) > CT_SHIFT) | (ends.max(axis=0) < -CT_SHIFT)
            odd |= (least >= 0) & (least < -100).any()  # air is -1000 HU
            cure = "CT must be in Hounsfield units (air -1000, water 0) in all cases: convert it."
            if (least >= 0).all() or (high - low).max() < LEAST_CT_RANGE:
                what = (
                    f"no scan has {'a value below 0' if (least >= 0).all() else 'a usual range'} in channel {channel!r}"
                )
                why = "so the values are not in Hounsfield units (air -1000, water 0)"
                advice = "Convert the scans, or rename the channel if it is not CT."
                findings.append(("not_hounsfield", f"{dataset.root}: {what}, {why}. {advice}"))
        if len(measured) < FEWEST_FOR_OUTLIERS and kind != "ct":
            continue
        usual = f"{np.median(low):.4g} to {np.median(high):.4g}"
        for i in np.flatnonzero(odd):
            sentence = f"channel {channel!r} ranges from {low[i]:.4g} to {high[i]:.4g}, but {usual} is usual. {cure}"
            measured[i].add(measured[i].case.images[0], "intensity_outlier", sentence, "warning")
    return findings


def _rare_classes(dataset: Dataset, reports: Sequence[CaseReport]) -> list[tuple[str, str]]:
    """Classes that are in no case, in one case only, or only in cases that are not trained on."""
    value_names = {value: name for name, value in dataset.labels.items()}
    meaning = {name: values_of(entry) for name, entry in mask_labels(dataset.label_plan).items()}
    holds = {name: {value_names[value] for value in values} for name, values in meaning.items()}
    cases = {name: [r.case.name for r in reports if own & r.classes] for name, own in holds.items()}
    _, *classes = meaning
    if not any(cases.values()):
        return []
    if not any(cases[name] for name in classes):
        what = "none of the label maps contains a structure, so there is nothing to learn"
        return [("no_structure", f"{dataset.root}: {what}. Add a case with one, or correct the declared values.")]
    kinds: dict[str, list[str]] = {code: [] for code in RARE}
    for name in classes:
        few = ", ".join(cases[name][:3]) + ", ..." * (len(cases[name]) > 3)
        values = f"value{'s' * (len(meaning[name]) > 1)} {', '.join(map(value_text, meaning[name]))}"
        text = f"{name!r} ({values}{few and ', drawn in '}{few})"
        if not cases[name]:
            kinds["absent_class"].append(text)
        elif set(cases[name]) <= dataset.validation:
            kinds["class_not_trained"].append(text)
        elif len(cases[name]) == 1 and not dataset.validation and len(dataset.labelled) > 1:
            kinds["class_in_one_case"].append(text)
    return [(code, f"{dataset.root}: {RARE[code].format(', '.join(names))}") for code, names in kinds.items() if names]


def _lost_regions(dataset: Dataset) -> list[tuple[str, str]]:
    """A warning if the values that masks are written with cannot give back the regions."""
    regions = Regions.of(dataset.label_plan)
    if regions is None:
        return []
    values = [value_text(value) for value in dataset.labels.values()]

    def text(c: int) -> str:
        within = [name for name, holds in zip(regions.names, regions.membership[:, c], strict=True) if holds]
        return f"{values[c]} (in {', '.join(within) or 'no region'})"

    lost = [f"a voxel of {text(c)} is written as {text(other)}" for c, other in regions.lost().items()]
    cure = "Order them so that the smallest regions come last, or give every overlap a region of its own."
    why = f'masks written by "regions_class_order" cannot give back the regions: {"; ".join(lost)}'
    return [("lost_regions", f"{dataset.root}: {why}. {cure}")] if lost else []
