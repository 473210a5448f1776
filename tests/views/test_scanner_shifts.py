"""Scanner shifts against NumPy and SciPy; each is a function of image, strength and random state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage, stats

from medseg_supcon.views import SCANNER_SHIFTS, ScannerShiftd, TwoViewsd, leaves, standard_view, usual_scanner_shifts

SHAPE = (40, 24, 20)
MR = set(SCANNER_SHIFTS) - {"noise"}


def scan(channels: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Smooth structures and some noise, about z-scored."""
    rng = np.random.default_rng(seed)
    volume = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 2.0) for _ in range(channels)])
    volume += 0.02 * rng.standard_normal(volume.shape)
    return ((volume - volume.mean()) / volume.std()).astype(np.float32)


def shifted(kind: str, image: np.ndarray, strength: float = 1.0, seed: int = 0) -> np.ndarray:
    before = torch.from_numpy(image.copy())
    after = SCANNER_SHIFTS[kind](before, strength, np.random.RandomState(seed))
    np.testing.assert_array_equal(before.numpy(), image)  # not in place
    assert after.dtype == torch.float32
    return after.double().numpy()


def ramp() -> np.ndarray:
    values = np.linspace(-2, 3, np.prod(SHAPE)).astype(np.float32)
    return np.random.default_rng(1).permutation(values).reshape(1, *SHAPE)


def test_inversion_mirrors_the_ranks() -> None:
    image = scan()
    after = shifted("inversion", image)
    assert (after.ravel()[np.argsort(image.ravel())][::-1] == np.sort(after.ravel())).all()
    np.testing.assert_allclose(after, 2 * image.mean() - image, atol=1e-5)


def test_inversion_of_two_channels_takes_either_or_both() -> None:
    image = scan(channels=2)
    seen = set()
    for seed in range(20):
        after = shifted("inversion", image, seed=seed)
        seen.add(tuple(round(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in zip(image, after, strict=True)))
    assert seen == {(-1, 1), (1, -1), (-1, -1)}


def test_remap_is_a_curve_of_three_lines() -> None:
    image = ramp()
    order = np.argsort(image.ravel())
    rises = []
    for seed in range(20):
        curve = shifted("remap", image, seed=seed).ravel()[order]
        coarse = curve[:: len(curve) // 200]
        # lines between two clipped ends have five pieces, so four bends, each within two of the 200 intervals
        assert (np.abs(np.diff(coarse, 2)) > 1e-3).sum() <= 8
        rises.append((np.diff(coarse) > 1e-4).mean())
    assert min(rises) < 0.4 and max(rises) > 0.6
    assert np.corrcoef(shifted("remap", image, 0.1).ravel(), image.ravel())[0, 1] > 0.99


def test_gamma_is_a_power_between_its_percentiles() -> None:
    image = ramp()
    image[0, 0, 0, 0] = 1000.0
    low, high = np.percentile(image, (0.5, 99.5))
    unit = np.clip((image - low) / (high - low), 0, 1)
    powers = []
    for seed in range(10):
        after = shifted("gamma", image, 0.5, seed)
        fits = {p: np.corrcoef((unit**p).ravel(), after.ravel())[0, 1] for p in (2.5**0.5, 2.5**-0.5)}
        powers.append(max(fits, key=fits.get))
        assert max(fits.values()) > 0.9999 and min(fits.values()) < 0.995
    assert len(set(powers)) == 2


def thick_by_hand(image: np.ndarray, axis: int, thickness: int, first: int, linear: bool) -> np.ndarray:
    """Boxes of ``thickness`` voxels, the first one of ``first``, averaged; back to the voxels line by line."""
    lines = np.moveaxis(image.astype(np.float64), axis, -1)
    size = lines.shape[-1]
    starts = [0, *range(first, size, thickness)]
    boxes = [(a, b) for a, b in zip(starts, [*starts[1:], size], strict=True) if b > a]
    result = np.empty_like(lines)
    for place in np.ndindex(lines.shape[:-1]):
        means = [lines[place][a:b].mean() for a, b in boxes]
        if linear:
            result[place] = np.interp(np.arange(size), [(a + b - 1) / 2 for a, b in boxes], means)
        else:
            result[place] = np.concatenate([np.full(b - a, m) for (a, b), m in zip(boxes, means, strict=True)])
    return np.moveaxis(result, -1, axis)


@pytest.mark.parametrize(("strength", "thickness"), [(0.2, 2), (0.5, 3), (1.0, 5)])
def test_thick_slices_are_box_averages(strength: float, thickness: int) -> None:
    image = scan(shape=(40, 8, 15))  # the other axes would have fewer than 8 slices
    found = set()
    for seed in range(12):
        after = shifted("thick_slices", image, strength, seed)
        fits = [
            (first, linear)
            for first, linear in itertools.product(range(1, thickness + 1), (False, True))
            if np.allclose(thick_by_hand(image, 1, thickness, first, linear), after, atol=1e-5)
        ]
        assert len(fits) == 1
        found |= set(fits)
    assert {linear for _, linear in found} == {False, True} and len({first for first, _ in found}) > 1


def test_thick_slices_take_any_long_axis_and_leave_short_ones() -> None:
    image = scan(shape=(18, 17, 16))
    axes = set()
    for seed in range(16):
        after = shifted("thick_slices", image, 1.0, seed)
        axes |= {
            axis
            for axis, first, linear in itertools.product((1, 2, 3), (1, 2), (False, True))
            if np.allclose(thick_by_hand(image, axis, 2, first, linear), after, atol=1e-5)
        }
    assert axes == {1, 2, 3}
    short = scan(shape=(15, 9, 1))
    np.testing.assert_array_equal(shifted("thick_slices", short), short)


def line_ratios(before: np.ndarray, after: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Per line of k-space along an axis: the factor from before to after, and how far from a factor the change is."""
    old, new = (np.moveaxis(np.fft.fft(v.astype(np.float64), axis=axis), axis, 0) for v in (before, after))
    old, new = old.reshape(len(old), -1), new.reshape(len(new), -1)
    factor = (old.conj() * new).sum(1).real / (np.abs(old) ** 2).sum(1)
    return factor, np.abs(new - factor[:, None] * old).max(1) / np.abs(old).max(1)


def test_ghosting_weakens_every_nth_line_of_k_space() -> None:
    image = scan(channels=2)
    image -= image.mean((1, 2, 3), keepdims=True)
    seen = set()
    for seed, strength in itertools.product(range(15), (0.4, 1.0)):
        after = shifted("ghosting", image, strength, seed)
        found = []
        for axis in (1, 2, 3):
            factor, off = line_ratios(image[0], after[0], axis - 1)
            if off.max() > 1e-3:
                continue
            number = np.abs(np.fft.fftfreq(len(factor), 1 / len(factor))).round().astype(int)
            for every in (2, 3, 4, 5):
                weak = (number > 0) & (number % every == 0)
                if np.allclose(factor / factor[0], np.where(weak, 1 - 0.9 * strength, 1), atol=1e-3):
                    found.append((axis, every))
        assert len(found) == 1
        seen |= set(found)
        assert line_ratios(image[1], after[1], found[0][0] - 1)[1].max() < 1e-3  # both channels alike
    assert len(seen) > 6


def test_motion_mixes_lines_of_k_space_of_rigidly_moved_patches() -> None:
    image = scan(channels=2)
    for seed in range(8):
        replay = np.random.RandomState(seed)
        axis, other = replay.choice([1, 2, 3], 2, replace=False)
        size = SHAPE[axis - 1]
        before, after = replay.uniform(0.05, 0.3, 2) * size
        shape = [-1 if a == axis else 1 for a in range(4)]
        line = (np.fft.fftfreq(size) * size).reshape(shape)
        spectrum = np.fft.fft(image.astype(np.float64), axis=axis)
        mixed = spectrum.copy()
        for outer in (line < -before, line > after):
            shift, angle = 4 * replay.uniform(-1, 1, 2), np.radians(4.8 * replay.uniform(-1, 1))
            turn, offset = np.eye(4), np.zeros(4)
            turn[np.ix_([axis, other], [axis, other])] = [
                [np.cos(angle), np.sin(angle)],
                [-np.sin(angle), np.cos(angle)],
            ]
            offset[[axis, other]] = shift
            centre = (np.array(image.shape) - 1) / 2
            moved = ndimage.affine_transform(
                image.astype(np.float64), turn, centre - turn @ centre + offset, order=1, mode="nearest"
            )
            mixed = np.where(outer, np.fft.fft(moved, axis=axis), mixed)
        expected = np.fft.ifft(mixed, axis=axis).real
        expected -= expected.mean((1, 2, 3), keepdims=True)
        expected *= image.std((1, 2, 3), keepdims=True) / expected.std((1, 2, 3), keepdims=True)
        expected += image.mean((1, 2, 3), keepdims=True)
        np.testing.assert_allclose(shifted("motion", image, 0.8, seed), expected, atol=2e-3)
        assert np.abs(expected - image).max() > 0.2


def test_spikes_add_one_or_two_plane_waves() -> None:
    image = scan(channels=2)
    image[1] *= 3
    image[:, :24] = 0.5
    ranks = set()
    for seed in range(12):
        after = shifted("spikes", image, seed=seed)[:, :24]
        wave = after - after.mean((1, 2, 3), keepdims=True)
        # cos(a + b) = cos a cos b - sin a sin b: each wave has rank 2 between an axis and the others
        values = np.linalg.svd(wave[0].reshape(24, -1), compute_uv=False)
        ranks.add(int((values > 1e-4 * values[0]).sum()))
        np.testing.assert_allclose(wave[1] / wave[1].std(), wave[0] / wave[0].std(), atol=1e-3)
        assert wave[1].std() / wave[0].std() == pytest.approx(image[1].std() / image[0].std(), rel=0.02)
    assert ranks <= {2, 3, 4, 5} and len(ranks) > 1


def test_noise_is_gaussian_and_uneven_in_half_of_the_patches() -> None:
    image = scan(channels=2)
    image[1] *= 5
    blocks = []
    for seed in range(24):
        added = (shifted("noise", image, 0.5, seed) - image) / image.std((1, 2, 3), keepdims=True)
        assert abs(np.corrcoef(added[0].ravel(), added[1].ravel())[0, 1]) < 0.05
        assert abs(added.mean()) < 0.02
        per_block = added.reshape(2, 4, 10, 3, 8, 2, 10).std((0, 2, 4, 6)).ravel()
        blocks.append((per_block.min(), per_block.max()))
    even = [b for b in blocks if b[1] < 1.15 * b[0]]
    assert 6 <= len(even) <= 18
    np.testing.assert_allclose(even, 0.5, rtol=0.08)
    assert all(b[1] < 0.5 for b in blocks if b not in even)


def test_noise_of_mr_is_rician_in_half_of_the_patches() -> None:
    image = np.full((1, *SHAPE), -1.0, dtype=np.float32)
    image[0, 30:] = 4.0
    skews = []
    for seed in range(24):
        dark = shifted("mr_noise", image, 0.3, seed)[0, :30]
        skews.append(max(stats.skew(dark[x : x + 6].ravel()) for x in range(0, 30, 6)))
    rayleigh = 2 * np.sqrt(np.pi) * (np.pi - 3) / (4 - np.pi) ** 1.5  # 0.63: the skewness where there is no signal
    assert 6 <= sum(skew > 0.8 * rayleigh for skew in skews) <= 18
    assert 6 <= sum(skew < 0.3 * rayleigh for skew in skews) <= 18


@pytest.mark.parametrize("kind", sorted(MR - {"thick_slices"}))
def test_statistics_of_each_channel_are_kept(kind: str) -> None:
    image = scan(channels=2) * np.array([1, 4], dtype=np.float32).reshape(2, 1, 1, 1) + 3
    for seed in range(4):
        after = shifted(kind, image, 0.7, seed)
        np.testing.assert_allclose(after.mean((1, 2, 3)), image.mean((1, 2, 3)), rtol=1e-4)
        np.testing.assert_allclose(after.std((1, 2, 3)), image.std((1, 2, 3)), rtol=1e-4)
        assert np.abs(after - image).max() > 0.1


@pytest.mark.parametrize("kind", SCANNER_SHIFTS)
@pytest.mark.parametrize("shape", [(1, 20, 20, 20), (2, 17, 1, 20), (1, 1, 1, 9), (2, 1, 1, 1), (4, 3, 2, 5)])
def test_thin_patches_stay_finite(kind: str, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    constant = np.full(shape, 2.5, np.float32)
    for seed, strength in itertools.product(range(6), (0.2, 1.0)):
        after = shifted(kind, image, strength, seed)
        assert after.shape == shape and np.isfinite(after).all()
        np.testing.assert_allclose(shifted(kind, constant, strength, seed), 2.5, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(SCANNER_SHIFTS) - {"inversion", "remap"}))
def test_the_content_stays_in_place(kind: str) -> None:
    centre = np.array([22.0, 12.0, 9.0])
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")).astype(np.float64)
    blob = np.exp(-((index - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) / (2 * 2.5**2)).astype(np.float32)
    mean = np.mean([shifted(kind, blob[None], seed=seed)[0] for seed in range(80)], 0)
    level = np.median(mean)
    weight = np.where(mean > level + 0.4 * (mean.max() - level), mean - level, 0)
    np.testing.assert_allclose((weight * index).sum((1, 2, 3)) / weight.sum(), centre, atol=0.15)


@pytest.mark.parametrize("kind", SCANNER_SHIFTS)
def test_a_seed_gives_one_view_and_the_label_stays(kind: str) -> None:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image, label = MetaTensor(torch.from_numpy(scan()), affine=affine), torch.ones(1, *SHAPE)
    transform = ScannerShiftd({kind: 1.0})
    first, again, other = (transform.set_random_state(s)({"image": image, "label": label}) for s in (5, 5, 6))
    assert torch.equal(first["image"].as_tensor(), again["image"].as_tensor())
    assert kind == "inversion" or not torch.equal(first["image"].as_tensor(), other["image"].as_tensor())
    assert first["label"] is label
    assert torch.equal(first["image"].affine, affine)
    plain = transform.set_random_state(5)({"image": image.as_tensor()})["image"]
    assert type(plain) is torch.Tensor and torch.equal(plain, first["image"].as_tensor())


def test_kinds_have_their_shares() -> None:
    image = torch.zeros(1, 2, 1, 1)
    image[0, 0] = 1.0
    transform = ScannerShiftd({"inversion": 0.2, "ghosting": 0.0, "noise": 0.5}).set_random_state(0)
    inverted = unchanged = 0
    for _ in range(2000):
        after = transform({"image": image})["image"]
        inverted += torch.equal(after, 1 - image)
        unchanged += torch.equal(after, image)
    assert inverted / 2000 == pytest.approx(0.2, abs=0.03)
    assert unchanged / 2000 == pytest.approx(0.3, abs=0.03)


def test_the_strength_is_drawn_between_a_fifth_and_one() -> None:
    image = ramp()
    transform = ScannerShiftd({"gamma": 1.0}).set_random_state(0)
    cube = torch.from_numpy(image)
    low, high = np.percentile(image, (0.5, 99.5))
    unit = np.clip((image - low) / (high - low), 0, 1).ravel()
    strengths = np.linspace(-1.2, 1.2, 49)
    curves = np.stack([unit ** (2.5**strength) for strength in strengths])
    drawn = []
    for _ in range(60):
        after = transform({"image": cube})["image"].numpy().ravel()
        drawn.append(abs(strengths[np.argmax([np.corrcoef(curve, after)[0, 1] for curve in curves])]))
    assert 0.19 < min(drawn) < 0.31 and 0.89 < max(drawn) < 1.01


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"inverson": 0.1}, "unknown kind 'inverson'; the kinds are inversion, "),
        ({"gamma": -0.1}, "shares from 0 to 1"),
        ({"gamma": 0.6, "remap": 0.5}, "together at most 1, got"),
    ],
)
def test_bad_shares(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        standard_view((8, 8, 8), scanner_shifts=shares)


def test_no_shares_are_not_even_a_draw() -> None:
    box = {"image": torch.from_numpy(scan()), "label": torch.ones(1, *SHAPE)}
    views = [
        standard_view((16, 16, 16)),
        *(standard_view((16, 16, 16), scanner_shifts=s) for s in ({}, {"gamma": 0.0})),
    ]
    images = [torch.as_tensor(view.set_random_state(1)(box)["image"]) for view in views]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_the_two_views_draw_on_their_own() -> None:
    policy = standard_view(
        SHAPE, affine_probability=0.0, strength=0.0, low_resolution=0.0, scanner_shifts={"inversion": 0.5}
    )
    assert [type(t).__name__ for t in leaves(policy)][-1] == "ScannerShiftd"
    views = TwoViewsd(SHAPE, policy, jitter=0.0).set_random_state(0)
    image = scan()
    seen = set()
    for _ in range(24):
        pair = views({"image": torch.from_numpy(image)})["image"].numpy()
        seen.add(tuple(bool(np.corrcoef(view.ravel(), image.ravel())[0, 1] < 0) for view in pair))
    assert seen == set(itertools.product((False, True), repeat=2))


def test_the_default_is_for_mr_alone() -> None:
    assert usual_scanner_shifts(["PET", "ct "]) == {}
    assert set(usual_scanner_shifts(["T1", "T2"])) < MR
    assert sum(usual_scanner_shifts(["T1"]).values()) == pytest.approx(0.2)
