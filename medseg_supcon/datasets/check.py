"""`check_dataset`: every case looked at, every file read once, and what the cases have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_supcon.datasets.check_case import Looked, look_at
from medseg_supcon.datasets.dataset import Dataset
from medseg_supcon.datasets.findings import Finding, Report
from medseg_supcon.datasets.split import patient_on_both_sides
from medseg_supcon.scans import in_parallel

OUTLIER = 2.5
FEWEST_FOR_OUTLIERS = 4


def check_dataset(
    dataset: Dataset,
    *,
    affine_tolerance: float = 0.01,
    allow_affine_mismatch: bool = False,
    jobs: int | None = None,
) -> Report:
    """What is wrong with a data set, case by case. Never raises for a bad file: it is a finding.

    Errors: missing or unreadable files, 2-D or 4-D where 3-D is expected, shapes or affines of scan and label
    map that differ, NaN or Inf, a constant image, label values that are not declared, fractional or
    overlapping labels, label maps that are all empty, differing channel counts, one image in two cases, an
    affine that is no geometry or sheared, a header that gives metres or microns, or two voxel sizes (sform
    against pixdim, by more than 1 %).

    Warnings: an empty label map, a class that nobody drew, a single slice, a qform that disagrees with the
    sform, a header without orientation, outliers of spacing and size, a patient whom a data list both trains and
    validates on (training refuses that where it validates).

    Args:
        dataset: from `read_dataset`.
        affine_tolerance: how far a corner of the label map's grid may lie from the scan's, in voxels.
        allow_affine_mismatch: report differing affines as warnings; the scan's is then the right one.
        jobs: threads; None for up to four.

    Example:
        >>> import tempfile
        >>> from medseg_supcon.datasets import check_dataset, make_phantoms, read_dataset
        >>> report = check_dataset(read_dataset(make_phantoms(tempfile.mkdtemp() + "/phantoms", cases=2)))
        >>> report.has_errors
        False
    """
    if not affine_tolerance >= 0:
        raise ValueError(f"affine_tolerance must be at least 0 voxels, got {affine_tolerance}")
    severity = "warning" if allow_affine_mismatch else "error"
    looked = in_parallel(lambda case: look_at(case, dataset, affine_tolerance, severity), dataset.cases, jobs)
    findings = [found for one in looked for found in one.findings]
    findings += _duplicates(looked)
    findings += _outliers(looked)
    findings += _classes_nobody_drew(dataset, looked)
    mixed = patient_on_both_sides(dataset)
    if mixed is not None:
        findings.append(Finding("", None, "warning", "patient_on_both_sides", mixed))
    order = {case.name: number for number, case in enumerate(dataset.cases)}
    findings.sort(key=lambda f: (f.severity != "error", order.get(f.case, len(order))))
    measured = {one.case: one.fingerprint for one in looked if one.fingerprint is not None}
    return Report(
        dataset.name, dataset.root, len(dataset.cases), len(dataset.labelled), tuple(findings), measured
    )


def _duplicates(looked: Sequence[Looked]) -> list[Finding]:
    """Images whose voxels are those of an earlier one: an error between cases, a warning within one."""
    findings = []
    first: dict[bytes, tuple[str, Path]] = {}
    for one in looked:
        for path, content in one.contents:
            if content not in first:
                first[content] = (one.case.name, path)
                continue
            name, earlier = first[content]
            same_case = name == one.case.name
            what = f"another channel of the case, {earlier}" if same_case else f"case {name}, {earlier}"
            cure = "Give each channel its own file." if same_case else "Remove one of the two cases."
            message = f"{path}: holds the same voxels as {what}. {cure}"
            findings.append(
                Finding(one.case.name, path, "warning" if same_case else "error", "duplicate_image", message)
            )
    return findings


def _outliers(looked: Sequence[Looked]) -> list[Finding]:
    measured = [one for one in looked if one.spacing is not None and one.extent is not None]
    if len(measured) < FEWEST_FOR_OUTLIERS:
        return []
    findings = []
    for code, what, cure in (
        ("spacing_outlier", "voxel size", "Check the header, or leave the case out."),
        (
            "size_outlier",
            "field of view",
            "Check that it shows the same part of the body, or leave the case out.",
        ),
    ):
        values = np.array([one.spacing if code == "spacing_outlier" else one.extent for one in measured])
        median = np.median(values, axis=0)
        for one, value in zip(measured, values, strict=True):
            ratio = value / median
            if (ratio > OUTLIER).any() or (ratio < 1 / OUTLIER).any():
                message = f"{one.case.images[0]}: its {what} is {_mm(value)}, usual is {_mm(median)}. {cure}"
                findings.append(Finding(one.case.name, one.case.images[0], "warning", code, message))
    return findings


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " mm (RAS)"


def _classes_nobody_drew(dataset: Dataset, looked: Sequence[Looked]) -> list[Finding]:
    seen = {name for one in looked for name in one.classes}
    if not seen:
        return []
    if seen == {next(iter(dataset.labels))}:
        message = (
            f"{dataset.root}: none of the label maps shows a structure, so there is nothing to learn. Add a case "
            f"with one, or correct the declared values."
        )
        return [Finding("", None, "error", "no_structure", message)]
    return [
        Finding(
            "",
            None,
            "warning",
            "absent_class",
            f"{dataset.root}: no label map shows the class {name!r} (value {value:g}), so it is not learnt. "
            f"Check the declared value, or remove the class.",
        )
        for name, value in list(dataset.labels.items())[1:]
        if name not in seen
    ]
