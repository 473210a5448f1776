"""What is adopted on masks whose right answer is known; Dice against post-processing by a slow loop."""

from __future__ import annotations

from collections import deque
from itertools import product
from typing import Any

import numpy as np
import pytest

from medseg_supcon.comparison import Mask, choose_postprocessing
from medseg_supcon.comparison.postprocessing import Components

CLASSES = ["background", "organ", "lesion"]


def components_of(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Connected voxels, 26 neighbours, by a search from voxel to voxel."""
    left, parts = {tuple(map(int, v)) for v in np.argwhere(mask)}, []
    steps = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
    while left:
        part, queue = set(), deque([min(left)])
        left.remove(queue[0])
        while queue:
            voxel = queue.popleft()
            part.add(voxel)
            for step in steps:
                near = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if near in left:
                    left.remove(near)
                    queue.append(near)
        parts.append(part)
    return parts


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("smallest", [0.0, 1.0, 2.5, 100.0])
def test_dice_of_a_setting(largest: bool, smallest: float) -> None:
    rng = np.random.default_rng(4)
    classes, label = ((rng.random((7, 8, 6)) < 0.12).astype(int) for _ in range(2))
    label[rng.random(label.shape) < 0.1] = -1
    parts = [part for part in components_of(classes == 1) if 0.5 * len(part) >= smallest]
    parts = [max(parts, key=len)] if parts and largest else parts
    kept = np.zeros(label.shape, dtype=bool)
    for part in parts:
        kept[tuple(np.array(sorted(part)).T)] = True
    kept &= label >= 0
    expected = 2 * (kept & (label == 1)).sum() / (kept.sum() + (label == 1).sum())
    dice = Components.of(Mask("p", classes, label, 0.5), 1).dice(largest, smallest)
    assert dice == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("labelled", "dice"), [(0, 1.0), (1, 0.0)])
def test_a_mask_without_the_class(labelled: int, dice: float) -> None:
    label = np.full((4, 5, 6), labelled)
    assert Components.of(Mask("p", np.zeros_like(label), label, 1.0), 1).dice(True, 3.0) == dice


def masks(specks: list[int], patients: list[str] | None = None, big: int = 6, piece: int = 0) -> list[Mask]:
    """Organs of big^3 voxels of 2 mm3 that are found whole, and per mask a false component of so many voxels in a row.

    ``piece``: a true second part of the organ, of so many voxels in a row.
    """
    made = []
    for number, speck in enumerate(specks):
        label = np.zeros((16, 16, 16), dtype=int)
        label[1 : 1 + big, 1 : 1 + big, 1 : 1 + big] = 1
        label[9 : 9 + piece, 1, 14] = 1
        label[12:14, 12:14, 12:14] = 2
        classes = label.copy()
        classes[1 : 1 + speck, 14, 14] = 1
        made.append(Mask(patients[number] if patients else f"p{number}", classes, label, 2.0))
    return made


def test_the_largest_component_is_kept_where_the_rest_is_false() -> None:
    chosen, tried = choose_postprocessing(masks([3, 2, 3, 1, 2, 3, 4, 3]), CLASSES, {"keep_largest": []})
    assert chosen == {"keep_largest": ["organ"], "smallest_mm3": {}}
    row = next(row for row in tried if row["adopted"])
    dice = [2 * 216 / (432 + speck) for speck in (3, 2, 3, 1, 2, 3, 4, 3)]
    assert row["dice_before"] == pytest.approx(np.mean(dice)) and row["dice_after"] == 1
    assert row["gain"] == pytest.approx(1 - np.mean(dice)) and 0 < row["low"] < row["gain"] < row["high"]


def test_a_smallest_volume_where_a_class_has_two_parts() -> None:
    """The organ's second part is 5 voxels (10 mm3), the false components are at most 4 (8 mm3)."""
    chosen, tried = choose_postprocessing(masks([3, 4, 4, 4, 4, 4, 4, 4], piece=5), CLASSES, {"keep_largest": []})
    assert chosen["keep_largest"] == []
    assert 8 < chosen["smallest_mm3"]["organ"] <= 10 and "lesion" not in chosen["smallest_mm3"]
    assert {row["class"]: row["dice_after"] for row in tried if row["adopted"]} == {"organ": 1.0}


@pytest.mark.parametrize(
    ("specks", "patients"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 0], None),  # nothing to gain
        ([3, 0, 0, 0, 0, 0, 0, 0], None),  # one scan of eight: the interval reaches 0
        ([3, 2, 3, 1, 2], None),  # five patients
        ([3, 2, 3, 1, 2, 3, 4, 3], list("abcdeabc")),  # eight scans, five patients
    ],
)
def test_nothing_is_adopted(specks: list[int], patients: list[str] | None) -> None:
    chosen, _ = choose_postprocessing(masks(specks, patients), CLASSES, {"keep_largest": []})
    assert chosen == {"keep_largest": [], "smallest_mm3": {}}


def test_what_hurts_is_not_adopted() -> None:
    """The second part is true and larger than the false components; without it the largest alone would win."""
    chosen, tried = choose_postprocessing(masks([1] * 8, piece=7), CLASSES, {"keep_largest": []})
    assert chosen["keep_largest"] == [] and tried[0]["gain"] < 0


def test_what_the_plan_had_stays() -> None:
    base: dict[str, Any] = {"keep_largest": ["lesion"], "smallest_mm3": {"lesion": 3.0}}
    chosen, tried = choose_postprocessing(masks([3, 2, 3, 1, 2, 3, 4, 3]), CLASSES, base)
    assert chosen == {"keep_largest": ["organ", "lesion"], "smallest_mm3": {"lesion": 3.0}}
    assert {row["class"] for row in tried} == {"organ"} and base["keep_largest"] == ["lesion"]


def test_a_class_found_where_there_is_none() -> None:
    """The lesion is in no label map of half of the patients, but in their masks: removing it makes these masks right."""
    cases = masks([0] * 12)
    for case in cases[:6]:
        case.label[case.label == 2] = 0
        case.classes[12:14, 12:14, 13] = 0
    chosen, _ = choose_postprocessing(cases, CLASSES, {"keep_largest": []})
    assert 8 < chosen["smallest_mm3"]["lesion"] <= 16
