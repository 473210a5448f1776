"""Means over the positives P(i) of an anchor, in memory that grows with N.

For the dot product the mean of s_ip needs no pairs: it is the product of z_i with the sum of its
positives, and that is the sum over i's group less z_i itself, O(N D). What is not linear in z_p goes tile
by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medseg_supcon.losses._similarity import Similarity
from medseg_supcon.losses._tiles import STRIP, Criterion, Tile, sorted_order, tiles


class _GroupSums(torch.autograd.Function):
    """(G, D) sums of the rows (N, D) of each group (N,)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Tensor, n_groups: int) -> Tensor:
        ctx.save_for_backward(groups)
        if n_groups <= rows.shape[1]:
            # Few groups of many rows: a matrix product sums pairwise, and its memory is within N D.
            one_hot = groups[:, None] == torch.arange(n_groups, device=groups.device)
            return one_hot.to(rows.dtype).t() @ rows
        return rows.new_zeros(n_groups, rows.shape[1]).index_add_(0, groups, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (groups,) = ctx.saved_tensors
        return g[groups], None, None


def group_sums(rows: Tensor, groups: Tensor) -> Tensor:
    """(N, D): for each row (N, D) the sum over its group (N,)."""
    n_groups = int(groups.max()) + 1
    sums: Tensor = _GroupSums.apply(rows, groups, n_groups)  # type: ignore[no-untyped-call]
    # not sums[groups]: the backward pass of indexing adds up in no fixed order on several CPU threads
    return sums.index_select(0, groups)


def mean_dot(
    x: Tensor, rows: Tensor, own: Tensor, groups: Tensor, subgroups: Tensor | None, n: Tensor, unit: bool
) -> Tensor:
    """mean_p x_i . x_p over the rows of i's group, without i itself or without i's subgroup.

    Args:
        x: (A, D) anchors.
        rows: (R, D) every key, the anchors included.
        own: (A,) the row of each anchor.
        groups: (R,) group of each row, 0 .. G - 1.
        subgroups: (R,) subgroup of each row, 0 .. H - 1, each within one group and left out of the mean as
            a whole (the anchor's own view); None: only the anchor itself is left out.
        n: (A,) number of positives of each anchor, > 0.
        unit: no row is longer than 1, so that none drowns the sum of its group.

    Returns:
        (A,)
    """
    if subgroups is not None:
        # What the other views add up to, by subtraction: in float64, or a large view drowns a small one.
        n_subgroups = int(subgroups.max()) + 1
        group_of = groups.new_empty(n_subgroups).scatter_(0, subgroups, groups)
        sums: Tensor = _GroupSums.apply(rows, subgroups, n_subgroups)  # type: ignore[no-untyped-call]
        wide = sums.double()
        others = (group_sums(wide, group_of) - wide).to(rows.dtype).index_select(0, subgroups[own])
    elif unit:
        others = group_sums(rows, groups)[own] - x
    else:
        wide = rows.double()
        others = (group_sums(wide, groups) - wide)[own].to(rows.dtype)
    return (x * others).sum(1) / n


def mean_over_pairs(
    x: Tensor,
    y: Tensor,
    nu: Tensor | None,
    n: Tensor,
    criteria: list[Criterion],
    similarity: Similarity,
    tile: int,
) -> Tensor:
    """mean_p of -s_ip or, given nu, of -log(e^{s_ip} / (e^{s_ip} + e^{nu_i})), over the positives of i.

    Args:
        x: (A, D) anchors, each of which is also a key.
        y: (M, D) other keys.
        nu: (A,) log-sum-exp of the negatives of each anchor, -inf where it has none; or None.
        n: (A,) number of positives of each anchor, > 0.
        criteria: what makes a pair positive (i = j never is).
        similarity: s.
        tile: rows and columns of a tile.

    Returns:
        (A,), differentiable once, with respect to x, y and nu.
    """
    mine = sorted_order([c.anchors for c in criteria], len(x), x.device)
    others = sorted_order([c.others for c in criteria], len(y), y.device)
    criteria = [c.take(mine, others) for c in criteria]
    nu = nu[mine] if nu is not None else None
    tile = max(min(tile, max(len(x), len(y))), 1)
    mean: Tensor = _MeanOverPairs.apply(  # type: ignore[no-untyped-call]
        x[mine], y[others], nu, 1.0 / n[mine], criteria, similarity, tile
    )
    return torch.empty_like(mean).index_copy(0, mine, mean)


class _MeanOverPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        nu: Tensor | None,
        share: Tensor,
        criteria: list[Criterion],
        sim: Similarity,
        tile: int,
    ) -> Tensor:
        mean = torch.zeros_like(share)
        buffer = x.new_empty(tile * tile * STRIP)
        for t in tiles(criteria, len(x), len(y), tile):
            s = sim.scores(x[t.i], (x if t.among_anchors else y)[t.j], buffer)
            mean[t.i] += _counted(-s if nu is None else -F.logsigmoid(s - nu[t.i, None]), t).sum(1)
            if t.mirrored:
                mean[t.j] += _counted(-s if nu is None else -F.logsigmoid(s - nu[t.j]), t).sum(0)
        ctx.save_for_backward(x, y, nu, share)
        ctx.rest = criteria, sim, tile
        return mean.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, nu, share = ctx.saved_tensors
        criteria, sim, tile = ctx.rest
        g = g * share
        with torch.autocast(x.device.type, enabled=False):
            dx, dy = torch.zeros_like(x), torch.zeros_like(y) if ctx.needs_input_grad[1] else None
            dnu = torch.zeros_like(nu) if nu is not None else None
            buffer = x.new_empty(tile * tile * STRIP)
            for t in tiles(criteria, len(x), len(y), tile):
                s = sim.scores(x[t.i], (x if t.among_anchors else y)[t.j], buffer)
                # d/ds = -g_i where nothing is given, else -g_i sigmoid(nu_i - s), and dnu is its negative.
                row = g[t.i, None] * (torch.ones_like(s) if nu is None else torch.sigmoid(nu[t.i, None] - s))
                row = _counted(row, t)
                if dnu is not None:
                    dnu[t.i] += row.sum(1)
                if t.among_anchors:
                    column = g[t.j] * (torch.ones_like(s) if nu is None else torch.sigmoid(nu[t.j] - s))
                    column = _counted(column, t)
                    if dnu is not None and t.mirrored:
                        dnu[t.j] += column.sum(0)
                    row += column
                keys, dkeys = (x, dx) if t.among_anchors else (y, dy)
                target = dkeys[t.j] if dkeys is not None and not t.diagonal else None
                sim.pull(row.neg_(), x[t.i], keys[t.j], dx[t.i], target)
        return dx, dy, dnu, None, None, None, None


def _counted(values: Tensor, t: Tile) -> Tensor:
    """Zero, in place, where a pair does not count."""
    if t.mask is not None:
        values.masked_fill_(~t.mask, 0.0)
    if t.diagonal:
        values.fill_diagonal_(0.0)
    return values
