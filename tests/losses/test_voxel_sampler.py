"""VoxelSampler: quotas, roles, partners, hardness, seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from medseg_supcon.losses import VoxelSampler


def label_maps(counts, shape=(2, 8, 8, 8), seed=0):
    """Label maps with so many voxels of class 0, 1, ...; the rest unlabelled."""
    n = torch.Size(shape).numel()
    flat = torch.full((n,), -1)
    start = 0
    for c, count in enumerate(counts):
        flat[start : start + count] = c
        start += count
    return flat[torch.randperm(n, generator=torch.Generator().manual_seed(seed))].view(shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    budget=st.integers(1, 400),
    strategy=st.sampled_from(("stratified", "hard", "uniform", "all")),
    background=st.sampled_from(("anchor", "negatives_only", "exclude")),
)
def test_quotas_and_roles(counts, budget, strategy, background):
    labels = label_maps(counts, (2, 10, 10, 10))
    indices, anchors = VoxelSampler(strategy, budget, background=background, seed=0)(labels)
    y = labels.flatten()[indices]
    usable = [0 if background == "exclude" and c == 0 else n for c, n in enumerate(counts)]
    taken = [int((y == c).sum()) for c in range(len(counts))]

    assert len(torch.unique(indices)) == len(indices)
    assert sum(taken) == len(indices), "an unlabelled voxel was drawn"
    assert all(t <= n for t, n in zip(taken, usable, strict=True))
    assert len(indices) == (sum(usable) if strategy == "all" else min(budget, sum(usable)))
    assert anchors.tolist() == [background != "negatives_only" or c != 0 for c in y.tolist()]
    if strategy in ("stratified", "hard"):
        # No class may have more than another that still had voxels to give, but for rounding.
        for t, n in zip(taken, usable, strict=True):
            assert t == n or t >= max(taken) - 1


def test_uniform_is_uniform_and_stratified_is_even():
    labels = label_maps([800, 200], (1, 10, 10, 10))
    drawn = torch.zeros(1000)
    sampler = VoxelSampler("uniform", 100, seed=3)
    for _ in range(400):
        drawn[sampler(labels).indices] += 1
    # Each voxel: 400 draws with probability 0.1, mean 40, standard deviation 6.
    assert 10 < drawn.min() <= drawn.max() < 72
    assert abs(drawn[labels.flatten() == 1].mean() - 40) < 2
    counts = labels.flatten()[VoxelSampler("stratified", 100, seed=3)(labels).indices].bincount()
    assert counts.tolist() == [50, 50]


def test_a_seed_repeats_a_draw_and_the_next_differs():
    labels = label_maps([500, 300])
    first, second = VoxelSampler(max_samples=60, seed=4), VoxelSampler(max_samples=60, seed=4)
    once = first(labels).indices
    assert torch.equal(once, second(labels).indices)
    assert not torch.equal(once, first(labels).indices)
    torch.manual_seed(7)
    free = VoxelSampler(max_samples=60)
    drawn = free(labels).indices
    torch.manual_seed(7)
    assert torch.equal(drawn, free(labels).indices)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(once, free(labels, generator=generator).indices)


def test_hard_voxels_lie_near_the_boundary():
    labels = torch.zeros(1, 24, 24, 24, dtype=torch.long)
    labels[:, 12:] = 1
    plane = torch.arange(24**3) // 24**2
    near = (plane >= 10) & (plane < 14)

    def share(sampler):
        return near[sampler(labels).indices].double().mean()

    assert share(VoxelSampler("hard", 400, hard_fraction=1.0, seed=0)) > 0.95
    assert 0.5 < share(VoxelSampler("hard", 400, hard_fraction=0.5, seed=0)) < 0.75
    assert share(VoxelSampler("stratified", 400, seed=0)) < 0.3


def test_hard_voxels_are_where_the_network_is_unsure():
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    logits = torch.zeros(2, 3, 16, 16)
    logits[:, 0] = 9.0
    logits[1, 0, :, :8] = 0.0  # unsure in the left half of the second scan
    indices, _ = VoxelSampler("hard", 32, hard_fraction=1.0, seed=0)(labels, logits=logits)
    assert ((indices >= 256) & (indices % 16 < 8)).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shift=st.integers(0, 5), budget=st.integers(2, 150), seed=st.integers(0, 100))
def test_partners_are_drawn_together(shift, budget, seed):
    labels = label_maps([600, 60, 5], (2, 7, 10, 10), seed)
    ids = torch.arange(700).view(7, 10, 10) + (1 << 20)  # beyond the sieve's table
    pair_ids = torch.stack((ids, ids.roll(shift, 0)))
    pair_ids[1, :shift] = -1
    sampler = VoxelSampler("stratified", budget, seed=seed)
    indices, _ = sampler(labels, pair_ids=pair_ids)
    assert len(indices) <= budget
    assert len(torch.unique(indices)) == len(indices)
    drawn = pair_ids.flatten()[indices]
    assert (drawn >= 0).all()
    assert (labels.flatten()[indices] >= 0).all()
    # Every labelled voxel of an id that was drawn is drawn.
    everywhere = torch.isin(pair_ids.flatten(), drawn) & (labels.flatten() >= 0)
    assert torch.equal(everywhere.nonzero()[:, 0], indices)


def shuffled_views(views, counts, seed):
    """One label map seen `views` times, and the ids of its voxels."""
    once = label_maps(counts, (1, 8, 8, 8), seed)
    pair_ids = torch.arange(512).view(1, 8, 8, 8)
    return once.repeat(views, 1, 1, 1), pair_ids.repeat(views, 1, 1, 1)


@pytest.mark.parametrize("strategy", ("stratified", "hard"))
@pytest.mark.parametrize(("views", "budget"), ((2, 64), (2, 65), (3, 64), (4, 64), (5, 70)))
def test_a_rare_class_is_whole_in_every_view(strategy, views, budget):
    for seed in range(20):
        labels, pair_ids = shuffled_views(views, [400, 98, 2], seed)
        indices, _ = VoxelSampler(strategy, budget, seed=seed)(labels, pair_ids=pair_ids)
        taken = labels.flatten()[indices].bincount(minlength=3).tolist()
        assert taken[2] == 2 * views
        # The others share what is left: neither is starved by the order.
        assert min(taken[:2]) > 0
        assert budget - views < sum(taken) <= budget or views == 2


def test_excluded_background_is_no_partner():
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.long)
    labels[0, :2] = 1
    pair_ids = torch.arange(64).view(1, 4, 4, 4).repeat(2, 1, 1, 1)
    for strategy in ("stratified", "uniform", "hard", "all"):
        sampler = VoxelSampler(strategy, 20, background="exclude", seed=0)
        taken = labels.flatten()[sampler(labels, pair_ids=pair_ids).indices]
        assert len(taken) > 0
        assert (taken == 1).all()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_labels_of_any_integer_dtype(dtype):
    labels = label_maps([900, 100, 24])
    expected = VoxelSampler(max_samples=60, seed=0)(labels)
    drawn = VoxelSampler(max_samples=60, seed=0)(labels.to(dtype))
    assert len(drawn.indices) == 60
    assert torch.equal(drawn.indices, expected.indices)


@pytest.mark.parametrize("strategy", ("stratified", "hard", "uniform", "all"))
@pytest.mark.parametrize("high", (10**8, 2**31, 2**62))
@pytest.mark.parametrize("paired", (False, True))
def test_a_class_id_of_any_size_needs_no_table(strategy, high, paired):
    small = label_maps([900, 100, 24]).view(2, 8, 8, 8)
    pair_ids = torch.arange(512).view(1, 8, 8, 8).repeat(2, 1, 1, 1) if paired else None
    large = torch.where(small == 2, high, small)
    with LargestTensor() as largest:
        drawn = VoxelSampler(strategy, 60, seed=0)(large, pair_ids=pair_ids)
    assert largest.elements <= 1 << 20
    expected = VoxelSampler(strategy, 60, seed=0)(small, pair_ids=pair_ids)
    assert torch.equal(drawn.indices, expected.indices)


@pytest.mark.parametrize("strategy", ("stratified", "hard", "uniform", "all"))
@pytest.mark.parametrize("paired", (False, True))
def test_nothing_to_draw(strategy, paired):
    for labels in (torch.full((2, 4, 4, 4), -3), torch.zeros(0, 4, 4, 4, dtype=torch.int32)):
        pair_ids = torch.zeros(labels.shape, dtype=torch.long) if paired else None
        indices, anchors = VoxelSampler(strategy, 9)(labels, pair_ids=pair_ids)
        assert len(indices) == len(anchors) == 0


def test_complaints():
    for option, value, kind in (
        ("max_samples", 2.5, "an integer"),
        ("max_samples", "a", "an integer"),
        ("hard_fraction", "a", "a number"),
        ("seed", 1.5, "an integer"),
        ("seed", "a", "an integer"),
    ):
        with pytest.raises(TypeError, match=f"{option} must be {kind}, got {value!r}"):
            VoxelSampler(**{option: value})
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        VoxelSampler()(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="logits must have a channel for each class, at least 3, got 2"):
        VoxelSampler("hard", 9)(label_maps([9, 9, 9]), logits=torch.zeros(2, 2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"strategy must be one of .* got 'random'"):
        VoxelSampler("random")
    with pytest.raises(ValueError, match=r"background must be one of .* got 'none'"):
        VoxelSampler(background="none")
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        VoxelSampler(max_samples=0)
    with pytest.raises(ValueError, match=r"hard_fraction must be in 0 .. 1, got 1.5"):
        VoxelSampler(hard_fraction=1.5)
    with pytest.raises(ValueError, match=r"pair_ids must match labels \(1, 4, 4\), got \(1, 4, 5\)"):
        VoxelSampler()(torch.zeros(1, 4, 4, dtype=torch.long), pair_ids=torch.zeros(1, 4, 5, dtype=torch.long))
