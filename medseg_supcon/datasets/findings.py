"""What a check found: findings for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import Case
from medseg_supcon.datasets.fingerprint import CaseFingerprint


@dataclass(frozen=True)
class Finding:
    """One fault or doubt.

    Attributes:
        case: name of the case; empty where the whole data set is meant.
        file: the file at fault; None where it is no single file.
        severity: "error" (training refuses) or "warning".
        code: short name of the kind of fault, for machines, e.g. "affine_mismatch".
        message: a sentence: the file, what was expected, what was found, the cure.
    """

    case: str
    file: Path | None
    severity: str
    code: str
    message: str


@dataclass(frozen=True)
class Report:
    """All findings on a data set.

    Attributes:
        name: of the data set.
        root: its folder.
        cases: number of cases that were looked at.
        labelled: how many of them have a label map.
        findings: errors first, then in the order of the cases.
        fingerprints: of the labelled cases without an error, for `fingerprint`: each file is read once.
    """

    name: str
    root: Path
    cases: int
    labelled: int
    findings: tuple[Finding, ...] = ()
    fingerprints: Mapping[Case, CaseFingerprint] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that forbid training."""
        return tuple(found for found in self.findings if found.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that a person should look at."""
        return tuple(found for found in self.findings if found.severity == "warning")

    @property
    def has_errors(self) -> bool:
        """Whether training must refuse."""
        return bool(self.errors)

    def rows(self) -> list[dict[str, str]]:
        """One row a finding for a table: "case", "severity", "code", "message"."""
        return [
            {"case": f.case or "(all)", "severity": f.severity, "code": f.code, "message": f.message}
            for f in self.findings
        ]

    def summary(self) -> str:
        """One closing sentence."""
        rest = self.cases - self.labelled
        cases = f"{self.name}: {_count(self.cases, 'case')} checked" + (
            f", {rest} without label map" if rest else ""
        )
        if not self.findings:
            return f"{cases}, nothing to object to."
        return f"{cases}, {_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "dataset": self.name,
            "root": str(self.root),
            "cases": self.cases,
            "labelled": self.labelled,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "findings": [
                {**asdict(f), "file": None if f.file is None else str(f.file)} for f in self.findings
            ],
        }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
