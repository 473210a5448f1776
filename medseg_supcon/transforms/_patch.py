"""Cutting a box out of a scan, with what lies outside filled and the box's place in the world kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from torch.nn.functional import pad


def crop_box(volume: torch.Tensor, start: Sequence[int], size: Sequence[int], fill: float) -> torch.Tensor:
    """The voxels ``start .. start + size`` of a (C, *spatial) volume, float32; ``fill`` where it has none."""
    slices, padding = [slice(None)], []
    for first, length, extent in zip(start, size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, extent)
        slices.append(slice(low, max(high, low)))
        padding.append((max(low, 0) - first, first + length - max(high, low)))
    # a copy, for a policy may write in place; and an unsigned label map could not hold a fill of -1
    box = volume[tuple(slices)].to(torch.float32, copy=True)
    if any(before or after for before, after in padding):
        box = pad(box, [amount for pair in reversed(padding) for amount in pair], value=fill)
    return box


def shifted_affine(affine: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
    """The affine of a box that begins at voxel ``start`` of a scan with ``affine``, float64 (4, 4)."""
    moved = affine.to(torch.float64).clone()
    moved[:-1, -1] += moved[:-1, :-1] @ torch.tensor(start, dtype=torch.float64)
    return moved


def affine_of(volume: torch.Tensor) -> torch.Tensor:
    """Voxel to world of a (C, *spatial) volume, float64; the identity for a plain tensor."""
    rank = volume.ndim - 1
    if isinstance(volume, MetaTensor):
        return torch.as_tensor(volume.affine).to(torch.float64)[: rank + 1, : rank + 1]
    return torch.eye(rank + 1, dtype=torch.float64)


def context_margin(patch_size: Sequence[int], context: float) -> list[int]:
    """Voxels to add on each side of a patch, so that a rotated and zoomed patch finds the scan's voxels.

    A patch turned by any angle stays within its half diagonal of the centre; ``context`` is the largest zoom
    out on top of that. 0 adds nothing.
    """
    reach = context * math.sqrt(sum(length**2 for length in patch_size)) / 2
    return [max(math.ceil(reach - length / 2), 0) for length in patch_size]
