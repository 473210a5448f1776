"""Which pairs (anchor i, key j) count, tile by tile.

Rows are anchors, then keys that are no anchors. A tile of two anchor blocks serves both sides of the
diagonal, so each pair of anchors is computed once. Whoever sorts the rows by the ids of the relation
gets tiles in which nearly always all pairs count or none: no mask is built for the first, the second
are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Wide tiles keep the number of calls, and of waits for other threads, small; narrow ones waste little on the
# diagonal, where a tile cannot stand for its mirror image.
STRIP = 4


@dataclass(frozen=True)
class Criterion:
    """Pairs whose ids are equal (or, with `equal=False`, differ).

    Attributes:
        anchors: (A,) ids of the anchors.
        others: (M,) ids of the keys that are no anchors.
        equal: what is asked of a pair.
    """

    anchors: Tensor
    others: Tensor
    equal: bool

    def take(self, anchors: Tensor, others: Tensor) -> Criterion:
        """The same criterion for rows in another order."""
        return Criterion(self.anchors[anchors], self.others[others], self.equal)


@dataclass(frozen=True)
class Tile:
    """Rows `i` of the anchors against rows `j` of the anchors or of the other keys.

    Attributes:
        i: slice of the anchors.
        j: slice of the anchors if `among_anchors`, else of the other keys.
        among_anchors: both sides are anchors; the tile stands for its mirror image, too.
        mask: (I, J) True where the pair counts, or None where all do. Never excludes i = j by itself.
    """

    i: slice
    j: slice
    among_anchors: bool
    mask: Tensor | None

    @property
    def diagonal(self) -> bool:
        """Does the tile hold the pairs i = j?"""
        return self.among_anchors and self.i == self.j

    @property
    def mirrored(self) -> bool:
        """Does the tile also stand for the pairs (j, i)?"""
        return self.among_anchors and self.i != self.j


def sorted_order(ids: list[Tensor], n: int, device: torch.device) -> Tensor:
    """(n,) order of the rows by the first ids, then the second, and so on."""
    order = torch.arange(n, device=device)
    for key in reversed(ids):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def tiles(criteria: list[Criterion], n_anchors: int, n_others: int, size: int) -> Iterator[Tile]:
    """Every tile in which some pair may count, each pair of anchor blocks once.

    Args:
        criteria: all of them must hold for a pair.
        n_anchors: A.
        n_others: M.
        size: rows of a tile; it has up to `STRIP` times as many columns.
    """
    anchor_ranges = [_ranges(c.anchors, size) for c in criteria]
    other_ranges = [_ranges(c.others, size) for c in criteria]
    for a, i in enumerate(_blocks(n_anchors, size)):
        for among_anchors in (True, False):
            n, ranges = (n_anchors, anchor_ranges) if among_anchors else (n_others, other_ranges)
            blocks = _blocks(n, size)
            verdicts = [
                _all_verdicts(
                    _verdict(mine[a], theirs[b], c.equal)
                    for c, mine, theirs in zip(criteria, anchor_ranges, ranges, strict=True)
                )
                for b in range(len(blocks))
            ]
            first = a if among_anchors else 0
            for b, stop in _strips(verdicts, first, alone=first if among_anchors else -1):
                j = slice(blocks[b].start, blocks[stop - 1].stop)
                mask = None
                for c in criteria if verdicts[b] == "some" else ():
                    same = c.anchors[i, None] == (c.anchors if among_anchors else c.others)[j]
                    allowed = same if c.equal else ~same
                    mask = allowed if mask is None else mask & allowed
                yield Tile(i, j, among_anchors, mask)


def _strips(verdicts: list[str], first: int, alone: int) -> Iterator[tuple[int, int]]:
    """Runs of up to `STRIP` blocks of one verdict, as (first, stop); block `alone` makes its own."""
    b = first
    while b < len(verdicts):
        stop = b + 1
        if b != alone:
            while stop < len(verdicts) and stop - b < STRIP and verdicts[stop] == verdicts[b]:
                stop += 1
        if verdicts[b] != "none":
            yield b, stop
        b = stop


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _ranges(ids: Tensor, size: int) -> list[tuple[int, int]]:
    """Smallest and largest id of each block, fetched from the device at once."""
    if len(ids) == 0:
        return []
    parts = [ids[block] for block in _blocks(len(ids), size)]
    lowest = torch.stack([p.min() for p in parts]).tolist()
    highest = torch.stack([p.max() for p in parts]).tolist()
    return list(zip(lowest, highest, strict=True))


def _all_verdicts(verdicts: Iterable[str]) -> str:
    """The verdict on pairs that must meet every criterion."""
    found = set(verdicts)
    return "none" if "none" in found else "some" if "some" in found else "all"


def _verdict(mine: tuple[int, int], theirs: tuple[int, int], equal: bool) -> str:
    """Do `all`, `some` or `none` of the pairs between two blocks meet a criterion?"""
    disjoint = mine[1] < theirs[0] or theirs[1] < mine[0]
    identical = mine[0] == mine[1] == theirs[0] == theirs[1]
    if disjoint:
        return "none" if equal else "all"
    if identical:
        return "all" if equal else "none"
    return "some"
