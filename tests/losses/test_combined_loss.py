"""DiceSupConLoss, class weights, and the examples of the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

from medseg_supcon import losses
from medseg_supcon.losses import (
    DiceSupConLoss,
    SupConLoss,
    VoxelSampler,
    VoxelSupConLoss,
    balanced_class_weights,
)


def batch():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 3, 4, 4, generator=g, requires_grad=True),
        torch.randint(3, (2, 1, 4, 4), generator=g),
        torch.randn(2, 5, 4, 4, generator=g, requires_grad=True),
    )


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels[:, 0])


def make(**options):
    return DiceSupConLoss(cross_entropy, VoxelSupConLoss(SupConLoss(), VoxelSampler("all"), nn.Linear(5, 4)), **options)


def test_the_sum_and_its_terms():
    logits, labels, features = batch()
    loss = make(weight=0.3)
    value = loss(logits, labels, features)
    contrastive = loss.contrastive_loss(features, labels)
    torch.testing.assert_close(value, cross_entropy(logits, labels) + 0.3 * contrastive)
    assert {key: round(t.item(), 5) for key, t in loss.terms.items()} == {
        "loss": round(value.item(), 5),
        "segmentation": round(cross_entropy(logits, labels).item(), 5),
        "contrastive": round(contrastive.item(), 5),
        "contrast_weight": 0.3,
    }
    assert not any(t.requires_grad for t in loss.terms.values())
    value.backward()
    assert logits.grad is not None
    assert features.grad.abs().sum() > 0
    assert len(list(loss.parameters())) == 2


def test_warm_up_is_linear_and_survives_a_checkpoint():
    logits, labels, features = batch()
    loss = make(weight=1.0, warmup_steps=4)
    weights = []
    for step in range(6):
        if step == 2:
            loaded = make(weight=1.0, warmup_steps=4)
            loaded.load_state_dict(loss.state_dict())
            loss = loaded
            loss.eval()
            loss(logits, labels, features)  # no step of training
            loss.train()
        loss(logits, labels, features)
        weights.append(loss.terms["contrast_weight"].item())
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert int(loss.step) == 6


def test_weight_zero_needs_no_features():
    logits, labels, _ = batch()
    loss = make(weight=0.0, warmup_steps=3)
    assert torch.equal(loss(logits, labels), cross_entropy(logits, labels))
    assert loss.terms["contrastive"] == 0
    assert loss.terms["contrast_weight"] == 0


def test_complaints():
    logits, labels, _ = batch()
    with pytest.raises(ValueError, match=r"features must be given .*weight=0.1.*got None"):
        make()(logits, labels)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        make(weight=-1)
    with pytest.raises(ValueError, match="weight must be finite, got inf"):
        make(weight=float("inf"))
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        make(warmup_steps=-1)
    for steps in (1.5, float("nan"), "a"):
        with pytest.raises(TypeError, match=f"warmup_steps must be an integer, got {steps!r}"):
            make(warmup_steps=steps)


def test_the_weight_is_as_precise_as_the_segmentation_loss():
    loss = DiceSupConLoss(lambda a, b: a.mean(), lambda f, labels, **ids: f.sum(), weight=0.1)
    ones = torch.ones(2, dtype=torch.float64)
    assert loss(ones, ones, ones).item() == pytest.approx(1.2, abs=1e-15)


def test_balanced_class_weights():
    counts = torch.tensor([700, 200, 0, 100])
    w = balanced_class_weights(counts)
    # n / (C n_c): each class that occurs weighs n / C in all.
    torch.testing.assert_close(w * counts, torch.tensor([250.0, 250.0, 0.0, 250.0], dtype=torch.float64))
    torch.testing.assert_close(balanced_class_weights((counts / 1000).tolist()), w)
    for wrong in ([], [0, 0], [1, -1], [1, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="counts must be"):
            balanced_class_weights(torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"counts must be real numbers.* got 'ab'"):
        balanced_class_weights("ab")


def test_examples_of_the_docstrings():
    examples = 0
    for info in pkgutil.iter_modules(losses.__path__):
        module = importlib.import_module(f"{losses.__name__}.{info.name}")
        for test in doctest.DocTestFinder().find(module, globs=dict(vars(module), torch=torch, nn=nn)):
            failed, ran = doctest.DocTestRunner().run(test)
            assert failed == 0, test.name
            examples += ran
    assert examples > 10
