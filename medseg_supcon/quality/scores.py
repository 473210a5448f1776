"""What one pass over a scan says about its mask: sums over probabilities, features of its voxels, its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
PER_WINDOW = 128  # voxels whose features are taken, per class and window
PER_CLASS = 512  # of them for a scan
NEIGHBOURS = 5
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


class PassScores:
    """Gathers, in the pass that makes the mask, what says how good it is.

    Args:
        classifier: the network's last layer; its input are the features.
        classes: K.
        heads: further spaces of the features, such as the projection head's: name -> module (N, F) -> (N, D).
    """

    def __init__(self, classifier: nn.Module, classes: int) -> None:
        self.classes = classes
        self.features: list[list[Tensor]] = [[] for _ in range(classes)]
        self.voxels, self.sure, self.mass, self.squares = (torch.zeros(classes, dtype=torch.float64) for _ in range(4))
        self.intensity: list[Tensor] = []
        self.rows = 0
        self._caught: Tensor | None = None
        self._hook = classifier.register_forward_pre_hook(self._catch)

    def close(self) -> None:
        self._hook.remove()

    def _catch(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._caught = inputs[0]

    def window(self, outputs: Tensor) -> None:
        """Take the features of some voxels of a batch of windows; outputs: (B, K, *patch)."""
        if self._caught is None:
            return
        features, self._caught = self._caught, None
        index = outputs.argmax(dim=1).flatten()
        flat = features.movedim(1, -1).reshape(len(index), -1)
        for c in torch.unique(index).tolist():
            where = (index == c).nonzero()[:, 0]
            self.features[c].append(flat[_evenly(len(where), PER_WINDOW * len(outputs), where)].float().cpu())

    def chunk(self, probabilities: Tensor, image: Tensor) -> None:
        """Add a part of the scan, (K, rows, Y, Z); the parts make up the scan. image: (C, X, Y, Z), preprocessed."""
        best, index = probabilities.max(dim=0)
        flat = index.flatten()
        self.voxels += torch.bincount(flat, minlength=self.classes).cpu()
        self.sure += torch.bincount(flat, weights=best.flatten().double(), minlength=self.classes).cpu()
        here = image[:, self.rows : self.rows + probabilities.shape[1]]
        self.rows += probabilities.shape[1]
        self.intensity.append(
            torch.stack(
                [
                    torch.bincount(flat, weights=(x**power).flatten().double(), minlength=self.classes)
                    for x in here
                    for power in (1, 2)
                ]
            ).cpu()
        )
        self.mass += probabilities.sum(dim=(1, 2, 3)).double().cpu()
        self.squares += probabilities.square().sum(dim=(1, 2, 3)).double().cpu()

    def embeddings(self) -> list[Tensor]:
        """Per class (n, F) features of up to PER_CLASS voxels of the mask."""
        result = []
        for parts in self.features:
            rows = torch.cat(parts) if parts else torch.zeros(0, 0)
            result.append(rows[_evenly(len(rows), PER_CLASS, torch.arange(len(rows)))])
        return result


def _evenly(count: int, most: int, indices: Tensor) -> Tensor:
    return indices[:: max(1, -(-count // most))]


def mask_shape(classes: npt.NDArray[Any], count: int, spacing: Sequence[float]) -> Array:
    """Per foreground class: share of the largest component, log10(1 + components), compactness, share at the border."""
    rows = np.full((count - 1, 4), np.nan)
    boxes = ndimage.find_objects(classes.astype(np.int32), max_label=count - 1)
    for c, box in enumerate(boxes, start=1):
        if box is None:
            continue
        part = np.pad(classes[box] == c, 1)
        components, number = ndimage.label(part, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        total = sizes.sum()
        faces = sum(
            np.count_nonzero(np.diff(part.astype(np.int8), axis=a)) * np.prod(np.delete(spacing, a)) for a in range(3)
        )
        volume = total * np.prod(spacing)
        ends = [(s.start == 0, s.stop == n, a) for a, (s, n) in enumerate(zip(box, classes.shape, strict=True))]
        border = sum(
            np.count_nonzero(np.take(part, 1 if low else part.shape[a] - 2, axis=a))
            for first, last, a in ends
            for low, there in ((True, first), (False, last))
            if there
        )
        rows[c - 1] = sizes.max() / total, np.log10(number), faces / volume ** (2 / 3), border / volume ** (2 / 3) * np.prod(spacing) ** (2 / 3)
    return rows


def distances(embeddings: Tensor, reference: Tensor) -> Array:
    """Mean and 90th percentile of the distance to the k-th nearest reference vector, unit length."""
    if not len(embeddings) or not len(reference):
        return np.full(2, np.nan)
    unit, known = (nn.functional.normalize(x.float(), dim=1) for x in (embeddings, reference))
    k = min(NEIGHBOURS, len(known))
    near = torch.cdist(unit, known).topk(k, largest=False).values[:, -1].double()
    return np.array([near.mean(), near.quantile(0.9)])
