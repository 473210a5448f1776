"""Checks of arguments; each error quotes the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

Ids = Tensor | None


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
    """A tensor of integers, or of floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if floating else integers):
        raise TypeError(f"{name} must be {'floating point' if floating else 'integers'}, got {value.dtype}")


def check_rows(name: str, rows: Tensor, dim: int | None = None) -> None:
    """(N, D) floating-point numbers, D = `dim` if given."""
    check_tensor(name, rows, floating=True)
    if rows.ndim != 2 or rows.shape[1] != (dim or max(rows.shape[1], 1)):
        raise ValueError(f"{name} must be (N, {dim or 'D'}), got shape {tuple(rows.shape)}")


def check_ids(name: str, ids: Tensor | None, shape: Sequence[int], device: torch.device, needed_for: str) -> Tensor:
    """`ids` of a shape as int64 on a device."""
    if ids is None:
        raise ValueError(f"{name} must be given for {needed_for}, got None")
    check_tensor(name, ids)
    if ids.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(ids.shape)}")
    return ids.to(device, torch.long)


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
