"""Degraded scans: reproducible, graded, and the label map goes where the scan goes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg_supcon.quality import Degraded, degradations

MOVES = ("crop", "wrong_spacing", "turned", "shuffled")


def scan(channels: int = 1, size: tuple[int, int, int] = (24, 20, 18)) -> Degraded:
    rng = np.random.default_rng(3)
    image = ndimage.gaussian_filter(rng.random((channels, *size)), (0, 2, 2, 2)).astype(np.float32)
    return Degraded(image, (image[0] > np.median(image[0])).astype(np.int16))


@pytest.mark.parametrize("channels", [1, 2])
def test_a_degradation_follows_from_the_generator_alone_and_leaves_the_scan_alone(channels: int) -> None:
    original, copy = scan(channels), scan(channels)
    kinds = degradations(channels)
    assert ("swapped_channels" in kinds) == (channels > 1)
    for name, kind in kinds.items():
        one, two = (kind(original, 0.7, np.random.default_rng(5)) for _ in range(2))
        assert np.array_equal(one.image, two.image), name
        assert one.image.dtype == np.float32 and np.isfinite(one.image).all(), name
        assert one.image.shape[1:] == one.label.shape and len(one.image) == channels, name
        assert not np.array_equal(one.image, original.image) or one.zoom != 1 or name == "turned", name
        assert np.array_equal(original.image, copy.image) and np.array_equal(original.label, copy.label), name


@pytest.mark.parametrize("name", sorted(set(degradations(1)) - {*MOVES, "gap"}))
def test_more_strength_changes_intensities_more(name: str) -> None:
    original, kind = scan(), degradations(1)[name]
    changes = [
        np.mean([np.abs(kind(original, s, np.random.default_rng(k)).image - original.image).mean() for k in range(8)])
        for s in (0.1, 0.5, 1.0)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_the_label_map_moves_with_the_scan() -> None:
    original = scan()
    threshold = np.median(original.image[0])
    for name in ("crop", "turned"):
        for seed in range(10):
            moved = degradations(1)[name](original, 0.9, np.random.default_rng(seed))
            assert np.array_equal(moved.label, (moved.image[0] > threshold).astype(np.int16)), name


def test_a_wrong_spacing_is_in_the_header_alone_and_another_anatomy_is_marked() -> None:
    original = scan()
    factors = {degradations(1)["wrong_spacing"](original, 1.0, np.random.default_rng(k)).zoom for k in range(8)}
    assert factors == {0.5, 2.0}
    assert degradations(1)["shuffled"](original, 0.5, np.random.default_rng(0)).foreign
    assert not degradations(1)["noise"](original, 0.5, np.random.default_rng(0)).foreign
