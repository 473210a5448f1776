"""Changes of intensity at nnU-Net's kind and strength: noise, blur, low resolution, brightness, contrast, gamma, bias field.

A change is a function of the image (C, X, Y, Z), float32, and a random state. It is drawn for all channels together and
leaves the content in place. MONAI has the same changes; on patches of a few 100,000 voxels they take several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.utils import convert_to_dst_type
from numpy.polynomial.legendre import legvander
from torch import Tensor
from torch.nn.functional import interpolate

IMAGE = "image"
SPATIAL = (1, 2, 3)
Random = np.random.RandomState
Range = tuple[float, float]


class IntensityChanged(mt.Randomizable, mt.Transform):  # type: ignore[misc]
    """``change(image, random, **arguments)`` of the image, in a share ``prob`` of the draws.

    Example:
        >>> brighter = IntensityChanged(1.0, brightness, factor=0.25).set_random_state(0)
        >>> round(brighter({"image": torch.ones(1, 1, 1, 1)})["image"].item(), 3)
        1.108
    """

    keys = (IMAGE,)

    def __init__(self, prob: float, change: Callable[..., Tensor], **arguments: Any) -> None:
        self.prob, self.change, self.arguments = prob, change, arguments

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.R.random_sample() >= self.prob:
            return dict(data)
        after = self.change(plain(data[IMAGE]), self.R, **self.arguments)
        return {**data, IMAGE: like(after, data[IMAGE])}


class BiasFieldd(IntensityChanged):
    """MONAI's bias field with each channel's mean and deviation kept; all channels of a patch get the same field.

    It multiplies intensities above the patch's lowest: negative ones (z-scored) would change in the wrong direction.
    """

    def __init__(self, prob: float) -> None:
        super().__init__(prob, bias_field, coefficients=(-0.3, 0.3))


def gaussian_noise(image: Tensor, random: Random, std: float) -> Tensor:
    """Noise whose standard deviation is between 0 and ``std``."""
    return image + random.uniform(0, std) * normal(image, random)


def blur(image: Tensor, random: Random, sigma: Range) -> Tensor:
    """Gaussian, sigma in voxels, one for each axis; beyond the patch is 0."""
    matrices = []
    for size, width in zip(image.shape[1:], random.uniform(*sigma, 3), strict=True):
        place = torch.arange(size, dtype=torch.float32)
        distance = (place - place[:, None]) / (math.sqrt(2) * width)
        half = 0.5 / (math.sqrt(2) * width)
        matrices.append(0.5 * (torch.erf(distance + half) - torch.erf(distance - half)))  # over the extent of a voxel
    return along_axes(image, matrices)


def low_resolution(image: Tensor, random: Random, zoom: Range) -> Tensor:
    """Averages over larger voxels, ``zoom`` times as many per axis, interpolated back linearly."""
    factor = random.uniform(*zoom)
    matrices = []
    for size in image.shape[1:]:
        # averages over an area: nearest would move the content by half a voxel
        coarse = interpolate(torch.eye(size)[None], max(1, round(size * factor)), mode="area")
        matrices.append(interpolate(coarse, size, mode="linear")[0].t())
    return along_axes(image, matrices)


def brightness(image: Tensor, random: Random, factor: float) -> Tensor:
    """Times 1 - ``factor`` to 1 + ``factor``."""
    return image * (1 + random.uniform(-factor, factor))


def contrast(image: Tensor, random: Random, factor: float) -> Tensor:
    """As ``brightness``, but of the difference from the mean, and within the range of the image."""
    mean, (low, high) = image.mean(), image.aminmax()
    return torch.lerp(mean, image, 1 + random.uniform(-factor, factor)).clamp_(low, high)


def power(image: Tensor, random: Random, gamma: Range, negative: bool = False) -> Tensor:
    """The image, or its negative, between 0 and 1 to the power ``gamma``; mean and deviation stay."""
    low, high = image.aminmax()
    start, sign = (high, -1) if negative else (low, 1)
    after = sign * ((image - start) / (sign * (high - low + 1e-7))).pow_(random.uniform(*gamma))
    return same_statistics(image[None].flatten(1, 2), after[None].flatten(1, 2)).view_as(image)


def bias_field(image: Tensor, random: Random, coefficients: Range) -> Tensor:
    """A smooth factor on what is above each channel's lowest intensity; its mean and deviation stay.

    The logarithm is a sum of Legendre polynomials up to degree 3 in all, each with a random coefficient, as in MONAI.
    """
    weight = random.uniform(*coefficients, (4, 4, 4)) * (np.indices((4, 4, 4)).sum(0) <= 3)
    field = torch.from_numpy(weight[None]).float()
    bases = [torch.from_numpy(legvander(np.linspace(-1, 1, size), 3)).float() for size in image.shape[1:]]
    factor = along_axes(field, bases).exp_()
    return same_statistics(image, (image - image.amin(SPATIAL, keepdim=True)) * factor)


def same_statistics(before: Tensor, after: Tensor) -> Tensor:
    """``after`` with each channel's mean and standard deviation of ``before``."""
    factor = spread(before) / spread(after).clamp_min(1e-8)
    return (after - after.mean(SPATIAL, keepdim=True)) * factor + before.mean(SPATIAL, keepdim=True)


def spread(image: Tensor) -> Tensor:
    """Standard deviation of each channel, (C, 1, 1, 1)."""
    return image.std(SPATIAL, correction=0, keepdim=True)


def along_axes(image: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A matrix applied to the lines of voxels along each axis."""
    for matrix in matrices:  # the axis goes to the end, so after three they are in order
        image = torch.tensordot(image, matrix, ([1], [1]))
    return image


def normal(image: Tensor, random: Random) -> Tensor:
    """Standard normal noise of the image's shape."""
    generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))  # several times as fast as RandomState
    return torch.randn(image.shape, generator=generator)


def plain(tensor: Any) -> Tensor:
    """A plain float32 tensor."""
    return torch.as_tensor(tensor).as_subclass(Tensor).float()


def like(after: Tensor, before: Any) -> Tensor:
    """``after`` as a MetaTensor if ``before`` is one, with its affine."""
    return after if type(before) is Tensor else convert_to_dst_type(after.contiguous(), before)[0]
