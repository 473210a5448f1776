"""Which pairs (anchor i, key j) count, tile by tile.

Rows are the anchors, then the batch's other keys, then the bank's. A tile of two anchor blocks serves (i, j) and
(j, i), so each pair of anchors is computed once. Where rows are sorted by the ids of the criteria, nearly every
tile counts as a whole or not at all: the first kind needs no mask, the second is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Blocks that one tile may span. Wide tiles keep the number of calls small; narrow ones waste little on the
# diagonal, where a tile cannot stand for its mirror image.
STRIP = 4
NONE, SOME, ALL = 0, 1, 2  # pairs of two blocks that count


class Criterion(NamedTuple):
    """Pairs of rows whose ids (R,) are equal (or, with `equal=False`, differ)."""

    ids: Tensor
    equal: bool


class Tile(NamedTuple):
    """Anchors `i` against rows `j`."""

    i: slice
    j: slice
    mirrored: bool  # it also stands for the pairs (j, i)
    excluded: Tensor | None  # (I, J) True where a pair does not count; None: all count, but for i = j

    def fill_excluded(self, values: Tensor, value: float) -> Tensor:
        """`values` (I, J) with `value`, in place, where a pair does not count; i = j never does."""
        if self.excluded is not None:
            values.masked_fill_(self.excluded, value)
        if self.i == self.j:
            values.fill_diagonal_(value)
        return values


class Tiles:
    """Every tile in which some pair may count, each pair of anchor blocks once.

    Args:
        criteria: all of them must hold for a pair; none: every pair counts.
        stops: where the anchors end, the batch's other keys, the bank's: A <= B <= R.
        size: rows of a tile; it has up to `STRIP` times as many columns.
    """

    def __init__(self, criteria: list[Criterion], stops: tuple[int, int, int], size: int) -> None:
        self.criteria, self.stops = criteria, stops
        # Few rows need no larger buffer than they fill.
        self.size = size = max(min(size, max(stops[0], stops[2] - stops[0])), 1)
        self.blocks = [
            slice(start, min(start + size, stop))
            for first, stop in zip((0, *stops), stops, strict=False)
            for start in range(first, stop, size)
        ]
        self.ranges = [
            torch.stack([torch.stack(c.ids[block].aminmax()) for block in self.blocks]).tolist()
            for c in criteria
        ]

    def __iter__(self) -> Iterator[Tile]:
        for a, i in enumerate(self.blocks):
            if i.start >= self.stops[0]:
                return
            counted = {b: self._counted(a, b) for b in range(a, len(self.blocks))}
            b = a
            while b < len(self.blocks):
                stop = b + 1
                while a < b and stop < min(b + STRIP, len(self.blocks)) and counted[stop] == counted[b]:
                    if self.blocks[stop].start in self.stops:
                        break
                    stop += 1
                if counted[b] != NONE:
                    j = slice(self.blocks[b].start, self.blocks[stop - 1].stop)
                    excluded = self._excluded(i, j) if counted[b] == SOME else None
                    yield Tile(i, j, i != j and j.start < self.stops[0], excluded)
                b = stop

    def _counted(self, a: int, b: int) -> int:
        """How many pairs of two blocks count, from the smallest and the largest id of each."""
        least = ALL
        for (low_a, high_a), (low_b, high_b), equal in (
            (ranges[a], ranges[b], c.equal) for ranges, c in zip(self.ranges, self.criteria, strict=True)
        ):
            if high_a < low_b or high_b < low_a:
                least = min(least, NONE if equal else ALL)
            elif low_a == high_a == low_b == high_b:
                least = min(least, ALL if equal else NONE)
            else:
                least = min(least, SOME)
        return least

    def _excluded(self, i: slice, j: slice) -> Tensor | None:
        excluded = None
        for ids, equal in self.criteria:
            wrong = ids[i, None] != ids[j] if equal else ids[i, None] == ids[j]
            excluded = wrong if excluded is None else excluded.logical_or_(wrong)
        return excluded
