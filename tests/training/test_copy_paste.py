"""Copy and paste between labelled and unlabelled patches: what moves, where from, and that it stays a box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.errors import ConfigError
from medseg_supcon.training import CopyPaste, MixedSampler, prepare_views

SHAPE = (6, 5, 4)


def batch(labelled: list[bool], seed: int):
    """Every voxel of every patch has a value of its own; labels follow from it."""
    rng, views = np.random.default_rng(seed), (len(labelled), 2, 1, *SHAPE)
    image = np.arange(np.prod(views), dtype=np.float64).reshape(views)
    label, pseudo = rng.integers(0, 3, views), rng.integers(-1, 3, views)
    for scan, known in enumerate(labelled):
        (pseudo if known else label)[scan] = -1
    pairs = np.broadcast_to(np.arange(np.prod(SHAPE)).reshape(SHAPE), views).copy()
    made = {"image": image, "label": label, "pair_ids": pairs}
    return {name: torch.from_numpy(value) for name, value in made.items()}, torch.from_numpy(pseudo)


@given(
    labelled=st.lists(st.booleans(), min_size=1, max_size=4),
    size=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_each_pair_exchanges_one_box_and_nothing_else_changes(labelled, size, seed):
    data, pseudo = batch(labelled, seed)

    def prepare(batchdata, *arguments, **more):
        image, target = prepare_views(batchdata, *arguments, **more)
        return image, {**target, "pseudo_label": pseudo.flatten(0, 1).clone()}

    torch.manual_seed(seed)
    image, target = CopyPaste(prepare, size)(data)
    source = data["image"].flatten().numpy().astype(int)  # value = its own place in the batch
    before = {"label": data["label"].flatten(), "pseudo_label": pseudo.flatten()}
    came_from = image.flatten().numpy().astype(int)
    if labelled.count(False) <= labelled.count(True):
        assert sorted(came_from) == sorted(source), "voxels are exchanged, none lost or doubled"
    for name, value in before.items():  # label and pseudo-label came along
        assert torch.equal(target[name].flatten(), value[came_from]), name
    moved = (came_from != source).reshape(image.shape)
    assert (target["pair_ids"].numpy()[moved] == -1).all()
    assert torch.equal(target["pair_ids"][torch.from_numpy(~moved)], data["pair_ids"].flatten(0, 1)[~moved])
    edges = [round(size * length) for length in SHAPE]
    known = [scan for scan, yes in enumerate(labelled) if yes]
    for number, other in enumerate(scan for scan, yes in enumerate(labelled) if not yes):
        for view in (0, 1):
            row = 2 * other + view
            if not known:
                assert not moved[row].any()
                continue
            places = np.argwhere(moved[row, 0])
            assert len(places) == np.prod(edges)
            if len(places):
                assert (np.ptp(places, axis=0) + 1 == edges).all(), "a box"
                partners = set(came_from.reshape(image.shape)[row][moved[row]] // np.prod(SHAPE))
                assert partners == {2 * known[number % len(known)] + view}, "of the same view"


def test_probability_zero_changes_nothing():
    data, pseudo = batch([True, False], 0)

    def prepare(batchdata, *arguments, **more):
        image, target = prepare_views(batchdata)
        return image, {**target, "pseudo_label": pseudo.flatten(0, 1)}

    assert torch.equal(CopyPaste(prepare, probability=0.0)(data)[0], data["image"].flatten(0, 1))


@pytest.mark.parametrize("given_", [{"size": 1.2}, {"probability": -0.1}])
def test_what_is_out_of_range_is_a_sentence(given_):
    with pytest.raises(ConfigError, match="copy_paste"):
        CopyPaste(lambda data: (data, {}), **given_)


def test_before_its_first_epoch_the_sampler_draws_labelled_scans_alone():
    sampler = MixedSampler(2, 3, steps_per_epoch=2, batch_size=2, share=0.5, first_epoch=3)
    assert all(case < 2 for epoch in (1, 2) for case in sampler.order(epoch))
    assert sum(case >= 2 for case in sampler.order(3)) == 2
