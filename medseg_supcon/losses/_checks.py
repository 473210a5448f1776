"""Checks of arguments; each error quotes the argument and its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_matrix(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.ndim != 2:
        raise ValueError(f"{name} must be (N, D), got shape {tuple(value.shape)}")


def check_ids(name: str, ids: Tensor | None, embeddings: Tensor, needed_for: str) -> Tensor:
    """`ids` as int64, one for each embedding."""
    if ids is None:
        raise ValueError(f"{name} must be given for {needed_for}, got None")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape != embeddings.shape[:1] or ids.device != embeddings.device:
        raise ValueError(
            f"{name} must be ({len(embeddings)},) on {embeddings.device}, like the embeddings, "
            f"got {tuple(ids.shape)} on {ids.device}"
        )
    return ids.long()


def class_vector(name: str, values: Tensor | Sequence[float] | None) -> tuple[float, ...] | None:
    """One number >= 0 for each class, in double precision whatever dtype it came in."""
    if values is None:
        return None
    vector = torch.as_tensor(values, dtype=torch.float64)
    if vector.ndim != 1 or vector.numel() == 0:
        raise ValueError(f"{name} must be (C,) with C >= 1, got shape {tuple(vector.shape)}")
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
        raise ValueError(f"{name} must be finite and >= 0, got {vector.tolist()}")
    return tuple(vector.tolist())


def check_in_range(name: str, classes: Tensor, *weights: tuple[float, ...] | None) -> None:
    """Every class has an entry in every vector of weights."""
    for vector in weights:
        if vector is None or len(classes) == 0:
            continue
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= len(vector):
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} must lie in 0 .. {len(vector) - 1} (there are {len(vector)} weights), got {wrong}"
            )
