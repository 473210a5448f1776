"""Dice + cross-entropy against loops in float64, with ignored voxels."""

from __future__ import annotations

import math

import pytest
import torch

from medseg_supcon.training import DiceCrossEntropy


def by_hand(logits, labels, weights=None):
    """Mean over foreground classes of 1 - Dice over the batch, plus the weighted mean of -log p."""
    b, c = logits.shape[:2]
    rows, truth = [], []
    for i in range(b):
        for v, y in zip(logits[i].reshape(c, -1).T.tolist(), labels[i].flatten().tolist(), strict=True):
            if y != -1:
                m = max(v)
                e = [math.exp(x - m) for x in v]
                rows.append([x / sum(e) for x in e])
                truth.append(int(y))
    dice = []
    for k in range(1, c):
        overlap = sum(p[k] for p, y in zip(rows, truth, strict=True) if y == k)
        total = sum(p[k] for p in rows) + sum(y == k for y in truth)
        dice.append(1 - (2 * overlap + 1e-5) / (total + 1e-5))
    w = [1.0] * c if weights is None else weights
    ce = sum(-w[y] * math.log(p[y]) for p, y in zip(rows, truth, strict=True)) / sum(w[y] for y in truth)
    return sum(dice) / len(dice) + ce


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_equals_loops(weights, ignored):
    gen = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 3, 5, generator=gen)
    labels = torch.randint(0, 3, (2, 1, 4, 3, 5), generator=gen)
    labels[torch.rand(labels.shape, generator=gen) < ignored] = -1
    loss = DiceCrossEntropy(class_weights=None if weights is None else torch.tensor(weights))
    assert float(loss(logits, labels)) == pytest.approx(by_hand(logits.double(), labels, weights), rel=1e-5)


def test_ignored_voxels_have_no_gradient():
    logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (1, 1, 4, 4, 4))
    labels[..., 2:] = -1
    DiceCrossEntropy()(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad[..., 2:].abs().max() == 0
    assert logits.grad[..., :2].abs().max() > 0


def test_all_ignored_is_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    loss = DiceCrossEntropy()(logits, torch.full((1, 1, 4, 4, 4), -1))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.abs().max() == 0
