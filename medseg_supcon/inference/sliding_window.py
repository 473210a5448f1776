"""Sliding-window inference that yields rows of the scan as soon as they are finished.

The result is that of MONAI's `sliding_window_inference` with Gaussian weights, addition for addition. Only one
patch's depth of it is in memory at a time, which bounds the memory for long scans with many classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medseg_supcon.bundle import Model
from medseg_supcon.errors import RunError
from medseg_supcon.inference.resample import GridMapping


def network_outputs(
    network: torch.nn.Module, model: Model, tta: bool, context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Tensor], Tensor]:
    """Logits of a batch (B, C, *patch) -> (B, K, *patch); with ``tta`` probabilities.

    Test-time augmentation is the mean over all mirrorings along the plan's ``flip_axes``.
    """
    axes = [axis + 2 for axis in model.plan["flip_axes"]]
    mirrorings = [flips for n in range(len(axes) + 1) for flips in combinations(axes, n)]
    classes = len(model.plan["labels"])

    def logits(batch: Tensor) -> Tensor:
        with context():
            output = network(batch)
        output = output[0] if isinstance(output, tuple | list) else output
        if output.shape[1] != classes:
            raise RunError(
                f"{model.name}: the network outputs {output.shape[1]} channels, but the plan has {classes} labels. "
                "Correct network_def or labels in plan.json."
            )
        return torch.as_tensor(output)

    def mirrored(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for flips in mirrorings:
            probabilities = torch.softmax(logits(batch.flip(flips)).float(), dim=1).flip(flips)
            total = probabilities if not flips else total + probabilities
        return total / len(mirrorings)

    return mirrored if tta else logits


def label(classes: npt.NDArray[Any], mapping: GridMapping, chunks: Iterable[Tensor], softmax: bool) -> None:
    """Write the most probable class into `classes`, as the rows come in; of equal ones the first, like argmax."""
    view = classes.transpose(mapping.order)
    for rows, planes in mapping.blocks(chunks, softmax):
        best = next(planes).clone()
        index_of_best = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
        for index, values in enumerate(planes, start=1):
            index_of_best.masked_fill_(values > best, index)
            torch.maximum(best, values, out=best)
        view[rows] = index_of_best.cpu().numpy().astype(classes.dtype)


def add(
    scores: npt.NDArray[np.float32],
    mapping: GridMapping,
    chunks: Iterable[Tensor],
    softmax: bool,
    members: int,
) -> None:
    """Add a share of the probabilities to `scores`, as the rows come in."""
    view = scores.transpose(0, *(axis + 1 for axis in mapping.order))
    for rows, planes in mapping.blocks(chunks, softmax):
        for index, values in enumerate(planes):
            view[index, rows] += values.cpu().numpy() / members


def add_inverse(
    scores: npt.NDArray[np.float32],
    model: Model,
    image: MetaTensor,
    chunks: Iterable[Tensor],
    softmax: bool,
    members: int,
) -> None:
    """Add by MONAI's own inverse, for preprocessing that is more than turning and scaling."""
    whole = torch.cat([chunk.to("cpu", copy=True) for chunk in chunks], dim=1)
    whole = torch.softmax(whole, dim=0) if softmax else whole
    back = MetaTensor(whole, meta=image.meta, applied_operations=image.applied_operations)
    scores += model.preprocessing.inverse({"image": back})["image"].numpy() / members


def keep_largest(classes: npt.NDArray[Any], which: Sequence[int]) -> None:
    """Turns all but the largest component (26 neighbours) of some classes into background, in place."""
    for index in which:
        boxes = ndimage.find_objects((classes == index).astype(np.uint8))
        if not boxes:
            continue
        part = classes[boxes[0]]
        components, count = ndimage.label(part == index, structure=np.ones((3, 3, 3)))
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            part[(components > 0) & (components != sizes.argmax())] = 0


CPU_VOXELS = 2**20  # per batch: more is not faster on a CPU and needs more memory


def batch_on(device: torch.device, batch_size: int, patch_size: Sequence[int]) -> int:
    """Windows per call: fewer on a CPU if they are large, but at least two (torch is slower with one)."""
    if device.type != "cpu":
        return batch_size
    return min(batch_size, max(2, CPU_VOXELS // math.prod(patch_size)))


def windows(
    image: Tensor,
    predict: Callable[[Tensor], Tensor],
    patch_size: Sequence[int],
    overlap: float,
    batch_size: int,
    device: torch.device,
    buffer_device: torch.device,
) -> Iterator[Tensor]:
    """Yield the blended output in chunks along the first axis.

    Args:
        image: (C, X, Y, Z).
        predict: (B, C, *patch_size) -> (B, K, *patch_size).
        patch_size: voxels per axis; the scan is padded with zeros to it.
        overlap: of neighbouring windows, 0 <= overlap < 1.
        batch_size: windows per call of ``predict``.
        device: where ``predict`` works.
        buffer_device: where windows are stitched.

    Yields:
        (K, rows, Y, Z) float32 on ``buffer_device``; the rows of all chunks add up to X. A chunk is a view of the
        buffer, valid until the next one is requested.
    """
    shape = tuple(image.shape[1:])
    pad = [max(p - n, 0) for p, n in zip(patch_size, shape, strict=True)]
    before = [n // 2 for n in pad]
    if any(pad):
        image = F.pad(image, [side for b, n in zip(before[::-1], pad[::-1], strict=True) for side in (b, n - b)])
    padded = tuple(image.shape[1:])
    steps = [p if p == n else max(int(p * (1 - overlap)), 1) for p, n in zip(patch_size, padded, strict=True)]
    places = dense_patch_slices(padded, tuple(patch_size), steps)
    weight = compute_importance_map(tuple(patch_size), mode="gaussian", sigma_scale=0.125, device=device).float()
    inside = [slice(b, b + n) for b, n in zip(before, shape, strict=True)]
    kept = slice(None), slice(None), inside[1], inside[2]

    first, total, count = 0, torch.empty(0), torch.empty(0)  # rows from `first` on are unfinished

    def finished(end: int) -> Tensor:
        """The rows of the scan itself in [first, end), blended."""
        rows = slice(max(inside[0].start - first, 0), max(min(inside[0].stop, end) - first, 0))
        return total[:, rows][kept].div_(count[:, rows][kept])

    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        patches = torch.stack([image[(slice(None), *place)] for place in batch]).to(device)
        outputs = predict(patches).float() * weight
        for place, output in zip(batch, outputs.to(buffer_device), strict=True):
            x = place[0].start
            if total.ndim == 1:
                total = torch.zeros((len(output), patch_size[0], *padded[1:]), device=buffer_device)
                count = torch.zeros((1, patch_size[0], *padded[1:]), device=buffer_device)
                weight_here = weight.to(buffer_device)
            if x > first:
                yield finished(x)
                _advance(total, x - first)
                _advance(count, x - first)
                first = x
            total[:, :, place[1], place[2]] += output
            count[0, :, place[1], place[2]] += weight_here
    yield finished(first + patch_size[0])


def _advance(buffer: Tensor, rows: int) -> None:
    """Shift the buffer by some rows, class by class, so that no copy of it is needed; new rows are 0."""
    for part in buffer:
        part[:-rows] = part[rows:].clone()
        part[-rows:] = 0
