"""Similarities s_ij between two tiles of embeddings, and their gradients.

`cosine` and `dot` share one matrix product, on unit vectors or on the embeddings as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class UnitVectors(torch.autograd.Function):
    """z / |z| in `compute_dtype`, for any norm: rows are scaled by their largest entry before they are
    squared, a zero vector stays zero with gradient zero, and a gradient too large for z's dtype saturates.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        wide = z.to(compute_dtype(z.dtype))
        largest = wide.abs().amax(1, keepdim=True) if z.shape[1] else wide.new_zeros(len(z), 1)
        scaled = torch.where(largest == 0, torch.zeros_like(wide), wide / largest)
        norm: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min_(
            torch.finfo(wide.dtype).tiny
        )
        unit = scaled / norm
        ctx.save_for_backward(unit, norm, largest)
        ctx.dtype = z.dtype
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, norm, largest = ctx.saved_tensors
        tangent = (grad - unit * (unit * grad).sum(1, keepdim=True)) / norm
        tangent = torch.where(largest == 0, torch.zeros_like(tangent), tangent / largest)
        return saturate(tangent, ctx.dtype)


def dtype_for(*embeddings: Tensor) -> torch.dtype:
    """`compute_dtype`, but float64 where a row is so long or short that float32 cannot square its length."""
    dtype = compute_dtype(embeddings[0].dtype)
    if dtype == torch.float32:
        for z in embeddings:
            if z.numel():
                largest = z.detach().abs().amax(1)
                if bool(((largest > 1e15) | ((largest > 0) & (largest < 1e-15))).any()):
                    return torch.float64
    return dtype


class Widen(torch.autograd.Function):
    """z in `dtype`; a gradient too large for z's own dtype saturates instead of overflowing."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = z.dtype
        return z.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return saturate(grad, ctx.dtype), None


def saturate(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` in `dtype`, clamped to its largest finite value."""
    limit = min(torch.finfo(dtype).max, torch.finfo(grad.dtype).max)
    return grad.clamp(-limit, limit).to(dtype)


@dataclass(frozen=True)
class Similarity:
    """s_ij = sim(x_i, y_j) / temperature.

    Attributes:
        euclidean: minus the distance; else the dot product.
        temperature: tau > 0.
    """

    euclidean: bool
    temperature: float

    def scores(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """s of every row of x (I, D) with every row of y (J, D), as (I, J), in the memory of `out`."""
        s = out[: len(x) * len(y)].view(len(x), len(y))
        if self.euclidean:
            # Through |x|^2 + |y|^2 - 2xy the distance of near neighbours would cancel.
            exact = "donot_use_mm_for_euclid_dist"
            return torch.mul(torch.cdist(x, y, compute_mode=exact), -1.0 / self.temperature, out=s)
        return torch.addmm(s, x, y.t(), beta=0.0, alpha=1.0 / self.temperature, out=s)

    def pull(self, grad: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        """Add the gradient of sum_ij grad_ij s_ij to dx and dy, in place, where they are given."""
        if self.euclidean:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
                distance = torch.cdist(*leaves, compute_mode="donot_use_mm_for_euclid_dist")
            # cdist's gradient at distance 0 is 0: a subgradient, and finite.
            gx, gy = torch.autograd.grad(distance, leaves, grad * (-1.0 / self.temperature))
            if dx is not None:
                dx += gx
            if dy is not None:
                dy += gy
            return
        if dx is not None:
            dx.addmm_(grad, y, alpha=1.0 / self.temperature)
        if dy is not None:
            dy.addmm_(grad.t(), x, alpha=1.0 / self.temperature)

    def bound(self, x: Tensor, y: Tensor) -> float:
        """A number that no |s| between a row of x and a row of x or y exceeds (inf or NaN: none known)."""
        if len(x) == 0:
            return 0.0
        longest_x = float(x.norm(dim=1).max())
        longest = max(longest_x, float(y.norm(dim=1).max())) if len(y) else longest_x
        return (longest_x + longest if self.euclidean else longest_x * longest) / self.temperature
