"""What the sliding window yields, gathered in the scan's own grid: a mask, or probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor

from medseg_supcon.inference._model import Model
from medseg_supcon.inference._resample import Way


def label(classes: npt.NDArray[Any], way: Way, chunks: Iterable[Tensor], softmax: bool) -> None:
    """The most probable class, while the rows come in; of equal ones the first, as argmax."""
    view = classes.transpose(way.order)
    for rows, planes in way.blocks(chunks, softmax):
        best = next(planes).clone()
        index_of_best = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
        for index, values in enumerate(planes, start=1):
            index_of_best.masked_fill_(values > best, index)
            torch.maximum(best, values, out=best)
        view[rows] = index_of_best.cpu().numpy().astype(classes.dtype)


def add(
    scores: npt.NDArray[np.float32], way: Way, chunks: Iterable[Tensor], softmax: bool, members: int
) -> None:
    view = scores.transpose(0, *(axis + 1 for axis in way.order))
    for rows, planes in way.blocks(chunks, softmax):
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
    """The way back by MONAI's own inverse, for preprocessing that is more than turning and scaling."""
    whole = torch.cat([chunk.to("cpu", copy=True) for chunk in chunks], dim=1)
    whole = torch.softmax(whole, dim=0) if softmax else whole
    back = MetaTensor(whole, meta=image.meta, applied_operations=image.applied_operations)
    scores += model.preprocessing.inverse({"image": back})["image"].numpy() / members
