"""`check_dataset`: every case and every file read once, and what the cases have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.datasets.case_report import CaseReport, Finding, case_report
from medseg_supcon.datasets.dataset import Case, Dataset, normalisation, patient_on_both_sides
from medseg_supcon.datasets.fingerprints import CaseFingerprint
from medseg_supcon.datasets.labels import value_text
from medseg_supcon.scans import in_parallel
from medseg_supcon.text import counted

OUTLIER = 2.5  # factor from the median, of voxel size and field of view
FEWEST_FOR_OUTLIERS = 4
INTENSITY_OUTLIER = {"ct": 5.0, "nonorm": 5.0, "rgb_to_0_1": 5.0}  # factor from the median range
MR_OUTLIER = 10_000.0  # of channels that are normalised per scan: MR scanners differ by factors of 500
LEAST_CT_RANGE = 50.0  # HU; scans scaled to -1..1 have less
CT_SHIFT = 300.0  # HU by which both ends of a scan's range are off

RARE = {
    "absent_class": "no label map shows the class {}, so it is not learnt. Check the declared value, or remove the class.",
    "class_not_trained": "only validation cases show the class {}, so it is not learnt. Train on one of these cases.",
    "class_in_one_case": "a single case shows the class {}: if that case validates, the class is not learnt.",
}


@dataclass(frozen=True)
class Report:
    """All findings on a data set: errors first, then in the order of the cases."""

    name: str
    root: Path
    cases: int
    labelled: int
    findings: tuple[Finding, ...] = ()
    fingerprints: Mapping[Case, CaseFingerprint] = field(default_factory=dict)  # of labelled cases without an error

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that prevent training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that a person should look at."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def has_errors(self) -> bool:
        """Whether training must refuse."""
        return bool(self.errors)

    def summary(self) -> str:
        """One closing sentence."""
        parts = [f"{self.name}: {counted(self.cases, 'case')} checked"]
        if rest := self.cases - self.labelled:
            parts.append(f"{rest} without label map")
        found = [counted(len(self.errors), "error"), counted(len(self.warnings), "warning")]
        return ", ".join([*parts, *(found if self.findings else ["no problems found"])]) + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {"cases": self.cases, "labelled": self.labelled}
        counts |= {"errors": len(self.errors), "warnings": len(self.warnings)}
        findings = [{**asdict(f), "file": None if f.file is None else str(f.file)} for f in self.findings]
        return {"dataset": self.name, "root": str(self.root), **counts, "findings": findings}


def check_dataset(dataset: Dataset, *, allow_affine_mismatch: bool = False) -> Report:
    """What is wrong with a data set, case by case. Never raises for a bad file: it is a finding.

    Errors: files that are missing, unreadable, 2-D or 4-D; shapes, axes or affines of scan and label map that differ;
    NaN or Inf; a constant image; undeclared, fractional or overlapping labels; only empty label maps; differing channel
    counts; one image in two cases; an invalid or sheared affine; a header in metres or microns, or with two voxel sizes.

    Warnings: what reading the data set did not use; an empty label map; a class that nobody drew, or one case alone, or
    no training case; a single slice; a qform that disagrees with the sform; a header without orientation; outliers of
    spacing, size and intensity; CT that is not in Hounsfield units; a patient who both trains and validates.

    Args:
        dataset: from `read_dataset`; its `validation` are the cases that do not train.
        allow_affine_mismatch: report differing affines as warnings; the scan's is then the right one.

    Example:
        >>> import tempfile
        >>> from medseg_supcon.datasets import check_dataset, make_phantoms, read_dataset
        >>> report = check_dataset(read_dataset(make_phantoms(tempfile.mkdtemp() + "/phantoms", cases=2)))
        >>> report.has_errors
        False
    """
    mismatch = "warning" if allow_affine_mismatch else "error"
    reports = in_parallel(lambda case: case_report(case, dataset, mismatch), dataset.cases)
    _find_duplicates(reports)
    _find_geometry_outliers(reports)
    of_all = [("data_list", warning) for warning in dataset.warnings]
    of_all += [*_intensity_outliers(dataset, reports), *_rare_classes(dataset, reports)]
    if (mixed := patient_on_both_sides(dataset)) is not None:
        of_all.append(("patient_on_both_sides", mixed))
    findings = [finding for report in reports for finding in report.findings]
    for code, message in of_all:
        findings.append(Finding("", None, "error" if code == "no_structure" else "warning", code, message))
    order = {case.name: number for number, case in enumerate(dataset.cases)}
    findings.sort(key=lambda f: (f.severity != "error", order.get(f.case, len(order))))
    measured = {report.case: report.fingerprint for report in reports if report.fingerprint is not None}
    return Report(dataset.name, dataset.root, len(dataset.cases), len(dataset.labelled), tuple(findings), measured)


def _find_duplicates(reports: Sequence[CaseReport]) -> None:
    """Images whose voxels are those of an earlier one: an error between cases, a warning within one."""
    first: dict[bytes, tuple[CaseReport, Path]] = {}
    for report in reports:
        for path, content in report.contents:
            if content not in first:
                first[content] = (report, path)
                continue
            other, earlier = first[content]
            what, cure, severity = f"case {other.case.name}", "Remove one of the two cases.", "error"
            if other is report:
                what, cure, severity = "another channel of the case", "Give each channel its own file.", "warning"
            report.add(path, "duplicate_image", f"holds the same voxels as {what}, {earlier}. {cure}", severity)


def _find_geometry_outliers(reports: Sequence[CaseReport]) -> None:
    measured = [report for report in reports if report.spacing is not None]
    if len(measured) < FEWEST_FOR_OUTLIERS:
        return
    spacings, extents = (np.array([getattr(r, what) for r in measured]) for what in ("spacing", "extent"))
    lost: Any = (abs(spacings - 1) < 1e-4).all(axis=1)  # 1 x 1 x 1 mm is what programs write if they lose the size
    if lost.sum() > len(lost) // 4 or (abs(np.median(spacings, axis=0) - 1) < 0.2).all():
        lost[:] = False
    for code, what, values, odd, cure in (
        ("spacing_outlier", "voxel size", spacings, lost, "Check the header"),
        ("size_outlier", "field of view", extents, np.zeros_like(lost), "Check the body part"),
    ):
        median = np.median(values, axis=0)
        ratio = values / median
        odd = odd | (ratio > OUTLIER).any(axis=1) | (ratio < 1 / OUTLIER).any(axis=1)
        for report, value, is_odd in zip(measured, values, odd, strict=True):
            if is_odd:
                sentence = f"its {what} is {_mm(value)}, usual is {_mm(median)}. {cure}, or leave the case out."
                report.add(report.case.images[0], code, sentence, "warning")


def _mm(values: Any) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " mm (RAS)"


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
                found = "no scan has a value below 0" if (least >= 0).all() else "no scan has a usual range"
                message = (
                    f"{dataset.root}: {found} in channel {channel!r}, so the values are not in "
                    "Hounsfield units (air -1000, water 0). Convert the scans, or rename the channel if it is not CT."
                )
                findings.append(("not_hounsfield", message))
        if len(measured) < FEWEST_FOR_OUTLIERS and kind != "ct":
            continue
        usual = f"{np.median(low):.4g} to {np.median(high):.4g}"
        for report, is_odd, a, b in zip(measured, odd, low, high, strict=True):
            if is_odd:
                sentence = f"channel {channel!r} ranges from {a:.4g} to {b:.4g}, usual is {usual}. {cure}"
                report.add(report.case.images[0], "intensity_outlier", sentence, "warning")
    return findings


def _rare_classes(dataset: Dataset, reports: Sequence[CaseReport]) -> list[tuple[str, str]]:
    """Classes that no case shows, only one, or only cases that do not train."""
    cases = {name: [r.case.name for r in reports if name in r.classes] for name in dataset.labels}
    _, *classes = dataset.labels
    if not any(cases.values()):
        return []
    if not any(cases[name] for name in classes):
        what = "none of the label maps shows a structure, so there is nothing to learn"
        return [("no_structure", f"{dataset.root}: {what}. Add a case with one, or correct the declared values.")]
    kinds: dict[str, list[str]] = {code: [] for code in RARE}
    for name in classes:
        text = f"{name!r} (value {value_text(dataset.labels[name])}"
        few = ", ".join(cases[name][:3]) + ", ..." * (len(cases[name]) > 3)
        if not cases[name]:
            kinds["absent_class"].append(f"{text})")
        elif set(cases[name]) <= dataset.validation:
            kinds["class_not_trained"].append(f"{text}, drawn in {few})")
        elif len(cases[name]) == 1 and not dataset.validation and len(dataset.labelled) > 1:
            kinds["class_in_one_case"].append(f"{text}, drawn in {few})")
    return [(code, f"{dataset.root}: {RARE[code].format(', '.join(names))}") for code, names in kinds.items() if names]
