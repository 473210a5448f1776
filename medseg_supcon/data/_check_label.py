"""The faults of a label map: its shape, its grid, its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.data._dataset import Dataset
from medseg_supcon.data._labels import TOLERANCE
from medseg_supcon.data._looked import Looked, same_grid
from medseg_supcon.data._volume import Volume, count_values

__all__ = ["look_at_label"]


def look_at_label(
    looked: Looked,
    path: Path,
    dataset: Dataset,
    scan: tuple[Path, Volume] | None,
    tolerance: float,
    mismatch: str,
) -> None:
    """List the faults of the label map at `path`; `scan` is its case's first usable image."""
    if path in looked.case.images:
        looked.tell(path, "label_is_image", "is named as scan and as label map. Correct the data list.")
        return
    volume = looked.read(path)
    if volume is None:
        return
    data = volume.data
    if data.ndim == 4:
        overlap = int(np.count_nonzero(np.count_nonzero(data, axis=3) > 1))
        what = f"its one-hot labels overlap in {overlap} voxels" if overlap else "it is one-hot"
        code = "overlapping_labels" if overlap else "one_hot_label"
        looked.tell(
            path, code, f"is 4-D (shape {data.shape}): {what}. Save one 3-D map with one value per class."
        )
        return
    if data.ndim != 3 or data.size == 0:
        looked.tell(path, "not_3d", f"is {data.ndim}-D (shape {data.shape}), expected a 3-D label map.")
        return
    for doubt in volume.doubts:
        if doubt.code != "no_orientation":  # its scan has the same fault, or another grid
            looked.tell(path, doubt.code, doubt.sentence, doubt.severity)
    if scan is not None:
        same_grid(looked, path, volume, *scan, tolerance, mismatch)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        looked.tell(
            path, "not_finite", "holds NaN or Inf. Set these voxels to the background or the ignore label."
        )
    _values(looked, path, data, dataset)


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
