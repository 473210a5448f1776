"""How another scanner or sequence would have shown a patch: bias field, contrast, noise, thick slices, artefacts.

A kind is a function of the image (C, X, Y, Z), float32, a strength in (0, 1] and a random state. It changes intensities
alone and leaves the content in place. Kinds of MR keep each channel's mean and standard deviation, because MR scans are
z-scored one by one; noise and thick slices of CT leave Hounsfield units alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from medseg_supcon.views.intensity import IMAGE, SPATIAL, Random, like, normal, plain, same_statistics, spread

STRENGTH = (0.2, 1.0)  # drawn uniformly for each patch
Shares = Mapping[str, float]


def inversion(image: Tensor, strength: float, random: Random) -> Tensor:
    """Dark becomes bright, as from T1 to T2; with several channels, in a random selection of them."""
    chosen = random.random_sample(len(image)) < 0.5
    chosen[random.randint(len(image))] = True
    flipped = 2 * image.mean(SPATIAL, keepdim=True) - image
    return torch.where(torch.from_numpy(chosen).reshape(-1, 1, 1, 1), flipped, image)


def remap(image: Tensor, strength: float, random: Random) -> Tensor:
    """Another contrast: a piecewise linear curve through 4 random values, monotone or not; one per channel.

    Source: after Zhou et al. 2021, Models Genesis, Medical Image Analysis 67 (non-linear intensity transformation).
    """
    knots = np.linspace(0, 1, 4)
    values = (1 - strength) * knots + strength * random.random_sample((len(image), len(knots)))
    place = _unit(image) * (len(knots) - 1)
    low = place.long().clamp_(max=len(knots) - 2)
    curve = torch.from_numpy(values).to(image)
    channels = [v[i] + (v[i + 1] - v[i]) * (p - i) for v, i, p in zip(curve, low, place, strict=True)]
    return same_statistics(image, torch.stack(channels))


def gamma(image: Tensor, strength: float, random: Random) -> Tensor:
    """A power of the intensities, between 1 / 2.5 and 2.5 and evenly in its logarithm; one per channel."""
    powers = 2.5 ** (strength * random.choice([-1.0, 1.0], len(image)))
    return same_statistics(image, _unit(image) ** torch.from_numpy(powers).to(image).reshape(-1, 1, 1, 1))


def thick_slices(image: Tensor, strength: float, random: Random) -> Tensor:
    """Averages over 2 to 5 voxels along one axis, as partial volume, interpolated back (linear or nearest).

    At least 8 slices are left, so axes of fewer than 16 voxels stay as they are.
    """
    axes = [axis for axis in SPATIAL if image.shape[axis] >= 16]
    if not axes:
        return image
    axis = int(random.choice(axes))
    size = image.shape[axis]
    thickness = min(1 + max(1, round(4 * strength)), size // 8)
    slices = (np.arange(size) + random.randint(thickness)) // thickness
    member = np.eye(slices[-1] + 1)[slices]  # (voxel, slice): 1 if the voxel is in the slice
    average = (member / member.sum(0)).T
    if random.random_sample() < 0.5:
        centres = average @ np.arange(size)
        member = np.stack([np.interp(np.arange(size), centres, one) for one in np.eye(len(centres))], 1)
    return _along(image, axis, member @ average)


def ghosting(image: Tensor, strength: float, random: Random) -> Tensor:
    """Copies of the anatomy along one axis: every 2nd to 5th line of k-space loses up to 90 %; all channels alike."""
    axes = [axis for axis in SPATIAL if image.shape[axis] > 1]
    if not axes:
        return image
    axis, every = int(random.choice(axes)), int(random.randint(2, 6))
    weight = ghost_weights(image.shape[axis], every, 0.9 * strength)
    return same_statistics(image, _along(image, axis, _line_filter(weight)))


def ghost_weights(size: int, every: int, loss: float) -> npt.NDArray[np.float64]:
    """Factors on the ``size`` lines of k-space, in the order of the FFT: each ``every``-th but line 0 loses ``loss``.

    >>> ghost_weights(8, 2, 0.5).tolist()
    [1.0, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0]
    """
    line = np.abs(_lines(size))
    return np.where((line % every == 0) & (line > 0), 1 - loss, 1.0)


def motion(image: Tensor, strength: float, random: Random) -> Tensor:
    """Two rigid movements during the acquisition, of up to 5 voxels and 6 degrees in one plane; all channels alike.

    The lines of k-space along one axis come from three positions, one after the other. The middle ones, where most of the
    contrast is, show the patch as it is, so the anatomy stays in place.
    """
    axes = [axis for axis in SPATIAL if image.shape[axis] > 1]
    if len(axes) < 2:
        return image
    axis, other = (int(a) for a in random.choice(axes, 2, replace=False))
    line = _lines(image.shape[axis])
    before, after = random.uniform(0.05, 0.3, 2) * len(line)
    result = image
    for outer in (line < -before, line > after):
        shift, angle = 5 * strength * random.uniform(-1, 1, 2), np.radians(6 * strength * random.uniform(-1, 1))
        change = _rigid(image, axis, other, shift, float(angle)) - image
        result = result + _along(change, axis, _line_filter(outer))
    return same_statistics(image, result)


def spikes(image: Tensor, strength: float, random: Random) -> Tensor:
    """One or two plane waves, as points of k-space that are far too strong cause them; all channels alike."""
    waves = torch.zeros(image.shape[1:])
    for _ in range(random.randint(1, 3)):
        # at most a third of a cycle per voxel; the phase is that of the first voxel
        frequency, phase = random.uniform(-1 / 3, 1 / 3, 3), random.uniform(0, 1)
        x, y, z = (torch.arange(n) * float(f) for n, f in zip(image.shape[1:], frequency, strict=True))
        waves += torch.cos(2 * torch.pi * (x[:, None, None] + y[:, None] + z + phase))
    return same_statistics(image, image + 0.5 * strength * spread(image) * waves)


def noise(image: Tensor, strength: float, random: Random) -> Tensor:
    """Gaussian noise of up to one standard deviation of the channel, in half of the patches uneven in space."""
    return image + strength * spread(image) * _uneven(image, random) * normal(image, random)


def mr_noise(image: Tensor, strength: float, random: Random) -> Tensor:
    """Noise as in ``noise``, in half of the patches Rician (signal above the darkest voxel), statistics kept."""
    if random.random_sample() < 0.5:
        return same_statistics(image, noise(image, strength, random))
    sigma = strength * spread(image) * _uneven(image, random)
    real = image - image.amin(SPATIAL, keepdim=True) + sigma * normal(image, random)
    return same_statistics(image, torch.hypot(real, sigma * normal(image, random)))


SCANNER_SHIFTS: dict[str, Callable[[Tensor, float, Random], Tensor]] = {
    kind.__name__: kind
    for kind in (inversion, remap, gamma, thick_slices, ghosting, motion, spikes, noise, mr_noise)
}  # fmt: skip
# Measured on training folds (docs/results.md): the kinds that gain on scans with them. The others are there to be chosen.
MR_SHARES = {"inversion": 0.05, "remap": 0.08, "thick_slices": 0.07}


def usual_scanner_shifts(channels: Sequence[str]) -> dict[str, float]:
    """The default for scans with these channels; none if a channel is CT, for which nothing was measured.

    >>> usual_scanner_shifts(["T1"]), usual_scanner_shifts(["CT"])
    ({'inversion': 0.05, 'remap': 0.08, 'thick_slices': 0.07}, {})
    """
    return {} if has_ct(channels) else dict(MR_SHARES)


def has_ct(channels: Sequence[str]) -> bool:
    """Whether one of the channels is CT."""
    return "ct" in (name.strip().lower() for name in channels)


class ScannerShiftd(mt.Randomizable, mt.Transform):  # type: ignore[misc]
    """One shift, or none, of the image of a patch; its strength is drawn uniformly between 0.2 and 1.

    Args:
        shares: kind -> share of the patches that it is applied to; together at most 1.

    Raises:
        ValueError: an unknown kind, or shares that are not such probabilities.

    Example:
        >>> shift = ScannerShiftd({"inversion": 1.0}).set_random_state(0)
        >>> shift({"image": torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1)})["image"].flatten().tolist()
        [4.0, 3.0, -1.0]
    """

    keys = (IMAGE,)

    def __init__(self, shares: Shares) -> None:
        if unknown := sorted(set(shares) - set(SCANNER_SHIFTS)):
            raise ValueError(
                f"scanner_shifts has the unknown kind {unknown[0]!r}; the kinds are {', '.join(SCANNER_SHIFTS)}."
            )
        if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"scanner_shifts needs shares from 0 to 1, together at most 1, got {dict(shares)}.")
        self.shares = dict(shares)
        self.edges = np.cumsum(list(shares.values()))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        drawn = int(np.searchsorted(self.edges, self.R.random_sample(), side="right"))
        if drawn == len(self.shares):
            return dict(data)
        shift = SCANNER_SHIFTS[list(self.shares)[drawn]]
        after = shift(plain(data[IMAGE]), self.R.uniform(*STRENGTH), self.R)
        return {**data, IMAGE: like(after.contiguous(), data[IMAGE])}


def _unit(image: Tensor) -> Tensor:
    """Each channel from 0 to 1 between its 0.5th and 99.5th percentile, clipped."""
    voxels = image.flatten(1)
    some = voxels[:, :: voxels.shape[1] // 4096 | 1]  # thousands of voxels are enough; an odd step meets every column
    low, high = torch.quantile(some, torch.tensor([0.005, 0.995]), dim=1).reshape(2, -1, 1, 1, 1).unbind()
    return ((image - low) / (high - low).clamp_min(1e-6)).clamp_(0, 1)


def _along(image: Tensor, axis: int, matrix: npt.NDArray[np.float64]) -> Tensor:
    """The matrix applied to each line of voxels along an axis."""
    lines: Tensor = torch.tensordot(image, torch.from_numpy(matrix).to(image), ([axis], [1]))
    return lines.movedim(-1, axis)


def _lines(size: int) -> npt.NDArray[np.int64]:
    """Numbers of the lines of k-space in the order of the FFT: 0, 1, ..., -2, -1."""
    return np.fft.fftfreq(size, 1 / size).round().astype(np.int64)


def _line_filter(weight: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The matrix that weights the lines of k-space along an axis; the real part of its result."""
    weight = np.asarray(weight, dtype=np.float64)
    return np.asarray(np.fft.ifft(np.fft.fft(np.eye(len(weight)), axis=0) * weight[:, None], axis=0).real)


def _rigid(image: Tensor, axis: int, other: int, shift: npt.NDArray[np.float64], angle: float) -> Tensor:
    """Shifted (voxels) and rotated (radians) in the plane of two axes, linear, borders continued."""
    planes = image.movedim((axis, other), (2, 3))
    rows, columns = planes.shape[2:]
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = [[cos, -sin * rows / columns, 2 * shift[1] / columns], [sin * columns / rows, cos, 2 * shift[0] / rows]]
    stack = planes.flatten(0, 1)[None]
    grid = affine_grid(torch.tensor([matrix], dtype=image.dtype), list(stack.shape), align_corners=False)
    moved: Tensor = grid_sample(stack, grid, padding_mode="border", align_corners=False)
    return moved.reshape(planes.shape).movedim((2, 3), (axis, other))


def _uneven(image: Tensor, random: Random) -> Tensor:
    """1, or in half of the cases a smooth field between 0 and 1, the same for all channels."""
    if random.random_sample() < 0.5:
        return torch.ones(1, 1, 1, 1)
    coarse = torch.from_numpy(random.random_sample((1, 1, 3, 3, 3))).to(image)
    field: Tensor = interpolate(coarse, list(image.shape[1:]), mode="trilinear", align_corners=True)
    return field[0]
