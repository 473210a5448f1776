"""The network as a function of a batch of windows, with mirrored copies where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from medseg_supcon.errors import RunError
from medseg_supcon.inference._model import Model


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
                f"{model.name}: the network gives {output.shape[1]} channels and the plan names {classes} "
                "labels. network_def and labels of plan.json must agree."
            )
        return torch.as_tensor(output)

    def mirrored(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for flips in mirrorings:
            probabilities = torch.softmax(logits(batch.flip(flips)).float(), dim=1).flip(flips)
            total = probabilities if not flips else total + probabilities
        return total / len(mirrorings)

    return mirrored if tta else logits
