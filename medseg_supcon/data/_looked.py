"""What the check of one case has seen so far, and the comparison of two grids."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg_supcon.data._dataset import Case
from medseg_supcon.data._place import farthest_corner
from medseg_supcon.data._report import Finding
from medseg_supcon.data._volume import Volume, read_volume
from medseg_supcon.errors import DataError

__all__ = ["Looked", "same_grid"]

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
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    contents: list[tuple[Path, bytes]] = field(default_factory=list)
    spacing: Floats | None = None
    extent: Floats | None = None
    classes: set[str] = field(default_factory=set)

    def tell(self, file: Path, code: str, sentence: str, severity: str = "error") -> None:
        """Add a finding on a file; the sentence follows the file's name."""
        self.findings.append(Finding(self.case.name, file, severity, code, f"{file}: {sentence}"))

    def read(self, file: Path) -> Volume | None:
        """The file's voxels; None, and a finding, if there is no reading it."""
        try:
            return read_volume(file)
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
