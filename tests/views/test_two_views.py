"""What TwoViewsd promises of shapes, fill, draws and errors."""

from __future__ import annotations

import copy

import monai.transforms as mt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from medseg_supcon.errors import ConfigError
from medseg_supcon.views import ForegroundIndexd, TwoViewsd, identity_view, standard_view

PATCH = (8, 12, 6)


def case(shape: tuple[int, ...] = (14, 13, 9), channels: int = 1, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(channels, *shape, generator=generator) + 1
    label = torch.randint(-1, 3, (1, *shape), generator=generator)
    affine = torch.diag(torch.tensor([2.0, -1.0, 3.0, 1.0], dtype=torch.float64))
    return {
        "image": MetaTensor(image, affine=affine),
        "label": MetaTensor(label, affine=affine),
        "name": "scan 1",
        "elsewhere": 3,
    }


@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    patch=st.tuples(*[st.integers(2, 10)] * 3),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_scan_gives_two_plain_patches(
    shape: tuple[int, ...], patch: tuple[int, ...], channels: int, seed: int
) -> None:
    views = TwoViewsd(patch, standard_view(patch, flip_axes=(0, 2))).set_random_state(seed)
    item = views(case(shape, channels))
    assert set(item) == {"image", "label", "pair_ids", "name"}
    assert item["name"] == "scan 1"
    assert item["image"].shape == (2, channels, *patch)
    assert item["label"].shape == item["pair_ids"].shape == (2, 1, *patch)
    assert item["image"].dtype == torch.float32
    assert item["label"].dtype == item["pair_ids"].dtype == torch.int64
    assert not any(isinstance(value, MetaTensor) for value in item.values())
    assert torch.isfinite(item["image"]).all()
    assert set(item["label"].unique().tolist()) <= {-1, 0, 1, 2}
    assert item["pair_ids"].min() >= -1
    assert item["pair_ids"].max() < np.prod(patch)
    # an id of view 2 is an id that view 1 has
    ids_1, ids_2 = item["pair_ids"]
    assert set(ids_2.unique().tolist()) <= set(ids_1.unique().tolist()) | {-1}


def test_without_augmentation_a_view_is_the_scan_and_its_surroundings() -> None:
    scan = case((5, 30, 4))
    views = TwoViewsd(PATCH, identity_view(PATCH), foreground=0.0, jitter=0.0)
    for seed in range(5):
        item = views.set_random_state(seed)(scan)
        assert torch.equal(item["image"][0], item["image"][1])
        assert torch.equal(item["pair_ids"][0], item["pair_ids"][1])
        inside = item["pair_ids"][0] >= 0
        # the scan is 5 x 30 x 4: all of it on two axes, 12 of 30 on the other
        assert inside.sum() == 5 * 12 * 4
        assert (item["image"][0][~inside] == 0).all()
        assert (item["label"][0][~inside] == -1).all()
        shown = item["image"][0][inside].reshape(5, 12, 4)
        windows = torch.as_tensor(scan["image"])[0].unfold(1, 12, 1).permute(1, 0, 3, 2)
        hits = [k for k, window in enumerate(windows) if torch.equal(torch.as_tensor(window), shown)]
        assert len(hits) == 1
        expected = torch.as_tensor(scan["label"])[0, :, hits[0] : hits[0] + 12]
        assert torch.equal(item["label"][0][inside].reshape(5, 12, 4), torch.as_tensor(expected))


def test_draws_belong_to_the_seed() -> None:
    scan = case()

    def draw(views: TwoViewsd, seed: int) -> dict[str, torch.Tensor]:
        return views.set_random_state(seed)(scan)

    policy = standard_view(PATCH, flip_axes=(0, 1, 2), low_resolution=0.5)
    first, second = TwoViewsd(PATCH, policy), TwoViewsd(PATCH, copy.deepcopy(policy))
    for seed in range(6):
        a = draw(first, seed)
        draw(second, 99)  # what was drawn before is without effect
        np.random.seed(seed + 7)  # noqa: NPY002  (nor is the global state)
        b = draw(second, seed)
        assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "pair_ids"))
    assert not torch.equal(draw(first, 0)["image"], draw(first, 1)["image"])
    assert not torch.equal(a["image"][0], a["image"][1])


def test_unsigned_label_maps_are_filled_with_minus_one() -> None:
    scan = case((5, 5, 5))
    scan["label"] = torch.ones(1, 5, 5, 5, dtype=torch.uint8)
    item = TwoViewsd(PATCH, identity_view(PATCH)).set_random_state(0)(scan)
    assert set(item["label"].unique().tolist()) == {-1, 1}
    assert torch.equal(item["label"] == 1, item["pair_ids"] >= 0)


def test_the_case_is_left_as_it_was() -> None:
    scan = case()
    before = copy.deepcopy(scan)
    TwoViewsd(PATCH, standard_view(PATCH)).set_random_state(0)(scan)
    in_place = mt.Lambdad(("image", "label"), func=lambda x: x.zero_())
    TwoViewsd(PATCH, in_place, context=0.0).set_random_state(0)(scan)
    assert torch.equal(scan["image"], before["image"])
    assert torch.equal(scan["label"], before["label"])
    assert torch.equal(scan["image"].affine, before["image"].affine)


def test_unlabelled_scans_have_pairs_and_no_labels() -> None:
    scan = case()
    del scan["label"]
    item = TwoViewsd(PATCH, standard_view(PATCH)).set_random_state(0)(scan)
    assert (item["label"] == -1).all()
    assert (item["pair_ids"] >= 0).any(dim=-1).any()


def test_a_rare_class_is_seen_as_often_as_any() -> None:
    shape = (40, 40, 40)
    label = torch.zeros(1, *shape)
    label[0, 2:18, 2:38, 2:38] = 1
    label[0, 35, 4, 36] = 2
    scan = ForegroundIndexd()({"image": torch.zeros(1, *shape), "label": label})
    views = TwoViewsd(PATCH, identity_view(PATCH), foreground=1.0, jitter=0.0)
    seen = [(views.set_random_state(seed)(scan)["label"][0] == 2).any().item() for seed in range(60)]
    assert 18 <= sum(seen) <= 42
    nowhere = TwoViewsd(PATCH, identity_view(PATCH), foreground=0.0, jitter=0.0)
    seen = [(nowhere.set_random_state(seed)(scan)["label"][0] == 2).any().item() for seed in range(60)]
    assert sum(seen) <= 6


def test_the_stored_index_changes_no_draw() -> None:
    plain = case()
    indexed = ForegroundIndexd()(plain)
    views = TwoViewsd(PATCH, identity_view(PATCH), foreground=1.0)
    for seed in range(4):
        a, b = views.set_random_state(seed)(plain), views.set_random_state(seed)(indexed)
        assert torch.equal(a["image"], b["image"])


def test_policies_may_differ_and_be_anything_of_monai() -> None:
    flips = mt.Compose([mt.RandFlipd(("image", "label"), prob=1.0, spatial_axis=0)])
    views = TwoViewsd(PATCH, identity_view(PATCH), flips, jitter=0.0, context=0.0).set_random_state(1)
    item = views(case((20, 20, 20)))
    assert torch.equal(item["image"][1], item["image"][0].flip(1))
    assert torch.equal(item["pair_ids"][1], item["pair_ids"][0].flip(1))


UNTRACKED = {
    "elastic": standard_view(PATCH, elastic=0.5),
    "grid distortion": mt.Compose(
        [
            mt.CenterSpatialCropd(("image", "label"), PATCH),
            mt.RandGridDistortiond(("image", "label"), prob=1.0, mode=("bilinear", "nearest")),
        ]
    ),
    "affine with a chance": mt.RandAffined(("image", "label"), prob=0.5, spatial_size=PATCH, rotate_range=1),
}


@pytest.mark.parametrize("name", UNTRACKED)
def test_views_whose_affine_does_not_tell_have_no_pairs(name: str) -> None:
    """In either view; images and labels are as usual, and padding has no label."""
    plain = identity_view(PATCH)
    for policies in ((UNTRACKED[name], plain), (plain, UNTRACKED[name])):
        item = TwoViewsd(PATCH, *policies, foreground=0.0).set_random_state(0)(case((5, 5, 5)))
        assert set(item) == {"image", "label", "name"}
        assert set(item["label"].unique().tolist()) == {-1, 0, 1, 2}
        assert (item["label"][item["image"] == 0] == -1).float().mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"foreground": 1.5}, "foreground"),
        ({"jitter": -0.1}, "jitter"),
        ({"context": -1}, "context"),
        ({"patch_size": (8, 0, 8)}, "patch_size"),
    ],
)
def test_bad_arguments_are_quoted(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TwoViewsd(**{"patch_size": PATCH, "view_1": identity_view(PATCH), **arguments})


def test_a_policy_that_parts_image_and_label_is_refused() -> None:
    wrong = mt.Compose([mt.RandFlipd(("image",), prob=1.0, spatial_axis=0)])
    with pytest.raises(ConfigError, match="both keys"):
        TwoViewsd(PATCH, wrong).set_random_state(0)(case())
