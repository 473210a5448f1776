"""Overlap, surface distances and volumes of one segmentation against its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.metrics.utils import get_mask_edges, get_surface_distance

Row = dict[str, Any]

METRICS = ("dice", "hd95_mm", "surface_dice")


def case_metrics(
    prediction: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    spacing_mm: Sequence[float],
    labels: Mapping[str, float],
    ignore_mask: npt.NDArray[np.bool_] | None = None,
    tolerance_mm: float = 1.0,
) -> list[Row]:
    """Dice, HD95, surface Dice and volumes of each foreground class of one case.

    - ``dice``: 2 |P n R| / (|P| + |R|), in 0..1.
    - ``hd95_mm``: the larger of the two directed 95th percentiles of the distances between the surfaces
      (voxels of a class with a face neighbour outside it), in mm (as `monai.metrics`).
    - ``surface_dice``: the share of both surfaces within ``tolerance_mm`` of the other, in 0..1
      (normalised surface Dice, Nikolov et al. 2021, arXiv:1809.04430, on voxel surfaces).
    - ``volume_ml``, ``reference_volume_ml``.

    The rule for empty classes, in ``empty`` of each row:

    - ``"both"``: both are empty. The three scores are None and no mean includes them: a score of 1 would let absent
      classes dominate the mean.
    - ``"prediction"`` or ``"reference"``: only one of the two is empty. Dice and surface Dice are 0 and HD95 is the
      diagonal of the scan, the largest possible distance: a missed structure never improves a mean.
    - ``""``: neither is empty.

    Args:
        prediction: label map (X, Y, Z) in the values of ``labels``.
        reference: label map (X, Y, Z) in the values of ``labels``.
        spacing_mm: mm per axis.
        labels: class name -> value, in class order; the first is background and gets no row.
        ignore_mask: (X, Y, Z), True where nobody labelled: these voxels are in no class of either map.
        tolerance_mm: the distance within which two surfaces count as agreeing.

    Raises:
        ValueError: shapes differ, or a spacing or tolerance is not positive.

    Example:
        >>> import numpy as np
        >>> reference = np.zeros((8, 8, 8), int); reference[2:6, 2:6, 2:6] = 1
        >>> rows = case_metrics(reference, reference, (1, 1, 2), {"background": 0, "organ": 1})
        >>> rows[0]["dice"], rows[0]["hd95_mm"], rows[0]["volume_ml"]
        (1.0, 0.0, 0.128)
    """
    spacing = tuple(float(s) for s in spacing_mm)
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"expected two label maps of one 3-D shape, got {prediction.shape}, {reference.shape}"
        )
    if len(spacing) != 3 or not all(s > 0 for s in spacing):
        raise ValueError(f"spacing_mm must be three positive numbers, got {spacing_mm!r}")
    if not tolerance_mm > 0:
        raise ValueError(f"tolerance_mm must be positive, got {tolerance_mm!r}")
    diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    voxel_ml = float(np.prod(spacing)) / 1000
    rows = []
    for name, value in list(labels.items())[1:]:
        p, r = prediction == value, reference == value
        if ignore_mask is not None:
            p, r = p & ~ignore_mask, r & ~ignore_mask
        rows.append(_class_row(name, p, r, spacing, voxel_ml, diagonal, tolerance_mm))
    return rows


def _class_row(
    name: str,
    p: npt.NDArray[np.bool_],
    r: npt.NDArray[np.bool_],
    spacing: tuple[float, ...],
    voxel_ml: float,
    diagonal: float,
    tolerance_mm: float,
) -> Row:
    n_p, n_r = int(p.sum()), int(r.sum())
    row: Row = {"class": name, "dice": None, "hd95_mm": None, "surface_dice": None}
    row |= {"volume_ml": n_p * voxel_ml, "reference_volume_ml": n_r * voxel_ml, "tolerance_mm": tolerance_mm}
    if n_p == 0 or n_r == 0:
        row["empty"] = "both" if n_p == n_r else ("prediction" if n_p == 0 else "reference")
        if n_p != n_r:
            row |= {"dice": 0.0, "hd95_mm": diagonal, "surface_dice": 0.0}
        return row
    surface_p, surface_r = get_mask_edges(p, r)
    to_r = get_surface_distance(surface_p, surface_r, spacing=spacing)
    to_p = get_surface_distance(surface_r, surface_p, spacing=spacing)
    reach = tolerance_mm * (1 + 1e-6)  # the distances are float32
    within = int((to_r <= reach).sum() + (to_p <= reach).sum())
    row["dice"] = 2 * int((p & r).sum()) / (n_p + n_r)
    row["hd95_mm"] = float(max(np.percentile(to_r, 95), np.percentile(to_p, 95)))
    row["surface_dice"] = within / (to_r.size + to_p.size)
    row["empty"] = ""
    return row
