"""Overlap, surface distances and volumes of one segmentation against its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.metrics.utils import get_mask_edges, get_surface_distance

Row = dict[str, Any]
Array = npt.NDArray[Any]
Labels = Mapping[str, float]  # class name -> value in the files, background first

METRICS = ("dice", "hd95_mm", "surface_dice")
# (prediction is empty, reference is empty) -> name
EMPTY = {(False, False): "", (True, True): "both", (True, False): "prediction", (False, True): "reference"}


def case_metrics(
    prediction: Array,
    reference: Array,
    spacing_mm: Sequence[float],
    labels: Labels,
    ignore_mask: Array | None = None,
    tolerance_mm: float = 1.0,
) -> list[Row]:
    """Dice, HD95, surface Dice and volumes (``volume_ml``, ``reference_volume_ml``) of each foreground class of one case.

    - ``dice``: 2 |P n R| / (|P| + |R|), in 0..1.
    - ``hd95_mm``: the larger of the two directed 95th percentiles of the distances between the surfaces
      (voxels of a class with a face neighbour outside it), in mm (as `monai.metrics`).
    - ``surface_dice``: the share of both surfaces within ``tolerance_mm`` of the other, in 0..1
      (normalised surface Dice, Nikolov et al. 2021, arXiv:1809.04430, on voxel surfaces).
    - ``empty``, the rule for empty classes. ``"both"``: the scores are None and in no mean (a score of 1 would let
      absent classes dominate it). ``"prediction"`` or ``"reference"``: Dice and surface Dice are 0 and HD95 is the
      diagonal of the scan, so that a missed structure never improves a mean. ``""``: neither is empty.

    Args:
        prediction, reference: label maps (X, Y, Z) in the values of ``labels``.
        spacing_mm: mm per axis.
        labels: class name -> value, in class order; the first is background and gets no row.
        ignore_mask: (X, Y, Z), True at voxels that count for no class of either map.
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
        raise ValueError(f"expected two label maps of one 3-D shape, got {prediction.shape}, {reference.shape}")
    if len(spacing) != 3 or not all(s > 0 for s in (*spacing, tolerance_mm)):
        sizes = f"spacing_mm={spacing_mm!r}, tolerance_mm={tolerance_mm!r}"
        raise ValueError(f"spacing_mm must be three positive numbers and tolerance_mm must be positive, got {sizes}")
    worst = (0.0, float(np.linalg.norm(np.multiply(prediction.shape, spacing))), 0.0)
    voxel_ml = float(np.prod(spacing)) / 1000
    counted = True if ignore_mask is None else ~ignore_mask
    rows: list[Row] = []
    for name, value in list(labels.items())[1:]:
        p, r = (prediction == value) & counted, (reference == value) & counted
        empty = EMPTY[not p.any(), not r.any()]
        scores = worst if empty else _scores(p, r, spacing, tolerance_mm)
        row: Row = {"class": name} | dict(zip(METRICS, (None,) * 3 if empty == "both" else scores, strict=True))
        row |= {"volume_ml": int(p.sum()) * voxel_ml, "reference_volume_ml": int(r.sum()) * voxel_ml}
        rows.append(row | {"tolerance_mm": tolerance_mm, "empty": empty})
    return rows


def _scores(p: Array, r: Array, spacing: tuple[float, ...], tolerance_mm: float) -> tuple[float, float, float]:
    """The `METRICS` of two masks that are not empty."""
    surface_p, surface_r = get_mask_edges(p, r)
    to_r = get_surface_distance(surface_p, surface_r, spacing=spacing)
    to_p = get_surface_distance(surface_r, surface_p, spacing=spacing)
    reach = tolerance_mm * (1 + 1e-6)  # the distances are float32
    within = int((to_r <= reach).sum() + (to_p <= reach).sum())
    dice = 2 * int((p & r).sum()) / int(p.sum() + r.sum())
    hd95 = float(max(np.percentile(to_r, 95), np.percentile(to_p, 95)))
    return dice, hd95, within / (to_r.size + to_p.size)
