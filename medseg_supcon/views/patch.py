"""Cutting a box out of a scan, filled outside of it, with an affine that keeps its place; foreground voxels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch.nn.functional import pad

FOREGROUND_KEY = "foreground_index"


class ForegroundIndexd(Transform):  # type: ignore[misc]
    """Store, for each foreground class of a case, up to ``max_voxels`` of its voxels.

    Deterministic: the voxels kept are drawn with a fixed seed. Put it last in preprocessing, so that the search is
    done once for a cached case and not for every patch. :class:`TwoViewsd` reads what it stores.

    Args:
        label_key: key of the label map, (1, X, Y, Z) of class indices. A case without it gets an empty index.
        max_voxels: voxels kept per class, at least 1.

    Returns:
        (on call) the case with ``"foreground_index"``: class index -> int16 or int32 tensor (n, 3) of voxel
        coordinates, for every class > 0 in the label map.

    Example:
        >>> label = torch.zeros(1, 4, 4, 4)
        >>> label[0, 1, 2, 3] = 2
        >>> ForegroundIndexd()({"label": label})["foreground_index"]
        {2: tensor([[1, 2, 3]], dtype=torch.int16)}
    """

    def __init__(self, label_key: str = "label", max_voxels: int = 2000) -> None:
        if max_voxels < 1:
            raise ValueError(f"max_voxels must be at least 1, got {max_voxels}.")
        self.label_key = label_key
        self.max_voxels = max_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        label = case.get(self.label_key)
        case[FOREGROUND_KEY] = {} if label is None else foreground_index(label, self.max_voxels)
        return case


def foreground_index(label: torch.Tensor, max_voxels: int = 2000) -> dict[int, torch.Tensor]:
    """Class index -> (n, 3) voxel coordinates, n <= ``max_voxels``; see :class:`ForegroundIndexd`."""
    volume = torch.as_tensor(label).as_subclass(torch.Tensor)[0]
    dtype = torch.int16 if max(volume.shape) < 2**15 else torch.int32
    flat = volume.reshape(-1)
    inside = torch.nonzero(flat > 0).squeeze(1)
    classes = flat[inside]
    index: dict[int, torch.Tensor] = {}
    for value in torch.unique(classes):
        members = inside[classes == value]
        if len(members) > max_voxels:
            # not every n-th: a step that divides the row length would keep to one plane of the structure
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
            members = members[order[:max_voxels].sort().values]
        coordinates = torch.unravel_index(members, volume.shape)
        index[int(value)] = torch.stack(coordinates, dim=1).to(dtype)
    return index


def crop_box(volume: torch.Tensor, start: Sequence[int], size: Sequence[int], fill: float) -> torch.Tensor:
    """The voxels ``start .. start + size`` of a (C, *spatial) volume, float32; ``fill`` outside the volume."""
    slices, padding = [slice(None)], []
    for first, length, extent in zip(start, size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, extent)
        slices.append(slice(low, max(high, low)))
        padding.append((max(low, 0) - first, first + length - max(high, low)))
    # a copy, because a policy may write in place; an unsigned label map could not hold a fill of -1
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
    """Voxels to add on each side of a patch, so that a rotated and zoomed patch is filled with the scan's voxels.

    A rotated patch stays within its half diagonal of the centre; ``context`` is the largest zoom out on top of that.
    0 adds nothing.
    """
    reach = context * math.sqrt(sum(length**2 for length in patch_size)) / 2
    return [max(math.ceil(reach - length / 2), 0) for length in patch_size]
