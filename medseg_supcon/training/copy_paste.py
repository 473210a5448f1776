"""Boxes exchanged between labelled and unlabelled patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.training.loss import Target


class CopyPaste:
    """MONAI ``prepare_batch``: the given one, and then a box exchanged between patches of two kinds.

    Every patch of an unlabelled scan is paired with a patch of a labelled one, of the same view. Both give the
    other what lies in one box, drawn anew for every pair: image, label and pseudo-label alike. So every patch
    holds both kinds, and a network cannot tell them apart by what else is in the patch. A voxel that was moved
    has no partner in the other view. Where there are fewer labelled patches, one gives and takes several times.

    Args:
        prepare: what makes image and target, for instance ``PseudoLabels``.
        size: edge of the box as a share of the patch's, 0 to 1; 0 exchanges nothing.
        probability: of the exchange, for each pair, 0 to 1.

    Returns:
        (on call) image and target of ``prepare``, of the same shapes.

    Raises:
        ConfigError: ``size`` or ``probability`` is out of range.

    Source:
        Bai et al., CVPR 2023, Bidirectional copy-paste for semi-supervised medical image segmentation (size 2/3).
    """

    def __init__(
        self, prepare: Callable[..., tuple[Tensor, Target]], size: float = 2 / 3, probability: float = 1.0
    ) -> None:
        for name, value in (("copy_paste_size", size), ("copy_paste", probability)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must lie in 0 .. 1, got {value}.")
        self.prepare, self.size, self.probability = prepare, size, probability

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Target]:
        image, target = self.prepare(batchdata, device, non_blocking, **kwargs)
        has_label = (target["label"] != IGNORE_INDEX).flatten(1).any(1).view(-1, 2).any(1)
        known, others = has_label.nonzero()[:, 0].tolist(), (~has_label).nonzero()[:, 0].tolist()
        if not known:
            return image, target
        originals = (image, target["label"], target["pseudo_label"])
        image, target = image.clone(), {name: value.clone() for name, value in target.items()}
        volumes = (image, target["label"], target["pseudo_label"])
        for number, other in enumerate(others):
            for view in (0, 1):  # rows 2s and 2s + 1 are scan s
                if float(torch.rand(())) < self.probability:
                    pair = (2 * known[number % len(known)] + view, 2 * other + view)
                    box = (slice(None), *self._box(image.shape[2:]))
                    for volume, original in zip(volumes, originals, strict=True):
                        for row, source in (pair, pair[::-1]):
                            volume[row][box] = original[source][box]
                    for row in pair:
                        target["pair_ids"][row][box] = -1
        return image, target

    def _box(self, shape: Sequence[int]) -> list[slice]:
        sizes = [round(self.size * length) for length in shape]
        starts = [
            int(torch.randint(length - size + 1, ())) for length, size in zip(shape, sizes, strict=True)
        ]
        return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
