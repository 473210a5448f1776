"""The policies on their own: sizes, ranges, and that intensity transforms do not move the content."""

from __future__ import annotations

import math

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medseg_supcon.views import (
    ForegroundIndexd,
    TwoViewsd,
    crop_resize_view,
    has_untracked,
    identity_view,
    leaves,
    moves_voxels,
    randaugment_view,
    simclr_view,
    standard_view,
)

PATCH = (24, 22, 20)
ALL = {
    "standard": standard_view(PATCH, flip_axes=(0, 1, 2), elastic=0.2),
    "identity": identity_view(PATCH),
    "crop_resize": crop_resize_view(PATCH, flip_axes=(0,)),
    "simclr": simclr_view(PATCH),
    "randaugment": randaugment_view(PATCH, num_ops=3, magnitude=1.0),
}


def intensity_transforms() -> list[mt.Transform]:
    every = [
        *leaves(standard_view(PATCH, bias_field=0.2)),
        *leaves(ALL["simclr"]),
        *leaves(ALL["randaugment"]),
    ]
    return [transform for transform in every if not moves_voxels(transform)]


@pytest.mark.parametrize("transform", intensity_transforms(), ids=lambda t: type(t).__name__)
def test_intensity_transforms_do_not_move_content(transform: mt.Transform) -> None:
    # a symmetric blob off the centre; its centroid may not move, whatever is done to its height and width
    centre = torch.tensor([10.0, 12.0, 8.0])
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in PATCH], indexing="ij")).float()
    blob = torch.exp(-((index - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) / (2 * 2.5**2))
    after = torch.zeros(PATCH)
    transform.prob = 1.0
    for seed in range(60):  # noise and bias fields move a single centroid, but not that of the mean
        transform.set_random_state(seed)
        after += transform({"image": MetaTensor(blob[None].clone())})["image"].as_tensor()[0] / 60
    assert (centroid(after, index) - centroid(blob, index)).abs().max() < 0.1


def centroid(image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    weight = (image - image.median()).clamp(min=0) * (image > image.median() + 0.3 * (image.max() - image.median()))
    return (weight * index).sum((1, 2, 3)) / weight.sum()


def test_monais_default_low_resolution_would_fail_that_test() -> None:
    with pytest.raises(AssertionError):
        test_intensity_transforms_do_not_move_content(mt.RandSimulateLowResolutiond("image", zoom_range=(0.5, 0.5)))


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("channels", [1, 4])
def test_policies_crop_to_the_patch(policy: str, channels: int) -> None:
    box = {"image": torch.randn(channels, 34, 30, 28), "label": torch.ones(1, 34, 30, 28)}
    ALL[policy].set_random_state(3)
    for _ in range(3):
        view = ALL[policy](box)
        assert view["image"].shape == (channels, *PATCH)
        assert view["label"].shape == (1, *PATCH)
        assert torch.isfinite(torch.as_tensor(view["image"])).all()


@pytest.mark.parametrize("policy", ALL)
def test_an_empty_patch_stays_finite(policy: str) -> None:
    box = {"image": torch.zeros(1, 34, 30, 28), "label": torch.zeros(1, 34, 30, 28)}
    for seed in range(6):
        assert torch.isfinite(torch.as_tensor(ALL[policy].set_random_state(seed)(box)["image"])).all()


def test_the_bias_field_is_a_smooth_factor_on_what_lies_above_the_lowest() -> None:
    (field,) = [t for t in leaves(standard_view(PATCH, bias_field=1.0)) if type(t).__name__ == "BiasFieldd"]
    before = torch.randn(2, *PATCH, generator=torch.Generator().manual_seed(0)) - 3.0
    after = field.set_random_state(5)({"image": MetaTensor(before.clone())})["image"].as_tensor()
    again = field.set_random_state(5)({"image": MetaTensor(before.clone())})["image"].as_tensor()
    assert torch.equal(after, again)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in PATCH], indexing="ij")
    powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if i + j + k <= 3]
    columns = np.stack([axes[0] ** i * axes[1] ** j * axes[2] ** k for i, j, k in powers], -1)
    fitted = []
    for old, new in zip(before.double().numpy(), after.double().numpy(), strict=True):
        assert new.mean() == pytest.approx(old.mean(), abs=1e-4)
        assert new.std() == pytest.approx(old.std(), rel=1e-4)
        floor = np.unravel_index(old.argmin(), old.shape)
        above = old > old.min() + 0.5
        factor = np.log((new - new[floor])[above] / (old - old.min())[above])
        weights, residual, *_ = np.linalg.lstsq(columns[above], factor, rcond=None)
        assert residual[0] / above.sum() < 1e-6 and factor.std() > 0.05
        fitted.append(weights[1:])
    np.testing.assert_allclose(fitted[0], fitted[1], atol=1e-3)  # one field for all channels


def test_no_bias_field_is_not_even_a_draw() -> None:
    assert not [t for t in leaves(standard_view(PATCH)) if type(t).__name__ == "BiasFieldd"]
    with pytest.raises(ValueError, match=r"bias_field is a probability, got 1\.5"):
        standard_view(PATCH, bias_field=1.5)


def test_only_elastic_is_untracked() -> None:
    assert {name for name, policy in ALL.items() if has_untracked(policy)} == {"standard"}
    assert not has_untracked(standard_view(PATCH))
    for bend in (
        mt.RandGridDistortiond(("image", "label")),
        mt.RandSmoothDeformd(("image", "label"), (8, 8, 8), (3, 3, 3)),
    ):
        assert has_untracked(mt.Compose([mt.OneOf([bend])]))


def test_thick_slices_are_turned_in_plane_only() -> None:
    view = standard_view(
        (16, 16, 16),
        spacing=(1, 4, 1),
        scale=(1.0, 1.0),
        affine_probability=1.0,
        strength=0.0,
        low_resolution=0.0,
    )
    box = MetaTensor(torch.zeros(1, 20, 20, 20), affine=torch.eye(4))
    view.set_random_state(0)
    affine = view({"image": box, "label": box})["image"].affine
    assert affine[:3, 1].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    angle = math.degrees(math.acos(float(affine[0, 0])))
    assert 0.1 < angle <= 30.01


@pytest.mark.parametrize(
    ("patch", "spacing", "turned"),
    [
        ((40, 40, 40), (1, 1, 1), {0, 1, 2}),
        ((40, 40, 5), (1, 1, 1), {2}),
        ((40, 40, 5), None, {2}),
        ((40, 40, 16), (1, 1, 2.5), {0, 1, 2}),  # 16 thick voxels are as long as 40 thin ones
        ((1, 64, 64), (1, 1, 1), {0}),
        ((20, 20, 80), (1, 1, 1), {2}),
        ((40, 40, 5), (1, 4, 1), set()),  # the coarse axis is not the thin one
    ],
)
def test_a_patch_is_not_turned_out_of_itself(patch, spacing, turned) -> None:
    view = standard_view(patch, spacing=spacing, scale=(1.0, 1.0), affine_probability=1.0, strength=0.0)
    box = MetaTensor(torch.zeros(1, *patch), affine=torch.eye(4))
    view.set_random_state(0)
    matrix = view({"image": box, "label": box})["image"].affine[:3, :3]
    carried = {(i, j) for i in range(3) for j in range(3) if i != j and abs(matrix[i, j]) > 1e-6}
    assert carried == {(i, j) for k in turned for i in range(3) for j in range(3) if len({i, j, k}) == 3}


@pytest.mark.parametrize("patch", [(40, 40, 5), (5, 40, 40), (64, 64, 1), (40, 40, 40)])
def test_views_of_a_thin_scan_show_the_scan(patch) -> None:
    for policy in (standard_view(patch, flip_axes=[0], spacing=(1, 1, 1)), crop_resize_view(patch)):
        views = TwoViewsd(patch, policy).set_random_state(0)
        scan = {"image": torch.rand(1, *patch), "label": (torch.rand(1, *patch) > 0.5).float()}
        inside = [float((views(scan)["label"] >= 0).float().mean()) for _ in range(16)]
        assert sum(inside) / len(inside) > 0.6


def test_zoom_stays_in_its_range() -> None:
    view = standard_view(PATCH, rotation_degrees=0.0, scale=(0.7, 1.4), affine_probability=1.0, strength=0.0)
    box = MetaTensor(torch.zeros(1, 30, 30, 30), affine=torch.eye(4))
    factors = []
    for seed in range(40):
        view.set_random_state(seed)
        factors += view({"image": box, "label": box})["image"].affine.diagonal()[:3].tolist()
    assert 0.7 <= min(factors) < 0.75
    assert 1.35 < max(factors) <= 1.4


@pytest.mark.parametrize(
    "make",
    [
        lambda: standard_view((8, 8)[:1]),
        lambda: standard_view(PATCH, scale=(1.4, 0.7)),
        lambda: standard_view(PATCH, strength=4.0),
        lambda: standard_view((8, 8), elastic=0.5),
        lambda: randaugment_view(PATCH, num_ops=0),
        lambda: randaugment_view(PATCH, magnitude=2.0),
        lambda: ForegroundIndexd(max_voxels=0),
    ],
)
def test_bad_arguments(make) -> None:
    with pytest.raises(ValueError, match=r"got|axes"):
        make()


def test_foreground_index_is_even_and_capped() -> None:
    label = torch.zeros(1, 30, 30, 30)
    label[0, 5:25, 5:25, 5:25] = 1
    label[0, 0, 0, :3] = 2
    label[0, 29] = -1
    index = ForegroundIndexd(max_voxels=100)({"label": MetaTensor(label)})["foreground_index"]
    assert sorted(index) == [1, 2]
    assert index[2].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert len(index[1]) == 100
    assert (label[0][tuple(index[1].long().T)] == 1).all()
    assert index[1].double().mean(0).tolist() == pytest.approx([14.5] * 3, abs=1.5)
    assert ForegroundIndexd()({"image": label})["foreground_index"] == {}
