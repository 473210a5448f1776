"""Checks of arguments; each error quotes the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(name: str, value: float, low: float | None = None, integer: bool = False) -> None:
    """A finite number (with `integer`, a whole one, not 2.0), at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_tensor(name: str, value: Tensor, floating: bool = False) -> None:
    """A tensor of integers, or with `floating` a matrix of floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if floating else integers):
        raise TypeError(f"{name} must be {'floating point' if floating else 'integers'}, got {value.dtype}")
    if floating and (value.ndim != 2 or value.shape[1] == 0):
        raise ValueError(f"{name} must be (N, D), got shape {tuple(value.shape)}")


def check_ids(name: str, ids: Tensor | None, embeddings: Tensor, needed_for: str) -> Tensor:
    """`ids` as int64, one for each embedding."""
    if ids is None:
        raise ValueError(f"{name} must be given for {needed_for}, got None")
    check_tensor(name, ids)
    expected, got = (f"{tuple(t.shape[:n])} on {t.device}" for t, n in ((embeddings, 1), (ids, ids.ndim)))
    if got != expected:
        raise ValueError(f"{name} must be {expected}, like the embeddings, got {got}")
    return ids.long()


def number_vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """(C,) finite numbers >= 0, C >= 1, as float64 on the CPU."""
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be real numbers, one for each class, got {values!r}") from None
    if vector.ndim != 1 or not len(vector) or not bool((vector.isfinite() & (vector >= 0)).all()):
        raise ValueError(f"{name} must be finite numbers >= 0, one for each class, got {vector.tolist()}")
    return vector
