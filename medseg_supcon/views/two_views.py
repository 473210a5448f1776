"""Two differently augmented views of one patch of a scan, and which voxel of one is which voxel of the other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Randomizable, ResizeWithPadOrCropd, Transform

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.views.correspondence import has_untracked, pair_ids, voxel_grid, within
from medseg_supcon.views.patch import (
    FOREGROUND_KEY,
    affine_of,
    context_margin,
    crop_box,
    foreground_index,
    shifted_affine,
)

MAX_SEED = 2**32 - 1


class TwoViewsd(Randomizable, Transform):  # type: ignore[misc]
    """Two differently augmented views of a patch of a preprocessed case.

    A patch centre is drawn (with probability ``foreground`` at a voxel of a foreground class, the class drawn
    first so that rare ones are seen; otherwise anywhere), then each view is made by its policy from a box
    around it. Voxels outside the scan are 0 in the image, as in MONAI's sliding window, so that the network
    sees the same border in training and inference; their label is -1.

    Inside a policy, label values are the class index plus 1: 0, with which MONAI's transforms fill, then
    means "outside the scan", and becomes -1 in the result.

    Args:
        patch_size: voxels per axis of a view.
        view_1: policy of the first view, any MONAI transform (Compose) of dictionaries on both keys. A result
            of another size is cropped or padded about its centre to ``patch_size``.
        view_2: policy of the second view; ``None``: as ``view_1``, with its own draws.
        foreground: probability that the patch is drawn around a foreground voxel, 0 to 1.
        jitter: how far the views' centres may be from the patch centre, as a fraction of the patch per axis.
        context: how far around the patch a policy sees the scan, in half diagonals of the patch: 1.45 covers
            any rotation together with the widest zoom of ``standard_view``. 0 gives a policy the bare patch.
        image_key, label_key: keys of the case. A case without label counts as unlabelled: all -1.

    Returns:
        (on call) a dict of plain tensors: ``"image"`` float32 (2, C, *patch); ``"label"`` int64
        (2, 1, *patch) of class indices, -1 unlabelled or outside; ``"pair_ids"`` int64 (2, 1, *patch): in
        view 1 a voxel's linear index, in view 2 the index of the view-1 voxel with the nearest centre, -1
        outside the scan or (view 2) outside view 1; ``"name"`` if the case has one. Without ``"pair_ids"`` if a
        policy holds a transform that moves voxels and does not record it in the affine (elastic deformation).

    Raises:
        ValueError: an argument is out of its range.
        ConfigError: a policy moves image and label differently.

    Example:
        >>> from medseg_supcon.views import identity_view
        >>> views = TwoViewsd((8, 8, 8), identity_view((8, 8, 8))).set_random_state(0)
        >>> item = views({"image": torch.rand(1, 12, 9, 7), "name": "scan"})
        >>> item["image"].shape, item["label"].unique().tolist()
        (torch.Size([2, 1, 8, 8, 8]), [-1])
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        view_1: Any,
        view_2: Any = None,
        *,
        foreground: float = 0.5,
        jitter: float = 0.1,
        context: float = 1.45,
        image_key: str = "image",
        label_key: str = "label",
    ) -> None:
        if any(length < 1 for length in patch_size):
            raise ValueError(f"patch_size must be positive voxel counts, got {tuple(patch_size)}.")
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground is a probability, 0 to 1, got {foreground}.")
        if not 0 <= jitter <= 0.5 or context < 0:
            raise ValueError(f"jitter must be between 0 and 0.5 and context at least 0, got {jitter} and {context}.")
        self.patch_size = tuple(int(length) for length in patch_size)
        self.foreground, self.jitter = foreground, jitter
        self.margin = context_margin(self.patch_size, context)
        self.image_key, self.label_key = image_key, label_key
        self.policies = (view_1, view_1 if view_2 is None else view_2)
        self.paired = not any(has_untracked(policy, label_key) for policy in self.policies)
        self._to_patch = ResizeWithPadOrCropd((image_key, label_key), spatial_size=self.patch_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        image = torch.as_tensor(data[self.image_key])
        affine, shape = affine_of(image), image.shape[1:]
        image = image.as_subclass(torch.Tensor)
        label = self._label(data, image)
        centre = self._draw_centre(data, shape)
        views, to_scan, inside = [], [], []
        for policy in self.policies:
            start, size = self._draw_box(centre, shape)
            view = self._run(policy, self._box(image, label, affine, start, size))
            views.append(view)
            if self.paired:
                to_scan.append(torch.linalg.inv(affine) @ affine_of(view[self.image_key]))
                low = [max(first, 0) for first in start]
                high = [min(first + n, extent) - 1 for first, n, extent in zip(start, size, shape, strict=True)]
                inside.append(within(voxel_grid(self.patch_size, to_scan[-1]), low, high))
        result = {
            "image": torch.stack([_plain(view[self.image_key]).float() for view in views]),
            # from class index plus 1 back to class index and, for 0, -1
            "label": torch.stack([_plain(view[self.label_key]).round().long() - 1 for view in views]),
        }
        if self.paired:
            result["label"].masked_fill_(~torch.stack(inside)[:, None], IGNORE_INDEX)
            result["pair_ids"] = pair_ids(to_scan, inside)[:, None]
        return {**result, "name": data["name"]} if "name" in data else result

    def _label(self, data: Mapping[Hashable, Any], image: torch.Tensor) -> torch.Tensor:
        """The label map, all -1 (unlabelled) where the case has none."""
        label = data.get(self.label_key)
        if label is None:
            return torch.tensor(float(IGNORE_INDEX)).expand(1, *image.shape[1:])
        return torch.as_tensor(label).as_subclass(torch.Tensor)

    def _draw_centre(self, data: Mapping[Hashable, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
        anywhere = np.array([self.R.randint(length) for length in shape])
        if self.R.random_sample() >= self.foreground or data.get(self.label_key) is None:
            return anywhere
        index = data.get(FOREGROUND_KEY)
        if index is None:
            index = foreground_index(data[self.label_key])
        if not index:
            return anywhere
        classes = sorted(index)
        voxels = index[classes[self.R.randint(len(classes))]]
        return np.asarray(voxels[self.R.randint(len(voxels))], dtype=np.int64)

    def _draw_box(self, centre: np.ndarray[Any, Any], shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """First voxel and size of the box that a view is made from; the view's patch is its middle."""
        start, size = [], []
        for middle, extent, length, margin in zip(centre, shape, self.patch_size, self.margin, strict=True):
            first = int(middle) - length // 2
            # the patch stays in the scan if it fits, otherwise the scan in the patch
            low, high = min(0, extent - length), max(0, extent - length)
            first = min(max(first, low), high)
            reach = int(self.jitter * length)
            first += int(self.R.randint(-reach, reach + 1))
            # further out than the scan's far end there is only padding
            margin = min(margin, max(first, extent - first - length, 0))
            start.append(first - margin)
            size.append(length + 2 * margin)
        return start, size

    def _box(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        affine: torch.Tensor,
        start: Sequence[int],
        size: Sequence[int],
    ) -> dict[str, MetaTensor]:
        place = shifted_affine(affine, start)
        return {
            self.image_key: MetaTensor(crop_box(image, start, size, 0.0), affine=place),
            self.label_key: MetaTensor(crop_box(label, start, size, IGNORE_INDEX) + 1, affine=place.clone()),
        }

    def _run(self, policy: Any, box: dict[str, MetaTensor]) -> dict[str, MetaTensor]:
        seed = int(self.R.randint(MAX_SEED, dtype="uint32"))
        if isinstance(policy, Randomizable):
            policy.set_random_state(seed)
        view = policy(box)
        image, label = view[self.image_key], view[self.label_key]
        if tuple(image.shape[1:]) != self.patch_size or tuple(label.shape[1:]) != self.patch_size:
            view = self._to_patch({self.image_key: image, self.label_key: label})
            image, label = view[self.image_key], view[self.label_key]
        same = isinstance(image, MetaTensor) and isinstance(label, MetaTensor)
        if not same or not torch.allclose(image.affine, label.affine.to(image.affine), atol=1e-4):
            raise ConfigError(
                "A view policy moved image and label differently, or dropped their affine: give every "
                f"spatial transform both keys, {self.image_key!r} and {self.label_key!r}, and "
                "keep the MetaTensors."
            )
        return {self.image_key: image, self.label_key: label}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)
