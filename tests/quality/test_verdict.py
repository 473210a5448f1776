"""Verdicts and their reasons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot

from medseg_supcon.quality import Evidence, agreement, rate
from medseg_supcon.quality.model import Estimate
from medseg_supcon.scans import Grid

PLAN: dict[str, Any] = {
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "fingerprint": {
        "shape": {"min": [30, 40, 24], "median": [35, 50, 36], "max": [42, 58, 45]},
        "spacing": {"min": [1, 1, 1], "median": [1, 1, 1], "max": [1, 1, 1]},
        "volume_ml": {
            "Anterior": {"min": 1.0, "median": 1.8, "max": 2.2},
            "Posterior": {"min": 1.1, "median": 1.6, "max": 2.0},
        },
    },
}
GRID = Grid.at((36, 50, 36), np.eye(4))


class FixedModel:
    """A quality model that always gives one estimate."""

    def __init__(self, mean: float, good_from: float = 0.75, distance: float = 0.9) -> None:
        self.mean, self.good_from, self.distance = mean, good_from, distance

    def estimate(self, _: Evidence) -> Estimate:
        dice = np.array([self.mean + 0.02, self.mean - 0.02])
        return Estimate(dice, self.mean, self.mean - 0.06, self.mean + 0.05, np.full(2, self.distance))


def seen(*volume: float) -> Evidence:
    nothing = np.full((3, 4), np.nan)
    return Evidence(np.array([50.0, *volume]), nothing, nothing, nothing, np.zeros(7), np.zeros(3), [])


def verdict(mean: float, *volume: float, **other: Any) -> dict[str, Any]:
    return rate(PLAN, other.pop("grid", GRID), [seen(*(volume or (1.8, 1.6)))], [FixedModel(mean)], **other)


def test_a_good_mask_has_no_reason() -> None:
    assert verdict(0.86) == {
        "dice": {"Anterior": 0.88, "Posterior": 0.84, "mean": 0.86},
        "interval": [0.8, 0.91],
        "verdict": "good",
        "reasons": [],
    }


def test_low_predictions() -> None:
    assert (
        verdict(0.78)["verdict"] == "review"
        and "as low as 0.72; good masks have at least 0.75" in verdict(0.78)["reasons"][0]
    )
    assert verdict(0.3)["verdict"] == "reject"
    assert verdict(0.86, review_below=0.82)["verdict"] == "review"
    assert verdict(0.78, review_below=0.7)["verdict"] == "good"


@pytest.mark.parametrize(
    ("volume", "expected", "reason"),
    [
        ((3.5, 1.6), "review", "Anterior: volume 3.5 ml, training scans have 1 to 2.2 ml"),
        ((1.8, 0.5), "review", "Posterior: volume 0.5 ml, training scans have 1.1 to 2 ml"),
        ((540.0, 537.0), "reject", "Anterior: volume 540 ml, training scans have 1 to 2.2 ml"),
        ((1.8, 0.0), "review", "Posterior was not found, every training scan has it"),
        ((0.0, 0.0), "reject", "Anterior was not found, every training scan has it"),
    ],
)
def test_volumes(volume: tuple[float, float], expected: str, reason: str) -> None:
    result = verdict(0.86, *volume)
    assert result["verdict"] == expected and result["reasons"][0] == reason
    bare = rate(PLAN, GRID, [seen(*volume)], [None])
    assert bare == {"verdict": expected, "reasons": result["reasons"]}


def test_without_a_model_nothing_is_promised() -> None:
    assert rate(PLAN, GRID, [seen(1.8, 1.6)], [None]) == {"verdict": None, "reasons": []}
    assert rate(PLAN, GRID, [seen(1.8, 1.6)], [None], ["all voxels have one value"])["verdict"] == "review"


def test_spacing_and_field_of_view_are_compared_along_the_axes_of_the_body() -> None:
    turned = np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert verdict(0.86, grid=Grid.at((50, 36, 36), turned))["verdict"] == "good"
    thick = verdict(0.86, grid=Grid.at((36, 50, 9), np.diag([1, 1, 4.0, 1])))
    assert thick["verdict"] == "review" and thick["reasons"] == [
        "spacing 1 x 1 x 4 mm, training scans have 1 x 1 x 1 mm"
    ]
    body = verdict(0.86, grid=Grid.at((400, 400, 300), np.eye(4)))
    assert body["verdict"] == "reject" and body["reasons"][0].startswith(
        "field of view 400 x 400 x 300 mm, training scans have 30 x"
    )


def test_voxels_unlike_those_of_training_are_a_reason() -> None:
    result = rate(PLAN, GRID, [seen(1.8, 1.6)], [FixedModel(0.86, distance=2.3)])
    assert result["verdict"] == "review" and "2.3 times the usual" in result["reasons"][0]


def test_an_ensemble_is_trusted_no_more_than_it_agrees() -> None:
    models, two = [FixedModel(0.88), FixedModel(0.84)], [seen(1.8, 1.6), seen(1.9, 1.5)]
    result = rate(PLAN, GRID, two, models, agreement=np.array([0.95, 0.93]))
    assert result["dice"]["mean"] == 0.86 and result["verdict"] == "good"
    apart = rate(PLAN, GRID, two, models, agreement=np.array([0.4, 0.3]))
    assert apart["dice"] == {"Anterior": 0.4, "Posterior": 0.3, "mean": 0.35} and apart["verdict"] == "reject"
    assert "the runs of the ensemble disagree: mean Dice between their masks 0.35" in apart["reasons"]


def test_agreement_is_monais_dice_between_all_pairs() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (6, 7, 8)).astype(np.uint8) for _ in range(3)]
    encoded = [one_hot(torch.from_numpy(m.astype(np.int64))[None, None], 4) for m in masks]
    pairs = [
        DiceMetric(include_background=False, reduction="none")(encoded[a], encoded[b])[0].numpy()
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    result = agreement(masks, 4)
    assert result[:2] == pytest.approx(np.mean(pairs, axis=0)[:2]) and result[2] == 1
