"""Two differently augmented views of one patch of a scan, and which voxel of one is which voxel of the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, RandAffined, Randomizable, ResizeWithPadOrCropd, Transform
from torch.nn.functional import pad

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.views.spatial import IMAGE, KEYS, LABEL, AffinePatchd, affine_of

FOREGROUND = "foreground_index"
NO_PAIR = -1
# MONAI's packages of transforms that move voxels; its other transforms leave them where they are
SPATIAL_PACKAGES = ("monai.transforms.spatial", "monai.transforms.croppad", "monai.transforms.smooth_field")


class ForegroundIndexd(Transform):  # type: ignore[misc]
    """Store, for each foreground class of a case, up to ``max_voxels`` of its voxels, drawn with a fixed seed.

    Put it last in preprocessing, so that the search is done once for a cached case and not for every patch.

    Returns:
        (on call) the case with ``"foreground_index"``: class index -> int16 or int32 tensor (n, 3) of voxel
        coordinates, for every class > 0 in the label map (1, X, Y, Z); empty if the case has no label map.

    Example:
        >>> label = torch.zeros(1, 4, 4, 4)
        >>> label[0, 1, 2, 3] = 2
        >>> ForegroundIndexd()({"label": label})["foreground_index"]
        {2: tensor([[1, 2, 3]], dtype=torch.int16)}
    """

    def __init__(self, max_voxels: int = 2000) -> None:
        if max_voxels < 1:
            raise ValueError(f"max_voxels must be at least 1, got {max_voxels}.")
        self.max_voxels = max_voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        index: dict[int, torch.Tensor] = {}
        if data.get(LABEL) is None:
            return {**data, FOREGROUND: index}
        volume = _plain(data[LABEL])[0]
        dtype = torch.int16 if max(volume.shape) < 2**15 else torch.int32
        flat = volume.reshape(-1)
        inside = torch.nonzero(flat > 0).squeeze(1)
        classes = flat[inside]
        for value in torch.unique(classes):
            members = inside[classes == value]
            if len(members) > self.max_voxels:
                # not every n-th: a step that divides the row length would keep to one plane of the structure
                order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
                members = members[order[: self.max_voxels].sort().values]
            index[int(value)] = torch.stack(torch.unravel_index(members, volume.shape), dim=1).to(dtype)
        return {**data, FOREGROUND: index}


class TwoViewsd(Randomizable, Transform):  # type: ignore[misc]
    """Two differently augmented views of a patch of a preprocessed case.

    A patch centre is drawn, then each view is made by its policy from a box around it. Voxels outside the scan are 0 in
    the image, as in MONAI's sliding window, and -1 in the label map. Inside a policy, label values are the class index
    plus 1, because MONAI's transforms fill with 0.

    Args:
        patch_size: voxels per axis of a view.
        view_1: policy of the first view, any MONAI transform (Compose) of dictionaries on both keys. A result
            of another size is cropped or padded about its centre to ``patch_size``.
        view_2: policy of the second view; ``None``: as ``view_1``, with its own draws.
        foreground: probability that the centre is a foreground voxel, of a class drawn first; otherwise it is anywhere.
        jitter: how far the views' centres may be from the patch centre, as a fraction of the patch per axis.
        context: how far around the patch a policy sees the scan, in half diagonals of the patch: 1.45 covers
            any rotation together with the widest zoom of ``standard_view``. 0 gives a policy the bare patch.

    Returns:
        (on call, with ``"image"`` (C, X, Y, Z) and perhaps ``"label"``, without which a case counts as unlabelled)
        a dict of plain tensors: ``"image"`` float32 (2, C, *patch); ``"label"`` int64 (2, 1, *patch) of class
        indices, -1 unlabelled or outside; ``"pair_ids"`` int64 (2, 1, *patch): in view 1 a voxel's linear index, in
        view 2 the index of the view-1 voxel with the nearest centre, -1 outside the scan or (view 2) outside view 1;
        ``"name"`` if the case has one. Without ``"pair_ids"`` if a policy holds a transform that moves voxels and does
        not record it in the affine (elastic deformation).

    Raises:
        ConfigError: a policy moves image and label differently.

    Example:
        >>> from medseg_supcon.views import identity_view
        >>> views = TwoViewsd((8, 8, 8), identity_view((8, 8, 8))).set_random_state(0)
        >>> item = views({"image": torch.rand(1, 12, 9, 7), "name": "scan"})
        >>> item["image"].shape, item["label"].unique().tolist()
        (torch.Size([2, 1, 8, 8, 8]), [-1])
    """

    def __init__(
        self, patch_size: Sequence[int], view_1: Any, view_2: Any = None, *, foreground: float = 0.5, jitter: float = 0.1,
        context: float = 1.45,
    ) -> None:  # fmt: skip
        if any(length < 1 for length in patch_size):
            raise ValueError(f"patch_size must be positive voxel counts, got {tuple(patch_size)}.")
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground is a probability, 0 to 1, got {foreground}.")
        if not 0 <= jitter <= 0.5 or context < 0:
            raise ValueError(f"jitter must be between 0 and 0.5 and context at least 0, got {jitter} and {context}.")
        self.patch_size = tuple(int(length) for length in patch_size)
        self.foreground, self.jitter = foreground, jitter
        # a rotated patch stays within its half diagonal of the centre; context is the zoom out on top of that
        reach = context * math.hypot(*self.patch_size) / 2
        self.margin = [max(math.ceil(reach - length / 2), 0) for length in self.patch_size]
        self.policies = (view_1, view_1 if view_2 is None else view_2)
        self.paired = not any(has_untracked(policy) for policy in self.policies)
        self._to_patch = ResizeWithPadOrCropd(KEYS, spatial_size=self.patch_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        affine, image = affine_of(data[IMAGE]), _plain(data[IMAGE])
        shape = image.shape[1:]
        unlabelled = data.get(LABEL) is None
        label = torch.tensor(float(IGNORE_INDEX)).expand(1, *shape) if unlabelled else _plain(data[LABEL])
        centre = self._draw_centre(data, shape)
        images, labels, to_scan, inside = [], [], [], []
        for policy in self.policies:
            start, size = self._draw_box(centre, shape)
            place = affine.clone()
            place[:-1, -1] += place[:-1, :-1] @ torch.tensor(start, dtype=torch.float64)
            box = {
                IMAGE: MetaTensor(_crop(image, start, size, 0.0), affine=place),
                LABEL: MetaTensor(_crop(label, start, size, IGNORE_INDEX) + 1, affine=place.clone()),
            }
            patch, patch_label, place = self._run(policy, box)
            images.append(patch.float())
            labels.append(
                patch_label.round().long().sub_(1)
            )  # from class index plus 1 back to class index and, for 0, -1
            if self.paired:
                to_scan.append(torch.linalg.inv(affine) @ place)
                low = [max(first, 0) for first in start]
                high = [min(first + n, extent) - 1 for first, n, extent in zip(start, size, shape, strict=True)]
                inside.append(within(nearest_voxels(self.patch_size, to_scan[-1]), low, high).expand(self.patch_size))
        result = {IMAGE: torch.stack(images), LABEL: torch.stack(labels)}
        if self.paired:
            result[LABEL].masked_fill_(~torch.stack(inside)[:, None], IGNORE_INDEX)
            result["pair_ids"] = pair_ids(to_scan, inside)[:, None]
        return {**result, "name": data["name"]} if "name" in data else result

    def _draw_centre(self, data: Mapping[Hashable, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
        anywhere = np.array([self.R.randint(length) for length in shape])
        if self.R.random_sample() >= self.foreground or data.get(LABEL) is None:
            return anywhere
        index = (data if FOREGROUND in data else ForegroundIndexd()(data))[FOREGROUND]
        if not index:
            return anywhere
        classes = sorted(index)
        voxels = index[classes[self.R.randint(len(classes))]]
        return np.asarray(voxels[self.R.randint(len(voxels))], dtype=np.int64)

    def _draw_box(self, centre: np.ndarray[Any, Any], shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """First voxel and size of the box that a view is made from; the view's patch is its middle."""
        start, size = [], []
        for middle, extent, length, margin in zip(centre, shape, self.patch_size, self.margin, strict=True):
            # the patch stays in the scan if it fits, otherwise the scan in the patch
            low, high = min(0, extent - length), max(0, extent - length)
            first = min(max(int(middle) - length // 2, low), high)
            reach = int(self.jitter * length)
            first += int(self.R.randint(-reach, reach + 1))
            # further out than the scan's far end there is only padding
            margin = min(margin, max(first, extent - first - length, 0))
            start.append(first - margin)
            size.append(length + 2 * margin)
        return start, size

    def _run(self, policy: Any, box: dict[str, MetaTensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image and label map of a view, plain tensors, and its affine."""
        _draw_from(self.R, policy)
        stop = _last_spatial(policy)
        view = policy(box) if stop is None else policy(box, end=stop)
        image, label = view[IMAGE], view[LABEL]
        same = isinstance(image, MetaTensor) and isinstance(label, MetaTensor)
        if not same or not torch.allclose(image.affine, label.affine.to(image.affine), atol=1e-4):
            raise ConfigError(
                "A view policy moved image and label differently, or dropped their affine: give every "
                "spatial transform both keys, 'image' and 'label', and keep the MetaTensors."
            )
        if any(tuple(view[key].shape[1:]) != self.patch_size for key in KEYS):
            view = self._to_patch({key: view[key] for key in KEYS})
        affine = affine_of(view[IMAGE])
        view = {key: _plain(view[key]) for key in KEYS}
        if stop is not None:  # the metadata of MetaTensors takes longer than many a change of intensity
            view = policy(view, start=stop)
        return _plain(view[IMAGE]), _plain(view[LABEL]), affine


def _crop(volume: torch.Tensor, start: Sequence[int], size: Sequence[int], fill: float) -> torch.Tensor:
    """The voxels ``start .. start + size`` of a (C, *spatial) volume, float32; ``fill`` outside the volume."""
    slices, padding = [slice(None)], []
    for first, length, extent in zip(start, size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, extent)
        slices.append(slice(low, max(high, low)))
        padding.append((max(low, 0) - first, first + length - max(high, low)))
    # a copy, because a policy may write in place; an unsigned label map could not hold a fill of -1
    box = volume[tuple(slices)].to(torch.float32, copy=True)
    amounts = [amount for pair in reversed(padding) for amount in pair]
    return pad(box, amounts, value=fill) if any(amounts) else box


def _plain(tensor: Any) -> torch.Tensor:
    return torch.as_tensor(tensor).as_subclass(torch.Tensor)


def _draw_from(random: np.random.RandomState, policy: Any) -> None:
    """Let all transforms of a policy draw from one state: making and seeding one for each takes longer than most of them."""
    if isinstance(policy, Compose):
        policy.R = random  # its set_random_state would seed the transforms anew
        for transform in policy.transforms:
            _draw_from(random, transform)
    elif isinstance(policy, Randomizable):
        policy.set_random_state(state=random)


def leaves(policy: Any) -> Iterator[Any]:
    """The transforms of a policy, including those in nested Compose, OneOf, SomeOf and RandomOrder."""
    if isinstance(policy, Compose):
        for transform in policy.transforms:
            yield from leaves(transform)
    else:
        yield policy


def moves_voxels(transform: Any) -> bool:
    """Whether a transform may change where voxels are.

    A transform that leaves the label map alone cannot, or image and label would no longer match. Of the others,
    MONAI's spatial and cropping transforms do, and so may every transform that is not MONAI's.
    """
    return _is_spatial(transform) and LABEL in getattr(transform, "keys", (LABEL,))


def _is_spatial(transform: Any) -> bool:
    module = type(transform).__module__
    if module.startswith("monai."):
        return module.startswith(SPATIAL_PACKAGES)
    return LABEL in getattr(transform, "keys", (LABEL,))


def _last_spatial(policy: Any) -> int | None:
    """How many of a policy's transforms come before those that only change intensities; None: it cannot be cut there."""
    if type(policy) is not Compose or policy.lazy:
        return None
    moving = [i for i, part in enumerate(policy.transforms) if any(_is_spatial(leaf) for leaf in leaves(part))]
    return max(moving, default=-1) + 1


def has_untracked(policy: Any) -> bool:
    """Whether the affine does not say where a view's voxels come from (elastic, grid distortion)."""
    return any(moves_voxels(leaf) and not _is_tracked(leaf) for leaf in leaves(policy))


def _is_tracked(transform: Any) -> bool:
    """Whether the transform writes what it does into the MetaTensor's affine."""
    if isinstance(transform, RandAffined) and transform.prob < 1:
        # if chance leaves only the crop to spatial_size, MONAI 1.6 records an earlier draw's affine
        return transform.rand_affine.spatial_size is None
    of_monai = type(transform).__module__.startswith("monai.") and isinstance(transform, InvertibleTransform)
    return of_monai or isinstance(transform, AffinePatchd)


def nearest_voxels(shape: Sequence[int], matrix: torch.Tensor) -> list[torch.Tensor]:
    """``matrix`` applied to every voxel index of ``shape``, rounded: per axis an int64 tensor that broadcasts to ``shape``.

    Without rotation each is a single line of voxels, and what is computed from it is cheap.
    """
    places = []
    for *row, offset in matrix[:-1].tolist():
        place = torch.full([1] * len(shape), offset + 0.5, dtype=torch.float64)
        for axis, (length, step) in enumerate(zip(shape, row, strict=True)):
            if abs(step) > 1e-9:  # a smaller one is a rounding error of the affines
                line = step * torch.arange(length, dtype=torch.float64)
                place = place + line.view([-1 if a == axis else 1 for a in range(len(shape))])
        places.append(place.floor().long())
    return places


def within(voxels: Sequence[torch.Tensor], low: Sequence[int], high: Sequence[int]) -> torch.Tensor:
    """Which of the voxels, one tensor per axis, are in ``low .. high`` (first and last, inclusive)."""
    return reduce(torch.logical_and, [(v >= a) & (v <= b) for v, a, b in zip(voxels, low, high, strict=True)])


def pair_ids(to_scan: Sequence[torch.Tensor], inside: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids of one physical voxel in both views, (2, *patch) int64; ``TwoViewsd`` says what they are.

    Args:
        to_scan: of each view, (4, 4) float64: view voxel -> scan voxel.
        inside: of each view, (*patch) bool: the voxel shows the scan and not padding.
    """
    shape = inside[0].shape
    ids = torch.arange(shape.numel()).view(shape).masked_fill(~inside[0], NO_PAIR)
    voxels = nearest_voxels(shape, torch.linalg.inv(to_scan[0]) @ to_scan[1])
    index = torch.zeros((), dtype=torch.int64)
    for voxel, length in zip(voxels, shape, strict=True):
        index = index * length + voxel.clamp(0, length - 1)
    paired = inside[1] & within(voxels, [0] * len(shape), [length - 1 for length in shape])
    return torch.stack((ids, ids.take(index.expand(shape)).masked_fill_(~paired, NO_PAIR)))
