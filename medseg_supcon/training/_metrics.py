"""What the validation's metrics look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def label_pairs(output: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Predicted and reference class indices of an evaluator's output, (1, X, Y, Z) each.

    ``ignite`` output transform: the logits' largest class against the label map, ignored voxels (-1) kept
    as they are, for the metric to leave out.
    """
    predictions = [torch.as_tensor(o["pred"]).argmax(0, keepdim=True) for o in output]
    return predictions, [torch.as_tensor(o["label"]) for o in output]
