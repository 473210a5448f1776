"""Whether a mask can be used as it is: the predicted Dice, and plain facts that speak against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from medseg_supcon.datasets import Regions, target_names
from medseg_supcon.quality.evidence import Evidence, Floats, dice_per_class
from medseg_supcon.quality.model import Estimate, QualityModel
from medseg_supcon.scans import Grid

REJECT_BELOW = 0.5  # predicted Dice
TOLERATED, SEVERE = 1.5, 4.0  # factors beyond the training scans' range: worth a look, and certainly wrong
UNLIKE = 1.5  # times the usual distance of feature vectors


def rate(
    plan: Mapping[str, Any],
    grid: Grid,
    evidence: Sequence[Evidence],
    models: Sequence[QualityModel | None],
    doubts: Sequence[str] = (),
    agreement: Floats | None = None,
    review_below: float | None = None,
) -> dict[str, Any]:
    """How far to trust a mask.

    Args:
        plan: the run's, or the first run's of an ensemble.
        grid: the scan's.
        evidence, models: one per run; None: a run without a quality model.
        doubts: what is odd about the scan, in words.
        agreement: (K - 1,) mean Dice between the masks of an ensemble's runs.
        review_below: masks are good if the lower end of the interval is at least this; None: the models' own.

    Returns:
        ``verdict``: "good", "review", "reject", or None if no run has a quality model and no fact speaks against the
        mask; ``reasons`` for the verdict; and with a model ``dice`` per class and their ``mean``, and the ``interval``
        in which the mean is with 90 % probability.
    """
    names = target_names(plan)
    reasons, severe = facts(plan, grid, evidence[0], names)
    reasons += doubts
    estimates = [model.estimate(e) for e, model in zip(evidence, models, strict=True) if model is not None]
    if not estimates:
        return {"verdict": "reject" if severe else "review" if reasons else None, "reasons": reasons}
    dice, low, high = _together(estimates, agreement)
    mean = float(dice.mean())
    needed = (
        review_below if review_below is not None else float(np.mean([m.good_from for m in models if m is not None]))
    )
    if agreement is not None and min(agreement) < REJECT_BELOW:
        reasons.append(f"the runs of the ensemble disagree: mean Dice between their masks {np.mean(agreement):.2f}")
    distance = np.mean([e.distance for e in estimates], axis=0)
    reasons += [
        f"{name}: its voxels look unlike those of the training scans (distance {times:.1f} times the usual)"
        for name, times in zip(names, distance, strict=True)
        if times > UNLIKE
    ]
    if low < needed:
        reasons.append(
            f"predicted Dice {mean:.2f}, and it may be as low as {low:.2f}; good masks have at least {needed:.2f}"
        )
    verdict = "reject" if severe or mean < REJECT_BELOW else "review" if reasons else "good"
    scores = {name: round(float(d), 3) for name, d in zip(names, dice, strict=True)} | {"mean": round(mean, 3)}
    return {"dice": scores, "interval": [round(low, 3), round(high, 3)], "verdict": verdict, "reasons": reasons}


def _together(estimates: Sequence[Estimate], agreement: Floats | None) -> tuple[Any, float, float]:
    """Dice per class and the interval of the mean: masks can be trusted no more than the runs agree."""
    dice = np.mean([e.dice for e in estimates], axis=0)
    low, high = (float(np.mean([getattr(e, end) - e.mean for e in estimates])) for end in ("low", "high"))
    if agreement is not None:
        dice = np.fmin(dice, agreement)
    mean = float(dice.mean())
    return dice, max(0.0, mean + low), min(1.0, mean + high)


def facts(plan: Mapping[str, Any], grid: Grid, evidence: Evidence, names: Sequence[str]) -> tuple[list[str], bool]:
    """What is outside the training scans' range, in words, and whether the mask is certainly wrong."""
    known, reasons, factors = plan["fingerprint"], [], [1.0]

    def compare(what: str, value: Any, low: Any, high: Any, unit: str, tolerated: float = TOLERATED) -> None:
        value, low, high = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (value, low, high))
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = float(np.nanmax(np.fmax(value / high, np.where(value > 0, low / value, 1.0))))
        if factor > tolerated:
            texts = [" x ".join(f"{v:.3g}" for v in x) for x in (value, low, high)]
            span = texts[1] if texts[1] == texts[2] else f"{texts[1]} to {texts[2]}"
            reasons.append(f"{what} {texts[0]} {unit}, training scans have {span} {unit}")
            factors.append(factor)

    volumes = known.get("volume_ml", {})
    for c, name in enumerate(names, start=1):
        if name not in volumes:
            continue
        least, most = volumes[name]["min"], volumes[name]["max"]
        if evidence.volume[c] > 0:
            compare(f"{name}: volume", evidence.volume[c], least, most, "ml")
        elif least > 0:
            reasons.append(f"{name} was not found, every training scan has it")
    order = np.argsort(io_orientation(grid.affine)[:, 0])
    spacing, shape = np.asarray(grid.spacing)[order], np.asarray(grid.shape[:3])[order]
    if "spacing" in known and "shape" in known:
        (low, high), (few, many) = ((known[key]["min"], known[key]["max"]) for key in ("spacing", "shape"))
        compare("spacing", spacing, low, high, "mm")
        compare("field of view", shape * spacing, np.multiply(few, low), np.multiply(many, high), "mm", tolerated=2.0)
    nothing = not evidence.volume[1:].any() and bool(reasons)
    return reasons, nothing or max(factors) > SEVERE


def agreement(masks: Sequence[npt.NDArray[Any]], classes: int, regions: Regions | None = None) -> Floats:
    """(K - 1,) mean Dice per foreground class, (R,) per region, over all pairs of masks of class indices.

    1 where no mask has the class.
    """
    pairs = [dice_per_class(one, other, classes, regions) for one, other in combinations(masks, 2)]
    return np.asarray(np.mean(np.nan_to_num(pairs, nan=1.0), axis=0))
