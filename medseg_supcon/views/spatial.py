"""Where the voxels of a view come from: rotation, zoom, shift, mirror and crop of image and label map in one step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import create_rotate, create_scale, create_translate
from torch import Tensor
from torch.nn.functional import grid_sample

from medseg_supcon.views.intensity import IMAGE, plain

LABEL = "label"
KEYS = (IMAGE, LABEL)
MODES = {IMAGE: "bilinear", LABEL: "nearest"}  # bilinear is torch's word for linear


class AffinePatchd(mt.Randomizable, mt.Transform):  # type: ignore[misc]
    """The patch at the centre of a box: mirrored, and in a share of the draws rotated, shifted and zoomed.

    At most one resampling, linear for the image and nearest for the label map, 0 outside the box; if nothing but
    mirroring is drawn, the voxels are the box's. What MONAI's ``RandAffined``, ``CenterSpatialCropd`` and ``RandFlipd``
    do one after the other takes several times as long, most of it bookkeeping.

    Args:
        spatial_size: voxels per axis of the patch.
        prob: share of the draws that are rotated, shifted and zoomed.
        rotate_range: per axis, the largest angle about it, both ways, in radians.
        translate_range: per axis, the largest shift, both ways, in voxels.
        scale_range: per axis, the smallest and largest field of view: 0.4 shows 1.4 times as much.
        flip_axes: spatial axes that are mirrored, each with probability 0.5.

    Returns:
        (on call, with ``"image"`` (C, X, Y, Z) and ``"label"`` (1, X, Y, Z)) the same as float32 MetaTensors of
        ``spatial_size``, whose affine says where the voxels come from.

    Example:
        >>> box = torch.arange(5.0).reshape(1, 5, 1, 1)
        >>> AffinePatchd((3, 1, 1))({"image": box, "label": box})["label"].flatten().tolist()
        [1.0, 2.0, 3.0]
    """

    keys = KEYS

    def __init__(
        self, spatial_size: Sequence[int], prob: float = 0.0, *, rotate_range: Sequence[float] = (0.0, 0.0, 0.0),
        translate_range: Sequence[float] = (0.0, 0.0, 0.0), scale_range: Sequence[tuple[float, float]] = ((0.0, 0.0),) * 3,
        flip_axes: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.spatial_size, self.prob, self.flip_axes = tuple(spatial_size), prob, tuple(flip_axes)
        self.rotate_range, self.translate_range = np.array(rotate_range), np.array(translate_range)
        self.scale_range = np.array(scale_range).T

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        size = data[IMAGE].shape[1:]
        start = [max(n - length, 0) // 2 for n, length in zip(size, self.spatial_size, strict=True)]
        matrix, resampled = np.eye(4), self.R.random_sample() < self.prob
        if resampled:
            turn, shift = (self.R.uniform(-most, most) for most in (self.rotate_range, self.translate_range))
            zoom = 1 + self.R.uniform(*self.scale_range)
            matrix = create_rotate(3, turn) @ create_translate(3, shift) @ create_scale(3, zoom)
        mirrored = [axis for axis in self.flip_axes if self.R.random_sample() < 0.5]
        matrix[:, mirrored] *= -1
        # it turns about the middle of the patch, so far
        middle = (np.array(self.spatial_size) - 1) / 2
        matrix[:3, 3] += start + middle - matrix[:3, :3] @ middle
        boxes = {key: plain(data[key]) for key in KEYS}
        if resampled:
            grid = sampling_grid(self.spatial_size, torch.from_numpy(matrix).float(), size)
            patches = {
                key: grid_sample(box[None], grid, MODES[key], padding_mode="zeros", align_corners=False)[0]
                for key, box in boxes.items()
            }
        else:
            part = [slice(None), *(slice(k, k + n) for k, n in zip(start, self.spatial_size, strict=True))]
            patches = {key: box[tuple(part)].flip([axis + 1 for axis in mirrored]) for key, box in boxes.items()}
        change = torch.from_numpy(matrix)
        return {**data, **{k: MetaTensor(patches[k], affine=affine_of(data[k]) @ change) for k in KEYS}}


def sampling_grid(shape: Sequence[int], matrix: Tensor, box: Sequence[int]) -> Tensor:
    """Where a (4, 4) matrix takes the voxels of ``shape`` in a box, as ``grid_sample`` wants it: (1, *shape, 3).

    ``affine_grid`` is many times as slow.
    """
    # voxel -0.5 of the box is at -1, and voxel n - 0.5 at 1; the last axis comes first
    size = torch.tensor(box, dtype=matrix.dtype)
    scaled = (matrix[:3] * (2 / size)[:, None]).flip(0)
    grid = scaled[:, 3] + (1 / size - 1).flip(0)
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=matrix.dtype)[:, None] * scaled[:, axis]
        grid = grid + line.view(*[length if a == axis else 1 for a in range(3)], 3)
    return grid[None]


def affine_of(volume: Tensor) -> Tensor:
    """Voxel to world of a (C, *spatial) volume, float64; the identity for a plain tensor."""
    rank = volume.ndim - 1
    if isinstance(volume, MetaTensor):
        return torch.as_tensor(volume.affine).to(torch.float64)[: rank + 1, : rank + 1]
    return torch.eye(rank + 1, dtype=torch.float64)
