"""Dice + binary cross-entropy of overlapping regions, and class probabilities from regions, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric

from medseg_supcon.datasets import Regions
from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import VoxelSampler
from medseg_supcon.training import DiceCrossEntropy, class_probabilities, output_pairs, predicted_classes

HELD = {"whole": [1, 2, 3], "core": [1, 3], "top": [3]}
ORDER = [2, 1, 3]
REGIONS = Regions.of(
    {"labels": {str(v): v for v in range(4)}, "regions": HELD, "regions_class_order": ORDER},
)


def batch(ignored: float = 0.0, shape=(2, 1, 4, 3, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(shape[0], 3, *shape[2:], generator=gen)
    labels = torch.randint(0, 4, shape, generator=gen)
    labels[torch.rand(shape, generator=gen) < ignored] = -1
    return logits, labels


def voxels(logits, labels):
    """(probabilities of the regions, label) of every annotated voxel, in float64."""
    for b in range(len(labels)):
        for v, y in zip(logits[b].flatten(1).T.tolist(), labels[b].flatten().tolist(), strict=True):
            if y != -1:
                yield [1 / (1 + math.exp(-x)) for x in v], y


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_equals_loops(weights, ignored):
    logits, labels = batch(ignored)
    rows, dice, bce = list(voxels(logits, labels)), [], []
    for r, held in enumerate(HELD.values()):
        inside = [y in held for _, y in rows]
        overlap = sum(p[r] for (p, _), y in zip(rows, inside, strict=True) if y)
        dice.append(1 - (2 * overlap + 1e-5) / (sum(p[r] for p, _ in rows) + sum(inside) + 1e-5))
        bce += [-math.log(p[r] if y else 1 - p[r]) for (p, _), y in zip(rows, inside, strict=True)]
    expected = weights[0] * sum(dice) / 3 + weights[1] * sum(bce) / len(bce)
    assert float(DiceCrossEntropy(*weights, regions=REGIONS)(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_ignored_voxels_have_no_gradient():
    logits, labels = batch()
    labels[..., 2:] = -1
    logits.requires_grad_()
    DiceCrossEntropy(regions=REGIONS)(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad[..., 2:].abs().max() == 0 and logits.grad[..., :2].abs().max() > 0
    logits.grad = None
    loss = DiceCrossEntropy(regions=REGIONS)(logits, torch.full_like(labels, -1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() == 0


def test_weights_of_classes_are_refused():
    with pytest.raises(ConfigError, match="class_weights"):
        DiceCrossEntropy(class_weights=torch.ones(4), regions=REGIONS)


def test_class_probabilities_are_products():
    logits, labels = batch()
    found = class_probabilities(logits, REGIONS).movedim(1, -1).reshape(-1, 4).tolist()
    for (p, _), row in zip(voxels(logits, labels), found, strict=True):
        for c, value in enumerate(row):
            factors = [p[r] if c in held else 1 - p[r] for r, held in enumerate(HELD.values())]
            assert value == pytest.approx(math.prod(factors), abs=1e-6)
            if value > 0.5:
                assert [x > 0.5 for x in p] == [c in held for held in HELD.values()]
    assert torch.equal(class_probabilities(logits), logits.softmax(1))


def test_validation_scores_regions_and_leaves_out_ignored_voxels():
    logits, labels = batch(0.3)
    pairs = output_pairs(REGIONS)([{"pred": x, "label": y} for x, y in zip(logits, labels, strict=True)])
    metric = DiceMetric(include_background=True, reduction="none")
    metric(*pairs)
    scores = metric.aggregate().numpy()
    for b in range(len(labels)):
        rows = list(voxels(logits[b : b + 1], labels[b : b + 1]))
        for r, held in enumerate(HELD.values()):
            a, y = np.array([p[r] > 0.5 for p, _ in rows]), np.array([label in held for _, label in rows])
            assert scores[b, r] == pytest.approx(2 * (a & y).sum() / (a.sum() + y.sum()))


def test_the_overlay_shows_what_a_mask_would_hold():
    logits, _ = batch()
    found = predicted_classes(logits[0], REGIONS)
    for place in np.ndindex(tuple(found.shape)):
        value = 0
        for r, own in enumerate(ORDER):
            value = own if logits[(0, r, *place[1:])] > 0 else value
        assert int(found[place]) == value
    assert torch.equal(predicted_classes(logits[0]), logits[0].argmax(0, keepdim=True))


def test_hard_voxels_are_those_whose_regions_are_unsure():
    """A voxel of class 1 whose regions are predicted right is never hard; the sampler takes the others."""
    labels = torch.zeros(1, 1, 1, 400, dtype=torch.long)
    labels[..., 200:] = 1
    logits = torch.full((1, 3, 1, 1, 400), -9.0)
    logits[:, :2, ..., 200:300] = 9.0  # in whole and core, as class 1 is; the others are predicted as background
    sampler = VoxelSampler("hard", 40, hard_fraction=1.0, seed=0, membership=REGIONS.membership)
    drawn = sampler(labels, logits=logits).indices
    ones = drawn[drawn >= 200]
    assert len(ones) == 20 and (ones >= 300).all()
