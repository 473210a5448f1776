"""Scans as scanners, headers and mistakes degrade them, at a graded strength: what the quality model learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from monai.transforms import RandBiasField
from scipy import ndimage

from medseg_supcon.scans import Grid, Volume
from medseg_supcon.views import ghost_weights

Image = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int16]
Rng = np.random.Generator


@dataclass(frozen=True)
class Degraded:
    """A scan with its label map on one grid.

    Attributes:
        image: (C, X, Y, Z).
        label: (X, Y, Z) class indices; below 0: not annotated.
        zoom: factor on the spacing of the header.
        foreign: it shows another anatomy, so that no mask of it is right.
    """

    image: Image
    label: Labels
    zoom: float = 1.0
    foreign: bool = False

    def as_volume(self, original: Volume) -> Volume:
        """The degraded scan, as if it had been read from a file like the original's."""
        affine = original.monai_affine.copy()
        affine[:3, :3] *= self.zoom
        data = np.moveaxis(self.image, 0, -1) if original.data.ndim == 4 else self.image[0]
        grid = Grid.at(self.label.shape, affine)
        return replace(original, data=np.ascontiguousarray(data), grid=grid, monai_affine=affine)


def _range(image: Image) -> tuple[Image, Image]:
    """The 0.5th and the range up to the 99.5th percentile per channel, (C, 1, 1, 1)."""
    low, high = (np.percentile(image, q, axis=(1, 2, 3), keepdims=True).astype(np.float32) for q in (0.5, 99.5))
    return low, np.maximum(high - low, 1e-6)


def noise(image: Image, strength: float, rng: Rng) -> Image:
    """Gaussian noise of up to 30 % of the range, in a part of the scan stronger than in the rest."""
    place = _smooth(image.shape[1:], rng) if rng.random() < 0.5 else 1.0
    sigma = 0.3 * strength * _range(image)[1] * place
    return image + sigma * rng.standard_normal(image.shape, dtype=np.float32)


def bias_field(image: Image, strength: float, rng: Rng) -> Image:
    """A smooth multiplicative field, on intensities above the lowest."""
    field = RandBiasField(prob=1.0, degree=3, coeff_range=(-0.8 * strength, 0.8 * strength))
    field.set_random_state(int(rng.integers(2**31)))
    low = image.min()
    return np.asarray(field(image - low) + low, dtype=np.float32)


def gamma(image: Image, strength: float, rng: Rng) -> Image:
    """A power of the intensities, between 1/4 and 4."""
    power = 4.0 ** (strength * rng.choice([-1, 1]))
    return _remap(image, lambda unit: unit**power)


def invert(image: Image, strength: float, rng: Rng) -> Image:
    """Contrast that is inverted, or fades towards its inverse."""
    return _remap(image, lambda unit: unit + (1 - 2 * unit) * min(1.0, 0.3 + strength))


def remap(image: Image, strength: float, rng: Rng) -> Image:
    """Another contrast: a piecewise linear curve through random values, as of another sequence."""
    knots = np.linspace(0, 1, 6)
    values = (1 - strength) * knots + strength * rng.random(6)
    return _remap(image, lambda unit: np.interp(unit, knots, values))


def _remap(image: Image, curve: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Image:
    low, width = _range(image)
    unit = np.clip((image - low) / width, 0, 1).astype(np.float64)
    return (curve(unit) * width + low).astype(np.float32)


def ghosting(image: Image, strength: float, rng: Rng) -> Image:
    """Copies of the anatomy along one axis: some lines of k-space lose up to 90 %."""
    axis, every = int(rng.integers(1, 4)), int(rng.integers(2, 6))
    return _filtered(image, axis, ghost_weights(image.shape[axis], every, 0.9 * strength))


def motion(image: Image, strength: float, rng: Rng) -> Image:
    """Movement by up to 8 voxels during the acquisition: phases of k-space from several positions."""
    axis = int(rng.integers(1, 4))
    size = image.shape[axis]
    position = np.repeat(rng.uniform(-8, 8, 6) * strength, -(-size // 6))[:size]
    position[np.abs(np.arange(size) - size // 2) <= size // 20] = 0  # the centre of k-space gives the anatomy's place
    spectrum = np.fft.fftshift(np.fft.fftn(image, axes=(1, 2, 3)), axes=(1, 2, 3))
    moved = int(rng.choice([a for a in (1, 2, 3) if a != axis]))
    frequency = np.fft.fftshift(np.fft.fftfreq(image.shape[moved]))
    phase = np.exp(-2j * np.pi * np.multiply.outer(position, frequency))
    shape = [1, 1, 1, 1]
    shape[axis], shape[moved] = size, image.shape[moved]
    spectrum *= (phase if axis < moved else phase.T).reshape(shape)
    return np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(1, 2, 3)), axes=(1, 2, 3)).real.astype(np.float32)


def spikes(image: Image, strength: float, rng: Rng) -> Image:
    """Stripes: some points of k-space are far too strong."""
    spectrum = np.fft.fftn(image, axes=(1, 2, 3))
    peak = np.abs(spectrum).max(axis=(1, 2, 3))
    for _ in range(int(rng.integers(1, 4))):
        point = tuple(int(rng.integers(0, max(1, n // 3))) for n in image.shape[1:])
        spectrum[:, point[0], point[1], point[2]] += peak * strength * 0.6
    return np.fft.ifftn(spectrum, axes=(1, 2, 3)).real.astype(np.float32)


def blur(image: Image, strength: float, rng: Rng) -> Image:
    """Lower resolution along all axes: up to 4 voxels become one."""
    return _coarser(image, [1 + 3 * strength] * 3)


def thick_slices(image: Image, strength: float, rng: Rng) -> Image:
    """Lower resolution along one axis: up to 8 slices become one."""
    factors = [1.0, 1.0, 1.0]
    factors[int(rng.integers(3))] = 1 + 7 * strength
    return _coarser(image, factors)


def _coarser(image: Image, factors: list[float]) -> Image:
    size = np.array(image.shape[1:])
    small = np.maximum(1, (size / factors).round()).astype(int)
    channels = []
    for channel in image:
        smooth = ndimage.gaussian_filter(channel, [0.4 * (f - 1) for f in factors])
        coarse = ndimage.zoom(smooth, small / size, order=1, grid_mode=True, mode="nearest")
        channels.append(ndimage.zoom(coarse, size / small, order=1, grid_mode=True, mode="nearest"))
    return np.stack(channels).astype(np.float32)


def _filtered(image: Image, axis: int, weight: npt.NDArray[np.float64]) -> Image:
    shape = [-1 if a == axis else 1 for a in range(4)]
    return np.fft.ifft(np.fft.fft(image, axis=axis) * weight.reshape(shape), axis=axis).real.astype(np.float32)


def _smooth(shape: tuple[int, ...], rng: Rng) -> Image:
    """A smooth random field from 0 to 1."""
    coarse = rng.random((3, 3, 3))
    field = ndimage.zoom(coarse, np.array(shape) / 3, order=1, grid_mode=True, mode="nearest")
    return np.asarray(np.clip(field, 0, 1), dtype=np.float32)


def gap(image: Image, strength: float, rng: Rng) -> Image:
    """A part of the scan is missing: a slab of up to half of an axis is as dark as the darkest voxel."""
    axis = int(rng.integers(1, 4))
    width = max(1, int(image.shape[axis] * 0.5 * strength))
    start = int(rng.integers(0, image.shape[axis] - width + 1))
    dark = image.copy()
    dark[tuple(slice(start, start + width) if a == axis else slice(None) for a in range(4))] = image.min()
    return dark


def crop(sample: Degraded, strength: float, rng: Rng) -> Degraded:
    """A smaller field of view: up to 60 % of one axis are cut off."""
    axis, front = int(rng.integers(3)), rng.random() < 0.5
    size = sample.label.shape[axis]
    keep = max(1, int(size * (1 - 0.6 * strength)))
    inside = tuple(
        (slice(size - keep, None) if front else slice(0, keep)) if a == axis else slice(None) for a in range(3)
    )
    return Degraded(sample.image[(slice(None), *inside)], sample.label[inside])


def wrong_spacing(sample: Degraded, strength: float, rng: Rng) -> Degraded:
    """A header whose spacing is wrong by a factor of up to 2."""
    return Degraded(sample.image, sample.label, zoom=float(2.0 ** (strength * rng.choice([-1, 1]))))


def turned(sample: Degraded, strength: float, rng: Rng) -> Degraded:
    """Axes that are mirrored or exchanged, as by a wrong orientation in the header."""
    order = rng.permutation(3) if strength > 0.5 else np.arange(3)
    flips = tuple(a for a in range(3) if rng.random() < 0.5)
    image = np.flip(sample.image.transpose(0, *(order + 1)), tuple(a + 1 for a in flips))
    return Degraded(np.ascontiguousarray(image), np.ascontiguousarray(np.flip(sample.label.transpose(order), flips)))


def shuffled(sample: Degraded, strength: float, rng: Rng) -> Degraded:
    """Another anatomy: blocks of the scan in another order, mirrored and turned upside down."""
    image, shape = sample.image, sample.label.shape
    parts = 2 + int(2 * strength)
    edges = [np.linspace(0, n, parts + 1).astype(int) for n in shape]
    size = [int(np.diff(e).min()) for e in edges]
    result = image.copy()
    places = [(x, y, z) for x in edges[0][:-1] for y in edges[1][:-1] for z in edges[2][:-1]]
    for target, source in zip(places, rng.permutation(len(places)), strict=True):
        block = image[(slice(None), *(slice(s, s + n) for s, n in zip(places[source], size, strict=True)))]
        flips = tuple(a + 1 for a in range(3) if rng.random() < 0.5)
        result[(slice(None), *(slice(s, s + n) for s, n in zip(target, size, strict=True)))] = np.flip(block, flips)
    return Degraded(result, np.zeros_like(sample.label), foreign=True)


def swapped_channels(sample: Degraded, strength: float, rng: Rng) -> Degraded:
    """Channels in another order."""
    return Degraded(np.roll(sample.image, int(rng.integers(1, len(sample.image))), axis=0), sample.label)


INTENSITY = (noise, bias_field, gamma, invert, remap, ghosting, motion, spikes, blur, thick_slices, gap)
GEOMETRY = (crop, wrong_spacing, turned, shuffled)


def degradations(channels: int) -> dict[str, Callable[[Degraded, float, Rng], Degraded]]:
    """Name -> how it degrades a sample with a strength in (0, 1]; the same for the same generator."""

    def of_image(change: Callable[[Image, float, Rng], Image]) -> Callable[[Degraded, float, Rng], Degraded]:
        return lambda sample, strength, rng: Degraded(change(sample.image, strength, rng), sample.label)

    kinds = {change.__name__: of_image(change) for change in INTENSITY}
    kinds |= {change.__name__: change for change in GEOMETRY}
    return kinds | ({"swapped_channels": swapped_channels} if channels > 1 else {})
