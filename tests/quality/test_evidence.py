"""The evidence of a pass, against plain numpy on whole arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg_supcon.datasets import Regions
from medseg_supcon.inference import windows
from medseg_supcon.quality import PassEvidence, evidence, mask_shape

PATCH, SPACING = (8, 8, 8), (1.5, 2.0, 0.5)


def network(classes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(1)
    features, classifier = torch.nn.Conv3d(2, 5, 3, padding=1), torch.nn.Conv3d(5, classes, 1)
    return torch.nn.Sequential(features, torch.nn.Tanh(), classifier).eval(), classifier


@pytest.mark.parametrize("softmax", [True, False])
def test_sums_in_parts_are_those_of_the_whole_scan(softmax: bool) -> None:
    net, classifier = network(4)
    image = (
        torch.from_numpy(
            ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 19, 11, 9)), (0, 2, 2, 2))
        ).float()
        * 20
    )

    def outputs(batch: torch.Tensor) -> torch.Tensor:
        logits = net(batch) * 4
        return logits if softmax else logits.softmax(dim=1)

    def segmented(watch: PassEvidence | None) -> torch.Tensor:
        predict = outputs if watch is None else watch.windows(outputs)
        parts = windows(image, predict, PATCH, 0.5, 2, torch.device("cpu"), torch.device("cpu"))
        return torch.cat([part.clone() for part in (parts if watch is None else watch.chunks(parts))], dim=1)

    with torch.inference_mode():
        plain, watch = segmented(None), PassEvidence(classifier, image, 4, softmax)
        seen = segmented(watch)
    p = (plain.softmax(dim=0) if softmax else plain).double().numpy()
    assert np.allclose(seen.numpy(), p, atol=1e-6)
    mask = p.argmax(axis=0).astype(np.uint8)
    evidence = watch.of(mask, SPACING, (2.0, 1.0, 1.0))
    assert len(np.unique(mask)) == 4, "the test needs every class"
    for c in range(4):
        inside = mask == c
        assert evidence.volume[c] == pytest.approx(inside.sum() * 1.5 / 1000)
        expected = [
            p.max(axis=0)[inside].mean(),
            2 * p[c][inside].sum() / (inside.sum() + p[c].sum()),
            (p[c] * (1 - p[c])).sum() / inside.sum(),
            np.log(1.5 / 2.0),
        ]
        assert evidence.probability[c] == pytest.approx(expected, rel=1e-5)
        values = image.double().numpy()[:, inside]
        assert evidence.intensity[c] == pytest.approx([*values.mean(axis=1), *values.std(axis=1)], rel=1e-4, abs=1e-5)
    assert evidence.size.tolist() == [38.0, 11.0, 9.0]
    assert evidence.quantiles.reshape(2, 7)[1] == pytest.approx(
        np.quantile(image[1].numpy(), (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98))
    )


def test_features_are_what_the_classifier_reads_at_voxels_of_the_class() -> None:
    net, classifier = network(3)
    image = torch.randn(2, 8, 8, 8) * 3
    watch = PassEvidence(classifier, image, 3, True)
    with torch.inference_mode():
        watch.windows(net)(image[None])
        features, logits = net[:2](image[None])[0].flatten(1).T, net(image[None])[0].flatten(1).T
    for c, rows in enumerate(watch.features):
        own = features[logits.argmax(dim=1) == c]
        kept = torch.cat(rows)
        assert len(kept) and all((row - own).abs().amax(dim=1).min() < 1e-5 for row in kept)


def test_shape_of_masks_that_can_be_counted_by_hand() -> None:
    mask = np.zeros((10, 9, 8), dtype=np.uint8)
    mask[0:2, 2:5, 2:6] = 1  # 2 x 3 x 4 voxels, one face of 12 voxels at the border
    mask[8, 8, 6] = 1  # and a single one that touches another face
    mask[5, 5, 5] = 2
    largest, components, surface, border = mask_shape(mask, 4, SPACING)[1]
    x, y, z = 2.0 * 0.5, 1.5 * 0.5, 1.5 * 2.0  # mm2 of a face across each axis
    scale = (25 * 1.5) ** (2 / 3)
    assert largest == pytest.approx(24 / 25) and components == pytest.approx(np.log10(2))
    assert surface == pytest.approx((2 * (12 + 1) * x + 2 * (8 + 1) * y + 2 * (6 + 1) * z) / scale)
    assert border == pytest.approx((12 * x + 1 * y) / scale)
    assert mask_shape(mask, 4, SPACING)[2, 0] == 1 and np.isnan(mask_shape(mask, 4, SPACING)[[0, 3]]).all()


def test_shape_of_a_region_is_that_of_all_its_classes() -> None:
    mask = np.zeros((10, 9, 8), dtype=np.int16)
    mask[0:2, 2:5, 2:6], mask[2:4, 2:5, 2:6] = 1, 2
    mask[8, 8, 6] = 2
    both = Regions(
        ("both", "second", "none"), np.array([[False, True, True], [False, False, True], [False] * 3]), (1, 2)
    )
    background, whole, second, none = mask_shape(mask, 4, SPACING, both)
    x, y, z = 2.0 * 0.5, 1.5 * 0.5, 1.5 * 2.0
    assert whole[:2] == pytest.approx([48 / 49, np.log10(2)]) and second[:2] == pytest.approx([24 / 25, np.log10(2)])
    surface = 2 * (12 + 1) * x + 2 * (16 + 1) * y + 2 * (12 + 1) * z
    assert whole[2:] * (49 * 1.5) ** (2 / 3) == pytest.approx([surface, 12 * x + 1 * y])
    assert second[3] * (25 * 1.5) ** (2 / 3) == pytest.approx(1 * y)
    assert np.isnan([background, none]).all()


def test_components_of_a_large_mask_are_those_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((23, 21, 19), dtype=np.uint8)
    mask[0:5, 0:5, 0:5] = 1
    mask[6:9, 0:5, 0:5] = 1  # in the next block of 2 x 2 x 2 voxels, after a gap of one voxel
    mask[20:23, 18:21, 16:19] = 1  # in blocks that reach over the end of the scan
    voxels, exact = np.array([125 + 75, 27]), mask_shape(mask, 2, SPACING)[1]
    assert exact[:2] == pytest.approx([125 / 227, np.log10(3)])
    monkeypatch.setattr(evidence, "COMPONENT_VOXELS", mask.size // 8)
    blocks = mask_shape(mask, 2, SPACING)[1]
    assert blocks[:2] == pytest.approx([voxels[0] / voxels.sum(), np.log10(2)])
    assert np.array_equal(blocks[2:], exact[2:])
