"""Post-processing that helps on out-of-fold masks: the largest component of a class, and its smallest volume.

The rule, for one class after the other: "keep only the largest component" is tried first, and then the removal of
components below a volume, at a few volumes. One of them is adopted if the Dice of the class, averaged over a patient's
scans, gains on average over the patients, and its bootstrap interval of 95 %, widened for the number of volumes tried
(Bonferroni), excludes 0. A class that is neither in the mask nor in the label map counts as a Dice of 1 here. With fewer
than six patients nothing is adopted. No other class can change: what is removed becomes background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg_supcon.comparison.statistics import FEWEST_CASES, TAIL, bootstrap_means
from medseg_supcon.datasets import readable
from medseg_supcon.text import counted

QUANTILES = (0.25, 0.5, 0.75, 1.0)  # of the volumes of components below the smallest labelled structure
ABOVE = 1.01  # a volume to try is this much above such a component, which it removes
Row = dict[str, Any]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Mask:
    """An out-of-fold mask: class indices (X, Y, Z) of the mask and of the label map, where -1 is not annotated."""

    patient: str
    classes: Array
    label: Array
    voxel_mm3: float


@dataclass(frozen=True)
class Components:
    """The components (26 neighbours) of one class in one mask, and how they meet the label map."""

    patient: str
    volume: Array  # (n,) mm3
    voxels: Array  # (n,) in the annotated part
    hits: Array  # (n,) of them in the class of the label map
    reference: int  # voxels of the class in the label map
    reference_mm3: float

    @classmethod
    def of(cls, mask: Mask, index: int) -> Components:
        """Those of a class."""
        own, label = mask.classes == index, mask.label == index
        reference = int(label.sum())
        box = next(iter(ndimage.find_objects(own.astype(np.uint8))), (slice(0, 0),) * own.ndim)
        components, count = ndimage.label(own[box], structure=np.ones((3, 3, 3)))
        sizes, voxels, hits = (
            np.bincount(components[chosen], minlength=count + 1)[1:]
            for chosen in (own[box], mask.label[box] >= 0, label[box])
        )
        return cls(mask.patient, sizes * mask.voxel_mm3, voxels, hits, reference, reference * mask.voxel_mm3)

    def dice(self, largest: bool, smallest_mm3: float) -> float:
        """Dice of the class after this post-processing; 1 if it is in neither."""
        stays = self.volume >= smallest_mm3
        if largest and len(stays):
            stays &= np.arange(len(stays)) == self.volume.argmax()
        total = int(self.voxels[stays].sum()) + self.reference
        return 2 * int(self.hits[stays].sum()) / total if total else 1.0


def choose_postprocessing(
    masks: Iterable[Mask], classes: Sequence[str], base: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Row]]:
    """What helps significantly, by the module's rule: ``keep_largest`` and ``smallest_mm3`` of a plan, and what was tried.

    Args:
        masks: the out-of-fold masks, made with ``base``.
        classes: names of the classes, background first.
        base: the plan's own ``keep_largest`` and ``smallest_mm3``, which stay.
    """
    found: dict[str, list[Components]] = {name: [] for name in classes[1:]}
    for mask in masks:
        for index, name in enumerate(classes[1:], 1):
            found[name].append(Components.of(mask, index))
    chosen: dict[str, Any] = {
        "keep_largest": list(base.get("keep_largest", ())),
        "smallest_mm3": dict(base.get("smallest_mm3", {})),
    }
    tried = []
    for name, cases in found.items():
        largest = name in chosen["keep_largest"]
        if not largest:
            row = _gain(cases, name, (False, 0.0), [(True, 0.0)])
            tried.append(row | {"keep_largest": True, "smallest_mm3": None})
            if largest := bool(row["adopted"]):
                chosen["keep_largest"].append(name)
        if name not in chosen["smallest_mm3"] and (volumes := volumes_to_try(cases, largest)):
            row = _gain(cases, name, (largest, 0.0), [(largest, volume) for volume in volumes])
            tried.append(row | {"keep_largest": largest, "smallest_mm3": row.pop("volume")})
            if row["adopted"]:
                chosen["smallest_mm3"][name] = tried[-1]["smallest_mm3"]
    chosen["keep_largest"].sort(key=list(classes).index)
    return chosen, tried


def volumes_to_try(cases: Sequence[Components], largest: bool) -> list[float]:
    """Volumes (mm3) just above quantiles of the masks' components that are smaller than any labelled structure."""
    limit = min((case.reference_mm3 for case in cases if case.reference), default=0.0)
    volumes = [case.volume.max(initial=0.0, keepdims=True) if largest else case.volume for case in cases]
    small = [volume for own in volumes for volume in own if 0 < volume < limit]
    if not small:
        return []
    at = np.quantile(small, QUANTILES, method="higher")
    return sorted({min(readable(ABOVE * volume), limit) for volume in at})


def _gain(cases: Sequence[Components], name: str, now: tuple[bool, float], then: Sequence[tuple[bool, float]]) -> Row:
    """The best of some settings against the present one: means of Dice, the gain over patients, and its interval."""
    before, *after = ([case.dice(*setting) for case in cases] for setting in (now, *then))
    patients = list(dict.fromkeys(case.patient for case in cases))
    own = np.array([[case.patient == patient for case in cases] for patient in patients], dtype=np.float64)
    gains = (np.array(after) - before) @ own.T / own.sum(axis=1)  # (settings, patients)
    best = int(gains.mean(axis=1).argmax())
    means = bootstrap_means(gains[best : best + 1])
    low, high = (float(end) for end in np.quantile(means, (TAIL / len(then), 1 - TAIL / len(then))))
    gain = float(gains[best].mean())
    return {
        "class": name,
        "volume": then[best][1],
        "dice_before": float(np.mean(before)),
        "dice_after": float(np.mean(after[best])),
        "gain": gain,
        "low": low,
        "high": high,
        "patients": len(patients),
        "adopted": gain > 0 and low > 0 and len(patients) >= FEWEST_CASES,
    }


def sentences(tried: Sequence[Row]) -> list[str]:
    """What was adopted, in words, one sentence per class and kind; or that nothing was."""
    texts = []
    for row in tried:
        if row["adopted"]:
            smallest = row["smallest_mm3"]
            what = "only the largest component is kept" if smallest is None else f"components below {smallest:g} mm3 go"
            texts.append(
                f"Post-processing of {row['class']}: {what}. Dice {row['dice_before']:.4f} -> {row['dice_after']:.4f} on the "
                f"out-of-fold masks ({row['gain']:+.4f}, interval {row['low']:+.4f} to {row['high']:+.4f} over "
                f"{counted(row['patients'], 'patient')})."
            )
    if texts:
        return texts
    if not tried:
        return ["Post-processing: none was tried, because the regions overlap or all classes have it already."]
    few = bool(tried) and tried[0]["patients"] < FEWEST_CASES
    why = f"fewer than {FEWEST_CASES} patients cannot show it" if few else "nothing gains significantly"
    return [f"Post-processing: none was added; on the out-of-fold masks {why}."]
