"""Where each foreground class lies, worked out once a case so that patches can be drawn around it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import Transform

FOREGROUND_KEY = "foreground_index"


class ForegroundIndexd(Transform):  # type: ignore[misc]
    """Store, for each foreground class of a case, up to ``max_voxels`` of its voxels.

    Deterministic: the voxels kept are drawn with a seed of their own. Put it last in preprocessing, so that
    the search is done once for a cached case and not at every draw of a patch. :class:`TwoViewsd` reads what
    it stores.

    Args:
        label_key: key of the label map, (1, X, Y, Z) of class indices. A case without it gets an empty index.
        max_voxels: voxels kept per class, at least 1.

    Returns:
        (on call) the case with ``"foreground_index"``: class index -> int16 or int32 tensor (n, 3) of voxel
        coordinates, for every class > 0 that the label map holds.

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
