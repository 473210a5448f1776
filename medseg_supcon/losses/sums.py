"""The two sums over pairs that the loss needs, one tile of scores at a time: memory grows with N, not N^2.

Backward computes a tile again (as in Rabe and Staats 2021, and FlashAttention). One of two anchor blocks serves (i, j) and
(j, i). Rows are sorted by the ids that decide which pairs count: nearly every tile counts as a whole, or is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_TILE, GPU_TILE = 384, 2048  # rows of a tile: on a CPU it fits the caches; a GPU wants work for all its cores
STRIP = 4  # blocks that one tile may span: wide tiles mean fewer calls, narrow ones waste less on the diagonal
NONE, SOME, ALL = 0, 1, 2  # pairs of two blocks that count
# Where |s| is at most this (unit vectors at temperature 0.02 and above), e^s needs no shift: e^50 times 1e9 keys
# times 1e7 is below float32's 3e38. The hundredth is for unit vectors that rounding left a little too long.
SAFE_BOUND = 50.01
EXACT = "donot_use_mm_for_euclid_dist"  # through |x|^2 + |y|^2 - 2xy near neighbours would cancel

Criterion = tuple[Tensor, bool]  # ids (R,), and whether they must be equal in a pair that counts, or must differ
Slope = Callable[[Tensor], Tensor]


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
    euclidean: bool  # s_ij is minus the distance over the temperature, else z_i . z_j of unit vectors over it
    temperature: float

    def tiles(self, keys: str) -> tuple[Tensor, Tensor, Tiles]:
        """Anchors, and all rows, in the order of the ids that decide; `keys`: positive, all, same_class or other_class."""
        ids = self.groups if keys == "positive" else self.classes
        criteria = [] if keys == "all" else [(ids, keys != "other_class")]
        if self.views is not None:
            criteria.append((self.views, False))
        z, order = self.z, torch.arange(len(self.z), device=self.z.device)
        if criteria:
            part = (order >= self.stops[0]).long() + (order >= self.stops[1])  # anchors stay first, the bank last
            for ids in (*(ids for ids, _ in reversed(criteria)), part):
                order = order[torch.argsort(ids[order], stable=True)]
            z = z[order]
        return order[: self.stops[0]], z, Tiles([(ids[order], equal) for ids, equal in criteria], self)


class Tile(NamedTuple):
    """Anchors `i` against rows `j`."""

    i: slice
    j: slice
    mirrored: bool  # it also stands for the pairs (j, i)
    keys_too: bool  # rows j get a gradient of their own: on the diagonal they are rows i, and a bank needs none
    excluded: Tensor | None  # (I, J) True where a pair does not count; None: all count, but for i = j

    def fill_excluded(self, values: Tensor, value: float) -> Tensor:
        """`values` (I, J) with `value`, in place, where a pair does not count; i = j never does (e^{s_ii} would cancel)."""
        if self.excluded is not None:
            values.masked_fill_(self.excluded, value)
        return values.fill_diagonal_(value) if self.i == self.j else values


class Tiles:
    """Every tile in which some pair may meet all criteria, each pair of anchor blocks once, and its scores."""

    def __init__(self, criteria: list[Criterion], pairs: Pairs) -> None:
        self.criteria, self.stops = criteria, pairs.stops
        self.euclidean, self.temperature = pairs.euclidean, pairs.temperature
        a, _, n = self.stops
        # Few rows need no larger buffer than they fill.
        self.size = size = max(min(CPU_TILE if pairs.z.device.type == "cpu" else GPU_TILE, max(a, n - a)), 1)
        parts = zip((0, *self.stops), self.stops, strict=False)
        self.blocks = [slice(k, min(k + size, stop)) for first, stop in parts for k in range(first, stop, size)]
        counted = torch.full((len(self.blocks), len(self.blocks)), ALL)
        for ids, equal in criteria:
            low, high = torch.stack([torch.stack(ids[block].aminmax()) for block in self.blocks]).cpu().unbind(1)
            apart = high[:, None] < low
            apart, same = apart | apart.t(), (low == high)[:, None] & (low == high) & (low[:, None] == low)
            never, always = (apart, same) if equal else (same, apart)
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
        wrong = [(ids[i, None] != ids[j]) if equal else (ids[i, None] == ids[j]) for ids, equal in self.criteria]
        return reduce(Tensor.logical_or_, wrong)

    def scores(self, z: Tensor) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile with its scores (I, J), which the next tile overwrites."""
        buffer = z.new_empty(self.size**2 * STRIP)
        for t in self:
            x, y = z[t.i], z[t.j]
            s = buffer[: len(x) * len(y)].view(len(x), len(y))
            if self.euclidean:
                # autocast leaves cdist, `out=` and operations in place as they are
                torch.mul(torch.cdist(x, y, compute_mode=EXACT), -1.0 / self.temperature, out=s)
            else:
                torch.addmm(s, x, y.t(), beta=0.0, alpha=1.0 / self.temperature, out=s)
            yield t, s

    def add_gradient(self, dz: Tensor, ds: Tensor, t: Tile, z: Tensor) -> None:
        """Add the gradient of sum_ij ds_ij s_ij to dz."""
        x, y = z[t.i], z[t.j]
        if self.euclidean:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
                distance = torch.cdist(*leaves, compute_mode=EXACT)
            # cdist's gradient at distance 0 is 0: a subgradient, and finite.
            dx, dy = torch.autograd.grad(distance, leaves, ds * (-1.0 / self.temperature))
            dz[t.i] += dx
            if t.keys_too:
                dz[t.j] += dy
            return
        dz[t.i].addmm_(ds, y, alpha=1.0 / self.temperature)
        if t.keys_too:
            dz[t.j].addmm_(ds.t(), x, alpha=1.0 / self.temperature)


def log_sum_exp(pairs: Pairs, keys: str) -> Tensor:
    """(A,) log sum_j e^{s_ij} over the keys j != i that count, -inf without any."""
    order, z, tiles = pairs.tiles(keys)
    # A number that no |s| exceeds (inf or NaN: none is known).
    bound = (2.0 * float(z.detach().norm(dim=1).max()) if pairs.euclidean else 1.0) / pairs.temperature
    lse: Tensor = _LogSumExp.apply(z, tiles, bound <= SAFE_BOUND)  # type: ignore[no-untyped-call]
    return torch.empty_like(lse).index_copy(0, order, lse)


class _LogSumExp(torch.autograd.Function):
    """`safe`: one exponential serves both sides of the diagonal. Else each row keeps a running maximum."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, tiles: Tiles, safe: bool) -> Tensor:
        over, add, none = (torch.sum, torch.add, 0.0) if safe else (torch.logsumexp, torch.logaddexp, -torch.inf)
        lse = z.new_full((tiles.stops[0],), none)
        for t, s in tiles.scores(z):
            t.fill_excluded(s.exp_() if safe else s, none)
            lse[t.i] = add(lse[t.i], over(s, 1))
            if t.mirrored:
                lse[t.j] = add(lse[t.j], over(s, 0))
        if safe:
            lse.log_()
        ctx.save_for_backward(z, lse)
        ctx.rest = tiles, safe
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (z, lse), (tiles, safe) = ctx.saved_tensors, ctx.rest
        # An anchor without keys takes no part: e^{s - inf} = 0.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        if not safe:
            return _gradients(z, lse, g, tiles, Tensor.exp_)[0], None, None
        a, dz, sums = g * (-lse).exp(), torch.zeros_like(z), z.new_empty(tiles.size**2 * STRIP)
        for t, s in tiles.scores(z):
            factor = a[t.i, None]
            if t.mirrored or t.i == t.j:
                factor = torch.add(factor, a[t.j], out=sums[: s.numel()].view_as(s))
            tiles.add_gradient(dz, t.fill_excluded(s.exp_().mul_(factor), 0.0), t, z)
        return dz, None, None


def mean_over_positives(pairs: Pairs, nu: Tensor | None) -> Tensor:
    """(A,) mean over the positives of -s_ip or, given nu (A,), of -log(e^{s_ip} / (e^{s_ip} + e^{nu_i}))."""
    order, z, tiles = pairs.tiles("positive")
    shift = torch.zeros_like(pairs.n_positives) if nu is None else nu[order]
    total: Tensor = _PositiveSum.apply(z, shift, tiles, nu is None)  # type: ignore[no-untyped-call]
    return torch.empty_like(total).index_copy(0, order, total) / pairs.n_positives


class _PositiveSum(torch.autograd.Function):
    """(A,) sums over the positives of -(s_ip - nu_i) if `linear`, else of -log sigmoid(s_ip - nu_i)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nu: Tensor, tiles: Tiles, linear: bool) -> Tensor:
        f = torch.neg if linear else (lambda x: -F.logsigmoid(x))
        total = torch.zeros_like(nu)
        for t, s in tiles.scores(z):
            total[t.i] += t.fill_excluded(f(s - nu[t.i, None]), 0.0).sum(1)
            if t.mirrored:
                total[t.j] += t.fill_excluded(f(s - nu[t.j]), 0.0).sum(0)
        ctx.save_for_backward(z, nu)
        ctx.rest = tiles, linear
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        tiles, linear = ctx.rest
        slope = (lambda x: x.fill_(-1.0)) if linear else (lambda x: x.neg_().sigmoid_().neg_())
        z, nu = ctx.saved_tensors
        return *_gradients(z, nu, g, tiles, slope), None, None


def _gradients(z: Tensor, nu: Tensor, g: Tensor, tiles: Tiles, slope: Slope) -> tuple[Tensor, Tensor]:
    """The gradients for z and nu of sum_i g_i sum_j f(s_ij - nu_i); `slope` is f', in place."""
    dz, dnu = torch.zeros_like(z), torch.zeros_like(nu)
    for t, s in tiles.scores(z):
        ds = t.fill_excluded(slope(s - nu[t.i, None]).mul_(g[t.i, None]), 0.0)
        dnu[t.i] -= ds.sum(1)
        if t.mirrored or t.i == t.j:
            column = t.fill_excluded(slope(s.sub_(nu[t.j])).mul_(g[t.j]), 0.0)
            if t.mirrored:
                dnu[t.j] -= column.sum(0)
            ds += column
        tiles.add_gradient(dz, ds, t, z)
    return dz, dnu


def mean_dot_of_positives(pairs: Pairs) -> Tensor:
    """(A,) mean_p z_i . z_p of unit vectors, in O(N D): z_i times the sum of its positives."""
    # index_select, since the gradient of indexing adds up in no fixed order on several CPU threads
    x, groups = pairs.z[: pairs.stops[0]], pairs.groups
    group_sums: Callable[[Tensor, Tensor], Tensor] = _GroupSums.apply
    if pairs.subgroups is None:
        others = group_sums(pairs.z, groups).index_select(0, groups[: len(x)]) - x
    else:
        # The sum of the other views by subtraction, in float64, or a large view would drown a small one.
        own_view = group_sums(pairs.z, pairs.subgroups).double()
        group_of = groups.new_empty(len(own_view)).scatter_(0, pairs.subgroups, groups)
        others = group_sums(own_view, group_of).index_select(0, group_of) - own_view
        others = others.to(x.dtype).index_select(0, pairs.subgroups[: len(x)])
    return (x * others).sum(1) / pairs.n_positives


class _GroupSums(torch.autograd.Function):
    """(G, D) sums of the rows (R, D) of each group (R,)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(groups)
        n = int(groups.max()) + 1
        if n > rows.shape[1]:
            return rows.new_zeros(n, rows.shape[1]).index_add_(0, groups, rows)
        # Few groups of many rows: a matrix product sums pairwise, and its memory is within N D.
        return (groups[:, None] == torch.arange(n, device=rows.device)).to(rows.dtype).t() @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g[ctx.saved_tensors[0]], None
