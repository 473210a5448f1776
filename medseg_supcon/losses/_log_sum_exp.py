"""LSE_i = log sum_j k_j exp(s_ij) over the keys of anchor i, in memory that grows with N, not N^2.

The scores live one tile at a time. Forward adds up each row; backward computes the tile again and adds

    d/ds_ij = g_i k_j e^{s_ij} / Z_i   (+ g_j k_i e^{s_ij} / Z_j where j is an anchor, too),   Z = e^LSE,

to the gradient. The diagonal is left out inside its tile: subtracting e^{s_ii} afterwards would cancel.

Where no |s| exceeds `SAFE_BOUND` (unit vectors at temperature 0.02 and above), e^s needs no shift: float32
holds every term and every sum, and one exponential serves both sides of the diagonal. Else each row keeps
its own running maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medseg_supcon.losses._similarity import Similarity
from medseg_supcon.losses._tiles import STRIP, Criterion, Tile, sorted_order, tiles

# e^50 times 1e9 keys times 1e7 is below float32's 3e38, and e^-50 / 1e9 / 1e7 is above its 1e-38. The hundredth
# is for unit vectors at temperature 0.02 that rounding left a little too long.
SAFE_BOUND = 50.01


def log_sum_exp(
    x: Tensor,
    y: Tensor,
    criteria: list[Criterion],
    similarity: Similarity,
    log_k: tuple[Tensor, Tensor] | None,
    tile: int,
) -> Tensor:
    """log sum_j k_j exp(s_ij) over the rows j != i of x and y that meet the criteria with anchor i.

    Args:
        x: (A, D) anchors, each of which is also a key.
        y: (M, D) other keys.
        criteria: which pairs count; none: all.
        similarity: s.
        log_k: log k of the rows of x, (A,), and of y, (M,), float64, -inf for k = 0; None: 0.
        tile: rows and columns of a tile.

    Returns:
        (A,), -inf for an anchor without a key of positive weight. Differentiable once.
    """
    mine = sorted_order([c.anchors for c in criteria], len(x), x.device)
    others = sorted_order([c.others for c in criteria], len(y), y.device)
    if criteria:
        x, y, criteria = x[mine], y[others], [c.take(mine, others) for c in criteria]
        log_k = (log_k[0][mine], log_k[1][others]) if log_k is not None else None
    bound = similarity.bound(x.detach(), y.detach())
    if log_k is None:
        log_k = x.new_zeros(len(x)), y.new_zeros(len(y))
    elif len(x):
        finite = torch.cat(log_k)
        finite = finite[finite.isfinite()]
        bound += float(finite.abs().max()) if len(finite) else 0.0
    # Few rows need no larger buffer than they fill.
    tile = max(min(tile, max(len(x), len(y))), 1)
    lse: Tensor
    if bound <= SAFE_BOUND:
        kx, ky = (log.exp().to(x.dtype) for log in log_k)
        lse = _Unshifted.apply(x, y, kx, ky, criteria, similarity, tile)  # type: ignore[no-untyped-call]
    else:
        log_kx, log_ky = (log.to(x.dtype) for log in log_k)
        lse = _Shifted.apply(x, y, log_kx, log_ky, criteria, similarity, tile)  # type: ignore[no-untyped-call]
    return torch.empty_like(lse).index_copy(0, mine, lse) if criteria else lse


class _Unshifted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        kx: Tensor,
        ky: Tensor,
        criteria: list[Criterion],
        sim: Similarity,
        tile: int,
    ) -> Tensor:
        total = x.new_zeros(len(x))
        buffer = x.new_empty(tile * tile * STRIP)
        for t in tiles(criteria, len(x), len(y), tile):
            e = _exponentials(t, sim, x, y, buffer)
            total[t.i] += e @ (kx if t.among_anchors else ky)[t.j]
            if t.mirrored:
                total[t.j] += e.t() @ kx[t.i]
        ctx.save_for_backward(x, y, kx, ky, total)
        ctx.rest = criteria, sim, tile
        return total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, kx, ky, total = ctx.saved_tensors
        criteria, sim, tile = ctx.rest
        # a_i = g_i / Z_i; an anchor without keys has Z = 0 and takes no part.
        a = torch.where(total > 0, g / total, torch.zeros_like(total))
        with torch.autocast(x.device.type, enabled=False):
            dx, dy = torch.zeros_like(x), torch.zeros_like(y) if ctx.needs_input_grad[1] else None
            buffer, outer = x.new_empty(tile * tile * STRIP), x.new_empty(tile * tile * STRIP)
            for t in tiles(criteria, len(x), len(y), tile):
                e = _exponentials(t, sim, x, y, buffer)
                scale = outer[: e.numel()].view_as(e)
                torch.mul(a[t.i, None], (kx if t.among_anchors else ky)[t.j], out=scale)
                if t.among_anchors:
                    scale.addcmul_(kx[t.i, None], a[t.j])
                e *= scale
                keys, dkeys = (x, dx) if t.among_anchors else (y, dy)
                target = dkeys[t.j] if dkeys is not None and not t.diagonal else None
                sim.pull(e, x[t.i], keys[t.j], dx[t.i], target)
        return dx, dy, None, None, None, None, None


def _exponentials(t: Tile, sim: Similarity, x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    e = sim.scores(x[t.i], (x if t.among_anchors else y)[t.j], buffer).exp_()
    if t.mask is not None:
        e *= t.mask
    if t.diagonal:
        e.fill_diagonal_(0.0)
    return e


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        log_kx: Tensor,
        log_ky: Tensor,
        criteria: list[Criterion],
        sim: Similarity,
        tile: int,
    ) -> Tensor:
        lse = x.new_full((len(x),), -torch.inf)
        buffer = x.new_empty(tile * tile * STRIP)
        for t in tiles(criteria, len(x), len(y), tile):
            s = _scores(t, sim, x, y, buffer)
            log_k = (log_kx if t.among_anchors else log_ky)[t.j]
            lse[t.i] = torch.logaddexp(lse[t.i], torch.logsumexp(s + log_k, 1))
            if t.mirrored:
                lse[t.j] = torch.logaddexp(lse[t.j], torch.logsumexp(s + log_kx[t.i, None], 0))
        ctx.save_for_backward(x, y, log_kx, log_ky, lse)
        ctx.rest = criteria, sim, tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, log_kx, log_ky, lse = ctx.saved_tensors
        criteria, sim, tile = ctx.rest
        # An anchor without keys takes no part: e^{s - inf} = 0.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        with torch.autocast(x.device.type, enabled=False):
            dx, dy = torch.zeros_like(x), torch.zeros_like(y) if ctx.needs_input_grad[1] else None
            buffer = x.new_empty(tile * tile * STRIP)
            for t in tiles(criteria, len(x), len(y), tile):
                s = _scores(t, sim, x, y, buffer)
                log_k = (log_kx if t.among_anchors else log_ky)[t.j]
                p = (s + log_k).sub_(lse[t.i, None]).exp_().mul_(g[t.i, None])
                if t.among_anchors:
                    p += s.add_(log_kx[t.i, None]).sub_(lse[t.j]).exp_().mul_(g[t.j])
                keys, dkeys = (x, dx) if t.among_anchors else (y, dy)
                target = dkeys[t.j] if dkeys is not None and not t.diagonal else None
                sim.pull(p, x[t.i], keys[t.j], dx[t.i], target)
        return dx, dy, None, None, None, None, None


def _scores(t: Tile, sim: Similarity, x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    s = sim.scores(x[t.i], (x if t.among_anchors else y)[t.j], buffer)
    if t.mask is not None:
        s.masked_fill_(~t.mask, -torch.inf)
    if t.diagonal:
        s.fill_diagonal_(-torch.inf)
    return s
