"""The rows that the loss compares, as unit vectors if it wants them, and which of their pairs count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Criterion(NamedTuple):
    """Pairs of rows whose ids (R,) are equal (or, with `equal=False`, differ)."""

    ids: Tensor
    equal: bool


class Pairs(NamedTuple):
    """R keys in the order: A anchors, the batch's other keys, the bank's. Ids are 0, 1, ..."""

    z: Tensor  # (R, D)
    stops: tuple[int, int, int]  # where each kind of key ends
    classes: Tensor  # (R,)
    views: Tensor | None  # (R,)
    groups: Tensor  # (R,) equal: positive pair
    subgroups: Tensor | None  # (R,) equal: the same group and view
    n_positives: Tensor  # (A,) |P(i)|, > 0
    weights: Tensor  # (A,) w, > 0

    @property
    def positive(self) -> list[Criterion]:
        return [Criterion(self.groups, True), *self.denominator("all")]

    def denominator(self, keys: str) -> list[Criterion]:
        """Which keys an anchor is contrasted with: `all`, or those of the `same_class` or `other_class`."""
        criteria = [] if keys == "all" else [Criterion(self.classes, keys == "same_class")]
        return criteria if self.views is None else [*criteria, Criterion(self.views, False)]


def compact(ids: Tensor) -> Tensor:
    """Ids as 0, 1, ..."""
    inverse: Tensor = torch.unique(ids, return_inverse=True)[1]
    return inverse


def prepare(rows: Tensor, stored: Tensor, unit_length: bool) -> Tensor:
    """The batch's rows and a bank's, in float32 or float64, as unit vectors if asked for; zero vectors stay zero."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if not unit_length and (_beyond_float32(rows.detach()) or _beyond_float32(stored)):
        dtype = torch.float64
    z: Tensor = _Prepared.apply(rows, stored, rows[:0].sum(), unit_length, dtype)  # type: ignore[no-untyped-call]
    return z


def _beyond_float32(z: Tensor) -> bool:
    """Is some row so long or short that float32 cannot square its length?"""
    largest = z.abs().amax(1) if z.numel() else z.new_zeros(0)
    return bool(((largest > 1e15) | ((largest > 0) & (largest < 1e-15))).any())


class _Prepared(torch.autograd.Function):
    """A gradient too large for the rows' own dtype is clamped to its largest number.

    Every gradient of the loss passes here, so here a second derivative is refused; `path`, a 0 made from the rows,
    leads it here.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stored: Tensor, path: Tensor, unit_length: bool, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.n = rows.dtype, len(rows)
        z = torch.cat((rows.to(dtype), stored.to(dtype))) if len(stored) else rows.to(dtype)
        if not unit_length:
            ctx.save_for_backward(path)
            return z
        # by the largest entry first, so that no square overflows or vanishes
        largest = z.abs().amax(1, keepdim=True) if z.shape[1] else z.new_zeros(len(z), 1)
        scaled = torch.where(largest == 0, 0.0, z / largest)
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny)
        unit: Tensor = scaled.div_(norm)
        ctx.save_for_backward(path, unit, norm, largest)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        path, *saved = ctx.saved_tensors
        with torch.no_grad():
            grad = grad[: ctx.n]
            if saved:
                unit, norm, largest = (t[: ctx.n] for t in saved)
                grad = (grad - unit * (unit * grad).sum(1, keepdim=True)).div_(norm)
                grad = torch.where(largest == 0, 0.0, grad.div_(largest))
            limit = min(torch.finfo(ctx.dtype).max, torch.finfo(grad.dtype).max)
            grad = grad.clamp(-limit, limit).to(ctx.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad = _OnceOnly.apply(grad, path)  # type: ignore[no-untyped-call]
        return grad, None, None, None, None


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, path: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("SupConLoss can be differentiated once: its second derivative is not implemented")
