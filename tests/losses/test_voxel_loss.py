"""VoxelSupConLoss: what it samples, gathers, projects and contrasts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg_supcon.losses import DiceSupConLoss, MemoryBank, SupConLoss, VoxelSampler, VoxelSupConLoss

ARTICLE = {"positives": "same_voxel", "denominator": "same_class", "keys": "other_view"}
ALL = VoxelSampler("all")


def batch(shape=(4, 5, 3), elements=4, channels=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    return {
        "features": torch.randn(elements, channels, *shape, generator=g),
        "labels": torch.randint(-1, classes, (elements, 1, *shape), generator=g),
        "pair_ids": torch.stack([torch.randperm(n, generator=g).view(1, *shape) - 3 for _ in range(elements)]),
        "view_ids": torch.arange(elements) % 2,
        "scan_ids": torch.arange(elements) // 2,
    }


def by_hand(loss, b, elements=None, projection=None):
    """The loss of every labelled voxel of some batch elements, rows made with plain loops over elements."""
    rows, labels, pairs, views = [], [], [], []
    for e in range(len(b["features"])) if elements is None else elements:
        known = b["labels"][e, 0].flatten() >= 0
        rows.append(b["features"][e].flatten(1).t()[known])
        labels.append(b["labels"][e, 0].flatten()[known])
        ids = b["pair_ids"][e, 0].flatten()[known]
        alone = -1 - torch.arange(len(ids)) - 1000 * e
        pairs.append(torch.where(ids >= 0, ids + 10_000 * b["scan_ids"][e], alone))
        views.append(torch.full_like(ids, int(b["view_ids"][e])))
    z = torch.cat(rows)
    z = projection(z) if projection is not None else z
    return loss(z, torch.cat(labels), pair_ids=torch.cat(pairs), view_ids=torch.cat(views))


@pytest.mark.parametrize("shape", ((30,), (6, 5), (4, 5, 3)))
@pytest.mark.parametrize("options", ({}, {"positives": "same_voxel"}, ARTICLE, {"denominator": "other_class"}))
def test_equals_the_loss_of_its_voxels(shape, options):
    b, projection, loss = batch(shape), nn.Linear(6, 4), SupConLoss(0.1, **options)
    b["features"].requires_grad_()
    mine = VoxelSupConLoss(loss, ALL, projection)(**b)
    (gradient,) = torch.autograd.grad(mine, b["features"])
    expected = by_hand(loss, b, projection=projection)
    (expected_gradient,) = torch.autograd.grad(expected, b["features"])
    assert mine.item() > 0
    torch.testing.assert_close((mine, gradient), (expected, expected_gradient), rtol=1e-5, atol=1e-6)


def test_within_scan_is_the_mean_over_scans():
    b, loss = batch(), SupConLoss(**ARTICLE)
    mine = VoxelSupConLoss(loss, ALL, within_scan=True)(**b)
    torch.testing.assert_close(mine, (by_hand(loss, b, (0, 1)) + by_hand(loss, b, (2, 3))) / 2)
    b["labels"][2:] = -1
    mine = VoxelSupConLoss(loss, ALL, within_scan=True)(**b)
    torch.testing.assert_close(mine, by_hand(loss, b, (0, 1)))


def test_label_forms_agree():
    b = batch()
    module = VoxelSupConLoss(SupConLoss(), ALL)
    expected = module(b["features"], b["labels"])
    one_hot = torch.cat([b["labels"] == c for c in range(3)], 1)
    for labels in (b["labels"].float(), b["labels"].to(torch.int8), one_hot, one_hot.float()):
        assert torch.equal(module(b["features"], labels), expected)
    other_ignore = VoxelSupConLoss(SupConLoss(ignore_index=255), ALL)
    as_255 = b["labels"].masked_fill(b["labels"] < 0, 255).to(torch.uint8)
    assert torch.equal(other_ignore(b["features"], as_255), expected)


def test_layout_and_half_precision():
    b = batch((6, 5, 4))
    module = VoxelSupConLoss(SupConLoss(), ALL, nn.Linear(6, 4))
    expected = module(b["features"], b["labels"])
    last = b["features"].to(memory_format=torch.channels_last_3d).requires_grad_()
    value = module(last, b["labels"])
    value.backward()
    torch.testing.assert_close(value, expected)
    half = b["features"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        under = module(half, b["labels"])
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, module(half, b["labels"]))


def test_projects_only_what_it_sampled():
    seen = []

    class Spy(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(rows.shape), rows.dtype))
            return rows

    b = batch()
    VoxelSupConLoss(SupConLoss(), VoxelSampler(max_samples=17), Spy())(b["features"].half(), b["labels"])
    assert seen == [((17, 6), torch.float32)]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
@pytest.mark.parametrize("given", (torch.float16, torch.float32, torch.float64))
def test_rows_take_the_dtype_of_the_projection(dtype, given):
    b = batch()
    torch.manual_seed(0)
    projection = nn.Linear(6, 4)
    expected = VoxelSupConLoss(SupConLoss(), ALL, projection)(b["features"], b["labels"])
    value = VoxelSupConLoss(SupConLoss(), ALL, projection.to(dtype))(b["features"].to(given), b["labels"])
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # bfloat16 keeps two to three digits of an embedding.
    torch.testing.assert_close(value.float(), expected, rtol=0.05, atol=0.0)


def test_a_broken_batch_does_not_poison_the_bank():
    b = batch()
    module = VoxelSupConLoss(SupConLoss(), ALL, bank=MemoryBank(3, 6, 200))
    broken = {**b, "features": b["features"].clone()}
    broken["features"][0, 0] = torch.inf
    assert not module(**broken).isfinite()
    assert module(**b).isfinite()


def test_background_as_negatives_only():
    b = batch()
    b["labels"].clamp_(0)
    z, y = b["features"].movedim(1, -1).reshape(-1, 6), b["labels"].flatten()
    mine = VoxelSupConLoss(SupConLoss(), VoxelSampler("all", background="negatives_only"))(**b)
    torch.testing.assert_close(mine, SupConLoss()(z, y, anchors=y > 0))


def test_the_same_voxel_of_another_scan_is_no_positive():
    b = batch(elements=2)
    b["labels"].clamp_(0)
    b["pair_ids"] = torch.arange(60).view(1, 1, 4, 5, 3).repeat(2, 1, 1, 1, 1)
    module = VoxelSupConLoss(SupConLoss(positives="same_voxel"), ALL)
    assert module(**{**b, "scan_ids": torch.tensor([3, 3])}) > 0
    assert module(**{**b, "scan_ids": torch.tensor([3, 8])}) == 0


def test_sampled_voxels_have_partners():
    b = batch((12, 12, 12), elements=4)
    module = VoxelSupConLoss(SupConLoss(**ARTICLE), VoxelSampler(max_samples=40, seed=0))
    assert module(**b) > 0


@pytest.mark.parametrize("options", ({}, ARTICLE))
def test_nothing_labelled_is_zero_and_attached(options):
    b, projection = batch(), nn.Linear(6, 4)
    b["labels"][:] = -1
    b["features"].requires_grad_()
    for within_scan in (False, True):
        value = VoxelSupConLoss(SupConLoss(**options), VoxelSampler(), projection, within_scan=within_scan)(**b)
        assert value.item() == 0.0
        value.backward()
    assert (b["features"].grad == 0).all()
    assert all((p.grad == 0).all() for p in projection.parameters())


def test_the_bank_fills_in_training_and_serves_the_next_step():
    b, bank = batch(), MemoryBank(3, 6, 8)
    module = VoxelSupConLoss(SupConLoss(), ALL, bank=bank, enqueue_per_class=2)
    plain = VoxelSupConLoss(SupConLoss(), ALL)(**b)
    assert torch.equal(module(**b), plain)
    assert bank.entries()[1].tolist() == [0, 0, 1, 1, 2, 2]
    b["features"].requires_grad_()
    second = module(**b)
    assert second > plain
    module(**b)  # the bank is overwritten before the backward pass of an earlier step
    second.backward()
    held = bank.entries()[0].clone()
    module.eval()
    module(**b)
    assert torch.equal(bank.entries()[0], held)
    assert "bank.embeddings" in module.state_dict()


def test_hard_sampling_takes_logits():
    b = batch()
    logits = torch.randn(4, 3, 4, 5, 3, requires_grad=True)
    mine = VoxelSupConLoss(SupConLoss(), VoxelSampler("hard", 20, seed=0))(**b, logits=logits)
    z, y = b["features"].movedim(1, -1).reshape(-1, 6), b["labels"].flatten()
    hard, near = (VoxelSampler("hard", 20, seed=0)(b["labels"][:, 0], logits=given)[0] for given in (logits, None))
    torch.testing.assert_close(mine, SupConLoss()(z[hard], y[hard]))
    assert not torch.equal(hard, near)


def test_balanced_is_right_whatever_the_sampler_finds():
    # 12 voxels of class 2 beside 8,000 of class 0 and 1: of 300 samples, the quota of each class is 100.
    g = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(1, 6, 20, 20, 20, generator=g),
        torch.randint(2, (1, 1, 20, 20, 20), generator=g),
    )
    for rare in (100, 12):
        labels[labels == 2] = 0
        labels.view(-1)[torch.randperm(8000, generator=g)[:rare]] = 2
        voxels = VoxelSampler(max_samples=300, seed=0)(labels[:, 0]).indices
        z, y = features.flatten(2)[0].t()[voxels], labels.flatten()[voxels]
        means = [SupConLoss()(z, y, anchors=y == c).item() for c in range(3)]
        values = []
        for weights in (None, "balanced"):
            loss = VoxelSupConLoss(SupConLoss(class_weights=weights), VoxelSampler(max_samples=300, seed=0))
            both = DiceSupConLoss(lambda logits, labels: logits.mean() * 0, loss, weight=1.0)
            values.append(both(features, labels, features).item())
        assert (y == 2).sum() == rare
        assert values[1] == pytest.approx(sum(means) / 3, rel=1e-5)
        if rare == 100:
            assert values[0] == pytest.approx(values[1], rel=1e-6)  # every quota is filled
        else:
            share = 12 / 300  # what class 2 gets without weights
            assert values[0] == pytest.approx(share * means[2] + (1 - share) * (means[0] + means[1]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"features": torch.zeros(4, 6)}, {}, r"features must be \(B, F, \*spatial\)"),
        ({"labels": torch.zeros(4, 1, 4, 5, 2)}, {}, r"labels must be .*got \(4, 1, 4, 5, 2\)"),
        ({"labels": torch.full((4, 1, 4, 5, 3), 0.5)}, {}, "whole numbers.* got 0.5"),
        ({"labels": torch.zeros(4, 0, 4, 5, 3)}, {}, r"labels must be .*got \(4, 0, 4, 5, 3\)"),
        ({"pair_ids": None}, ARTICLE, "pair_ids must be given for positives='same_voxel', got None"),
        ({"pair_ids": torch.zeros(4, 4, 5, 3, dtype=torch.long)}, ARTICLE, r"pair_ids must be \(4, 1, 4, 5, 3\), got"),
        ({"pair_ids": torch.full((4, 1, 4, 5, 3), 1 << 40)}, ARTICLE, r"below 2\*\*40 .* got 1099511627776"),
        ({"view_ids": None}, ARTICLE, "view_ids must be given"),
        ({"scan_ids": torch.zeros(3, dtype=torch.long)}, {}, r"scan_ids must be \(4,\), got \(3,\)"),
    ],
)
def test_complaints(change, options, words):
    with pytest.raises(ValueError, match=words):
        VoxelSupConLoss(SupConLoss(**options), VoxelSampler())(**{**batch(), **change})


def test_complaints_of_the_constructor():
    with pytest.raises(ValueError, match="bank must be None"):
        VoxelSupConLoss(SupConLoss(), VoxelSampler(), bank=MemoryBank(1, 1, 1), within_scan=True)
    with pytest.raises(ValueError, match="enqueue_per_class must be at least 1, got 0"):
        VoxelSupConLoss(SupConLoss(), VoxelSampler(), enqueue_per_class=0)
    with pytest.raises(ValueError, match="scan_ids must be given"):
        VoxelSupConLoss(SupConLoss(), VoxelSampler(), within_scan=True)(**{**batch(), "scan_ids": None})
