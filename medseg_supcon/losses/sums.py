"""The two sums over pairs that the loss needs, one tile of scores at a time: memory grows with N, not N^2.

Forward adds up each anchor's row; backward computes the tile again and adds its gradient to those of the embeddings
(as in Rabe and Staats 2021, and FlashAttention). A tile of two anchor blocks serves (i, j) and (j, i). Where rows are
sorted by the ids that decide which pairs count, nearly every tile counts as a whole or not at all: the first kind
needs no mask, the second is skipped. The diagonal is left out inside its tile: subtracting e^{s_ii} afterwards would
cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medseg_supcon.losses.pairs import Criterion, Pairs

CPU_TILE, GPU_TILE = 384, 2048  # rows of a tile: on a CPU it fits the caches; a GPU wants work for all its cores
# Blocks that one tile may span. Wide tiles keep the number of calls small; narrow ones waste little on the diagonal,
# where a tile cannot stand for its mirror image.
STRIP = 4
NONE, SOME, ALL = 0, 1, 2  # pairs of two blocks that count
# Where |s| is at most this (unit vectors at temperature 0.02 and above), e^s needs no shift: e^50 times 1e9 keys
# times 1e7 is below float32's 3e38. The hundredth is for unit vectors that rounding left a little too long.
SAFE_BOUND = 50.01
EXACT = "donot_use_mm_for_euclid_dist"  # through |x|^2 + |y|^2 - 2xy near neighbours would cancel


class Tile(NamedTuple):
    """Anchors `i` against rows `j`."""

    i: slice
    j: slice
    mirrored: bool  # it also stands for the pairs (j, i)
    keys_too: bool  # rows j get a gradient of their own: on the diagonal they are rows i, and a bank needs none
    excluded: Tensor | None  # (I, J) True where a pair does not count; None: all count, but for i = j

    def fill_excluded(self, values: Tensor, value: float) -> Tensor:
        """`values` (I, J) with `value`, in place, where a pair does not count; i = j never does."""
        if self.excluded is not None:
            values.masked_fill_(self.excluded, value)
        if self.i == self.j:
            values.fill_diagonal_(value)
        return values


class Tiles:
    """Every tile in which some pair may meet all criteria, each pair of anchor blocks once."""

    def __init__(self, criteria: list[Criterion], stops: tuple[int, int, int], size: int) -> None:
        self.criteria, self.stops = criteria, stops
        # Few rows need no larger buffer than they fill.
        self.size = size = max(min(size, max(stops[0], stops[2] - stops[0])), 1)
        self.blocks = [
            slice(start, min(start + size, stop))
            for first, stop in zip((0, *stops), stops, strict=False)
            for start in range(first, stop, size)
        ]
        counted = torch.full((len(self.blocks), len(self.blocks)), ALL)
        for ids, equal in criteria:
            low, high = torch.stack([torch.stack(ids[block].aminmax()) for block in self.blocks]).cpu().unbind(1)
            one_id = low == high
            apart, same = high[:, None] < low, one_id[:, None] & one_id & (low[:, None] == low)
            never, always = (apart | apart.t(), same) if equal else (same, apart | apart.t())
            counted = counted.minimum(torch.where(always, ALL, SOME).masked_fill_(never, NONE))
        self.counted = counted.tolist()

    def __iter__(self) -> Iterator[Tile]:
        kinds = [sum(block.start >= stop for stop in self.stops) for block in self.blocks]
        for a in range(kinds.count(0)):
            alike = groupby(range(a, len(kinds)), key=lambda b: (self.counted[a][b], kinds[b], b == a))
            for (counted, kind, diagonal), group in alike:
                run = list(group) if counted != NONE else []
                for blocks in (run[first : first + STRIP] for first in range(0, len(run), STRIP)):
                    i, j = self.blocks[a], slice(self.blocks[blocks[0]].start, self.blocks[blocks[-1]].stop)
                    excluded = self._excluded(i, j) if counted == SOME else None
                    yield Tile(i, j, not diagonal and kind == 0, not diagonal and kind < 2, excluded)

    def _excluded(self, i: slice, j: slice) -> Tensor:
        wrong = [ids[i, None] != ids[j] if equal else ids[i, None] == ids[j] for ids, equal in self.criteria]
        for other in wrong[1:]:
            wrong[0].logical_or_(other)
        return wrong[0]


class Similarity(NamedTuple):
    """s_ij = sim(z_i, z_j) / temperature: minus the distance (euclidean), else the product of unit vectors."""

    euclidean: bool
    temperature: float

    def scores(self, z: Tensor, tiles: Tiles) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile with its scores, which the next tile overwrites; in full precision under autocast, too."""
        buffer = z.new_empty(tiles.size**2 * STRIP)
        for t in tiles:
            x, y = z[t.i], z[t.j]
            s = buffer[: len(x) * len(y)].view(len(x), len(y))
            with torch.autocast(z.device.type, enabled=False):
                if self.euclidean:
                    torch.mul(torch.cdist(x, y, compute_mode=EXACT), -1.0 / self.temperature, out=s)
                else:
                    torch.addmm(s, x, y.t(), beta=0.0, alpha=1.0 / self.temperature, out=s)
            yield t, s

    def add_gradient(self, dz: Tensor, ds: Tensor, t: Tile, z: Tensor) -> None:
        """Add the gradient of sum_ij ds_ij s_ij to dz."""
        x, y = z[t.i], z[t.j]
        with torch.autocast(z.device.type, enabled=False):
            if self.euclidean:
                with torch.enable_grad():
                    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
                    distance = torch.cdist(*leaves, compute_mode=EXACT)
                # cdist's gradient at distance 0 is 0: a subgradient, and finite.
                dx, dy = torch.autograd.grad(distance, leaves, ds * (-1.0 / self.temperature))
                dz[t.i] += dx
                if t.keys_too:
                    dz[t.j] += dy
            else:
                dz[t.i].addmm_(ds, y, alpha=1.0 / self.temperature)
                if t.keys_too:
                    dz[t.j].addmm_(ds.t(), x, alpha=1.0 / self.temperature)


def log_sum_exp(pairs: Pairs, criteria: list[Criterion], sim: Similarity) -> Tensor:
    """(A,) log sum_j e^{s_ij} over the keys j != i that meet all criteria with anchor i, -inf without any."""
    order, z, tiles = _sorted(pairs, criteria)
    # A number that no |s| exceeds (inf or NaN: none is known).
    bound = (2.0 * float(z.detach().norm(dim=1).max()) if sim.euclidean else 1.0) / sim.temperature
    lse: Tensor = _LogSumExp.apply(z, tiles, sim, bound <= SAFE_BOUND)  # type: ignore[no-untyped-call]
    return torch.empty_like(lse).index_copy(0, order, lse) if criteria else lse


def mean_over_positives(pairs: Pairs, nu: Tensor | None, sim: Similarity) -> Tensor:
    """(A,) mean over the positives of -s_ip or, given nu, of -log(e^{s_ip} / (e^{s_ip} + e^{nu_i})).

    nu is (A,), the log-sum-exp of the negatives of each anchor, -inf where it has none.
    """
    order, z, tiles = _sorted(pairs, pairs.positive)
    nu = nu[order] if nu is not None else None
    total: Tensor = _PositiveSum.apply(z, nu, tiles, sim)  # type: ignore[no-untyped-call]
    return torch.empty_like(total).index_copy(0, order, total) / pairs.n_positives


def _sorted(pairs: Pairs, criteria: list[Criterion]) -> tuple[Tensor, Tensor, Tiles]:
    """The order of the anchors by their ids, all rows in such an order, and their tiles."""
    size = CPU_TILE if pairs.z.device.type == "cpu" else GPU_TILE
    order = torch.arange(len(pairs.z), device=pairs.z.device)
    if not criteria:
        return order, pairs.z, Tiles(criteria, pairs.stops, size)
    part = (order >= pairs.stops[0]).long() + (order >= pairs.stops[1])  # anchors stay first, the bank last
    for ids in (*(c.ids for c in reversed(criteria)), part):
        order = order[torch.argsort(ids[order], stable=True)]
    tiles = Tiles([Criterion(c.ids[order], c.equal) for c in criteria], pairs.stops, size)
    return order[: pairs.stops[0]], pairs.z[order], tiles


class _LogSumExp(torch.autograd.Function):
    """`safe`: one exponential serves both sides of the diagonal. Else each row keeps a running maximum."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, tiles: Tiles, sim: Similarity, safe: bool) -> Tensor:
        lse = z.new_full((tiles.stops[0],), 0.0 if safe else -torch.inf)
        for t, s in sim.scores(z, tiles):
            if safe:
                e = t.fill_excluded(s.exp_(), 0.0)
                lse[t.i] += e.sum(1)
                if t.mirrored:
                    lse[t.j] += e.sum(0)
            else:
                t.fill_excluded(s, -torch.inf)
                lse[t.i] = torch.logaddexp(lse[t.i], s.logsumexp(1))
                if t.mirrored:
                    lse[t.j] = torch.logaddexp(lse[t.j], s.logsumexp(0))
        if safe:
            lse.log_()
        ctx.save_for_backward(z, lse)
        ctx.rest = tiles, sim, safe
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (z, lse), (tiles, sim, safe) = ctx.saved_tensors, ctx.rest
        # An anchor without keys takes no part: e^{s - inf} = 0.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        a = g * (-lse).exp()
        dz, sums = torch.zeros_like(z), z.new_empty(tiles.size**2 * STRIP if safe else 0)
        for t, s in sim.scores(z, tiles):
            # d/ds_ij = g_i e^{s_ij - lse_i}, and as much for (j, i) where j is an anchor, too
            both = t.mirrored or t.i == t.j
            if not safe:
                ds = (s - lse[t.i, None]).exp_().mul_(g[t.i, None])
                if both:
                    ds += s.sub_(lse[t.j]).exp_().mul_(g[t.j])
            elif both:
                ds = s.exp_().mul_(torch.add(a[t.i, None], a[t.j], out=sums[: s.numel()].view_as(s)))
            else:
                ds = s.exp_().mul_(a[t.i, None])
            sim.add_gradient(dz, t.fill_excluded(ds, 0.0), t, z)
        return dz, None, None, None


class _PositiveSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, nu: Tensor | None, tiles: Tiles, sim: Similarity) -> Tensor:
        total = z.new_zeros(tiles.stops[0])
        for t, s in sim.scores(z, tiles):
            row = -s if nu is None else -F.logsigmoid(s - nu[t.i, None])
            total[t.i] += t.fill_excluded(row, 0.0).sum(1)
            if t.mirrored:
                column = row if nu is None else t.fill_excluded(-F.logsigmoid(s - nu[t.j]), 0.0)
                total[t.j] += column.sum(0)
        ctx.save_for_backward(z, nu)
        ctx.rest = tiles, sim
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (z, nu), (tiles, sim) = ctx.saved_tensors, ctx.rest
        dz, dnu = torch.zeros_like(z), torch.zeros_like(nu) if nu is not None else None
        for t, s in sim.scores(z, tiles):
            # -d/ds_ij = g_i where nu is not given, else g_i sigmoid(nu_i - s_ij), which is also d/dnu_i
            ds = g[t.i, None] * (torch.ones_like(s) if nu is None else (nu[t.i, None] - s).sigmoid_())
            t.fill_excluded(ds, 0.0)
            if dnu is not None:
                dnu[t.i] += ds.sum(1)
            if t.mirrored or t.i == t.j:
                column = g[t.j] * (torch.ones_like(s) if nu is None else (nu[t.j] - s).sigmoid_())
                t.fill_excluded(column, 0.0)
                if dnu is not None and t.mirrored:
                    dnu[t.j] += column.sum(0)
                ds += column
            sim.add_gradient(dz, ds.neg_(), t, z)
        return dz, dnu, None, None


def mean_dot_of_positives(pairs: Pairs) -> Tensor:
    """(A,) mean_p z_i . z_p of unit vectors, in O(N D): z_i times the sum of its positives."""
    # index_select, since the gradient of indexing adds up in no fixed order on several CPU threads
    x, groups = pairs.z[: pairs.stops[0]], pairs.groups
    if pairs.subgroups is None:
        others = _group_sums(pairs.z, groups).index_select(0, groups[: len(x)]) - x
    else:
        # The sum of the other views by subtraction, in float64, or a large view would drown a small one.
        own_view = _group_sums(pairs.z, pairs.subgroups).double()
        group_of = groups.new_empty(len(own_view)).scatter_(0, pairs.subgroups, groups)
        others = _group_sums(own_view, group_of).index_select(0, group_of) - own_view
        others = others.to(x.dtype).index_select(0, pairs.subgroups[: len(x)])
    return (x * others).sum(1) / pairs.n_positives


def _group_sums(rows: Tensor, groups: Tensor) -> Tensor:
    """(G, D) sums of the rows (R, D) of each group (R,)."""
    sums: Tensor = _GroupSums.apply(rows, groups, int(groups.max()) + 1)  # type: ignore[no-untyped-call]
    return sums


class _GroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(groups)
        if n > rows.shape[1]:
            return rows.new_zeros(n, rows.shape[1]).index_add_(0, groups, rows)
        # Few groups of many rows: a matrix product sums pairwise, and its memory is within N D.
        return (groups[:, None] == torch.arange(n, device=rows.device)).to(rows.dtype).t() @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.saved_tensors[0]], None, None
