"""What one pass over a scan shows about its mask: probabilities, features of voxels, intensities and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor, nn

from medseg_supcon.datasets import THRESHOLD, Regions

Floats = npt.NDArray[np.float64]
PER_WINDOW, PER_CLASS = 128, 512  # voxels of a class whose features are kept
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
QUANTILE_VOXELS = 100_000
BLOCK_VOXELS = 2**22  # of all classes at a time
COMPONENT_VOXELS = 2**20  # a larger part's components are those of its blocks


@dataclass(frozen=True)
class Evidence:
    """Of one scan and one model; K classes, the background first. NaN where a class has no voxel.

    With regions that may overlap, the classes are the regions, and the first is what is in none of them.

    Attributes:
        volume: (K,) ml of the final mask.
        probability: (K, 4) mean probability of the predicted voxels, expected Dice, expected share of wrong voxels
            (sum of p (1 - p) per predicted voxel), and log of the final mask's volume over that of the pass.
        shape: (K, 4) share of the largest component, log10 of the number of components, surface / volume^(2/3),
            and the area at the border of the scan / volume^(2/3).
        intensity: (K, 2 C) mean and standard deviation of the C preprocessed channels inside the mask.
        quantiles: (7 C,) of the preprocessed channels.
        size: (3,) mm of the scan along the axes of the model's grid.
        features: per class (n, F) what the network's classifier reads, for some voxels of the mask.
    """

    volume: Floats
    probability: Floats
    shape: Floats
    intensity: Floats
    quantiles: Floats
    size: Floats
    features: list[npt.NDArray[np.float32]]


class PassEvidence:
    """Gathers evidence while `windows` segments a scan.

    Args:
        classifier: the network's last layer, which reads the features; None: no features.
        image: (C, X, Y, Z), preprocessed.
        classes: K.
        softmax: the network's outputs are logits.
        regions: the outputs are of K - 1 regions that may overlap.
    """

    def __init__(
        self, classifier: nn.Module | None, image: Tensor, classes: int, softmax: bool, regions: Regions | None = None
    ) -> None:
        self.classifier, self.image, self.classes, self.softmax = classifier, image, classes, softmax
        self.regions = regions
        self.features: list[list[Tensor]] = [[] for _ in range(classes)]
        self.sums = torch.zeros(4, classes, dtype=torch.float64)  # voxels, probability in them, p and p^2 everywhere
        self.moments = torch.zeros(2 * len(image), classes, dtype=torch.float64)

    def windows(self, outputs: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same function of a batch of windows, (B, C, *patch) -> (B, K, *patch), watched."""

        def watched(batch: Tensor) -> Tensor:
            caught: list[Tensor] = []
            if self.classifier is None:
                return outputs(batch)
            hook = self.classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
            try:
                result = outputs(batch)
            finally:
                hook.remove()
            self._keep(result, caught[0])  # of mirrored passes, the first is not mirrored
            return result

        return watched

    def _keep(self, outputs: Tensor, features: Tensor) -> None:
        features = features.flatten(2)
        if self.regions is not None:
            inside = _with_rest(outputs.movedim(1, 0) > (0.0 if self.softmax else THRESHOLD))
            places = {c: part.flatten().nonzero()[:, 0] for c, part in enumerate(inside) if part.any()}
        else:
            index = outputs.max(dim=1).indices.flatten()  # several times as fast as argmax on a CPU
            present = index.bincount(minlength=self.classes).nonzero()[:, 0].tolist()
            places = {c: (index == c).nonzero()[:, 0] for c in present}
        for c, where in places.items():
            where = _evenly(where, PER_WINDOW * len(outputs))
            window, voxel = where // features.shape[2], where % features.shape[2]
            self.features[c].append(features[window, :, voxel].float().cpu())

    def chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The probabilities of the parts (K, rows, Y, Z) that make up the scan; of logits, in place."""
        start = 0
        for chunk in chunks:
            for part in torch.split(chunk, max(1, BLOCK_VOXELS // chunk[:, 0].numel()), dim=1):
                image = self.image[:, start : start + part.shape[1]]
                start += part.shape[1]
                if self.regions is not None:
                    self._add_regions(part.copy_(part.sigmoid()) if self.softmax else part, image)
                    continue
                if self.softmax:
                    part.copy_(part.softmax(dim=0))
                best, index = part.max(dim=0)
                values = [torch.ones_like(best), best, *image, *image.square()]
                counted = [index.flatten().bincount(v.flatten().double(), self.classes).cpu() for v in values]
                self.sums[:2] += torch.stack(counted[:2])
                self.moments += torch.stack(counted[2:])
                self.sums[2] += part.sum(dim=(1, 2, 3)).double().cpu()
                self.sums[3] += part.square().sum(dim=(1, 2, 3)).double().cpu()
            yield chunk

    def _add_regions(self, part: Tensor, image: Tensor) -> None:
        """The sums of a part's probabilities (R, rows, Y, Z); where none is high, p of the rest is 1 - the highest."""
        inside, p = _with_rest(part > THRESHOLD), torch.cat([1 - part.amax(dim=0, keepdim=True), part])
        for c, (where, q) in enumerate(zip(inside, p, strict=True)):
            pixels = image[:, where].double()
            self.sums[:, c] += torch.stack([where.sum(), q[where].sum(), q.sum(), q.square().sum()]).double().cpu()
            self.moments[:, c] += torch.cat([pixels.sum(dim=1), pixels.square().sum(dim=1)]).cpu()

    def of(self, mask: npt.NDArray[Any], spacing: Sequence[float] | Floats, model_spacing: Sequence[float]) -> Evidence:
        """The evidence, once the mask is final.

        Args:
            mask: (X, Y, Z) class indices on the scan's own grid, with voxels of ``spacing`` mm.
            model_spacing: mm per axis of the model's grid.
        """
        voxels, sure, total, squares = self.sums.numpy()
        counts = np.bincount(mask.ravel(), minlength=self.classes)
        if self.regions is not None:
            inside = self.regions.masks(mask)
            counts = np.array([np.count_nonzero(part) for part in (~inside.any(axis=0), *inside)])
        volume = counts * np.prod(spacing) / 1000
        with np.errstate(divide="ignore", invalid="ignore"):
            final = np.log(volume / (voxels * np.prod(model_spacing) / 1000))
            probability = np.stack(
                [sure / voxels, 2 * sure / (voxels + total), (total - squares) / voxels, final], axis=1
            )
            first, second = (self.moments / self.sums[0]).chunk(2)
            intensity = torch.cat([first, (second - first**2).clamp(min=0).sqrt()]).T.numpy()
        probability[~np.isfinite(probability)] = np.nan
        flat = self.image.flatten(1)
        some = flat[:, :: max(1, flat.shape[1] // QUANTILE_VOXELS)].float().cpu().numpy()
        features = []
        for parts in self.features:
            rows = torch.cat(parts) if parts else torch.zeros(0, 0)
            features.append(rows[_evenly(torch.arange(len(rows)), PER_CLASS)].numpy())
        return Evidence(
            volume,
            probability,
            mask_shape(mask, self.classes, spacing, self.regions),
            intensity,
            np.quantile(some, QUANTILES, axis=1).T.ravel(),
            np.array(self.image.shape[1:]) * np.asarray(model_spacing),
            features,
        )


def _with_rest(inside: Tensor) -> Tensor:
    """Masks (R, ...) with a first one of what is in none of them."""
    return torch.cat([~inside.any(dim=0, keepdim=True), inside])


def _evenly(indices: Tensor, most: int) -> Tensor:
    return indices[:: max(1, -(-len(indices) // most))]


def mask_shape(
    mask: npt.NDArray[Any], classes: int, spacing: Sequence[float] | Floats, regions: Regions | None = None
) -> Floats:
    """(K, 4), see `Evidence`; of the background NaN.

    Args:
        mask: (X, Y, Z) class indices.
        classes: K.
        spacing: mm per axis.
    """
    if regions is not None:
        parts = [mask_shape(part.astype(np.uint8), 2, spacing)[1] for part in regions.masks(mask)]
        return np.stack([np.full(4, np.nan), *parts])
    rows = np.full((classes, 4), np.nan)
    surface, border = _faces(mask, classes, spacing)
    for c, box in enumerate(ndimage.find_objects(mask, max_label=classes - 1), start=1):
        if box is None:
            continue
        count, sizes = _components(mask[box] == c)
        scale = (sizes.sum() * np.prod(spacing)) ** (2 / 3)
        rows[c] = sizes.max() / sizes.sum(), np.log10(count), surface[c] / scale, border[c] / scale
    return rows


def _faces(mask: npt.NDArray[Any], classes: int, spacing: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    """(K,) mm2 of each class's surface, and of the part of it that is the border of the scan."""

    def counted(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return np.bincount(values.ravel(), minlength=classes)[:classes]

    inside, border = np.zeros((2, classes))
    for axis, area in enumerate(np.prod(spacing) / np.asarray(spacing)):
        along = np.moveaxis(mask, axis, 0)
        change = along[1:] != along[:-1]
        inside += area * (counted(along[1:][change]) + counted(along[:-1][change]))
        border += area * (counted(along[0]) + counted(along[-1]))
    return inside + border, border


def _components(part: npt.NDArray[np.bool_]) -> tuple[int, npt.NDArray[Any]]:
    """The number of connected components, and the voxels of each. In a large part, gaps of less than a block of
    voxels do not count: blocks are connected.
    """
    edge = max(1, round((part.size / COMPONENT_VOXELS) ** (1 / 3)))
    part = np.pad(part, [(0, -n % edge) for n in part.shape])
    counts = np.zeros([n // edge for n in part.shape], dtype=np.uint16)
    for i, j, k in np.ndindex(edge, edge, edge):
        counts += part[i::edge, j::edge, k::edge]
    components, count = ndimage.label(counts, structure=np.ones((3, 3, 3)))
    return count, np.bincount(components.ravel(), weights=counts.ravel())[1:]


def dice_per_class(
    one: npt.NDArray[Any], other: npt.NDArray[Any], classes: int, regions: Regions | None = None
) -> Floats:
    """(K - 1,) Dice per foreground class of two arrays of class indices, (R,) with regions; NaN: in neither.

    Indices from K on are no class.
    """
    if regions is None:
        both, a, b = (np.bincount(m.ravel(), minlength=classes)[1:classes] for m in (one[one == other], one, other))
    else:
        masks = [regions.masks(m).reshape(len(regions.names), -1) for m in (one, other)]
        both, a, b = (m.sum(axis=1) for m in (masks[0] & masks[1], *masks))
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * both / (a + b))
