"""Which voxels of a batch the contrastive loss looks at."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice

# Of so many random candidates per voxel wanted, `hard` takes the hardest.
CANDIDATES = 8


class VoxelSample(NamedTuple):
    """Sampled voxels.

    Attributes:
        indices: (S,) int64, sorted, distinct, into the flattened (B, *spatial) label maps.
        anchors: (S,) bool, False for voxels that serve as keys only.
    """

    indices: Tensor
    anchors: Tensor


class VoxelSampler:
    """Draws voxels for `VoxelSupConLoss`.

    Args:
        strategy: how `max_samples` are spent:
            `stratified`: equally over the classes present; a class rarer than its share is taken whole, and
            what it leaves over goes to the others. This balances classes by itself: with
            `balanced_class_weights` in the loss, too, the correction is made twice.
            `uniform`: every labelled voxel is equally likely.
            `hard`: as stratified, with a share of each class from where it is hard: where the network gives
            the true class the least probability, if logits are given, else near a label boundary.
            `all`: every labelled voxel, `max_samples` or not.
        max_samples: voxels per call, over the whole batch.
        background: role of class 0: `anchor`, as any other class; `negatives_only`, keys but no anchors;
            `exclude`, not sampled.
        hard_fraction: share of a class's voxels that `hard` picks for hardness, 0 .. 1.
        seed: for a generator of the sampler's own; None: torch's global one, which a trainer seeds.

    Raises:
        ValueError: an argument outside its values.

    Example:
        >>> labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
        >>> labels[0, 0, 0, :3] = 1
        >>> indices, anchors = VoxelSampler(max_samples=10, seed=0)(labels)
        >>> labels.flatten()[indices].bincount().tolist()
        [7, 3]
    """

    def __init__(
        self,
        strategy: Literal["stratified", "uniform", "hard", "all"] = "stratified",
        max_samples: int = 2048,
        *,
        background: Literal["anchor", "negatives_only", "exclude"] = "anchor",
        hard_fraction: float = 0.5,
        seed: int | None = None,
    ) -> None:
        check_choice("strategy", strategy, ("stratified", "uniform", "hard", "all"))
        check_choice("background", background, ("anchor", "negatives_only", "exclude"))
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        if not 0 <= hard_fraction <= 1:
            raise ValueError(f"hard_fraction must lie in 0 .. 1, got {hard_fraction}")
        self.strategy = strategy
        self.max_samples = max_samples
        self.background = background
        self.hard_fraction = hard_fraction
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else None

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        *,
        pair_ids: Tensor | None = None,
        logits: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VoxelSample:
        """Draw voxels.

        Args:
            labels: (B, *spatial) integer class indices; negative: never drawn.
            pair_ids: (B, *spatial) int64, unique to a physical voxel over the batch, negative: no partner.
                If given, voxels are drawn together with their partners, and only such as have an id:
                half of `max_samples` by the strategy, the rest are their partners.
            logits: (B, C, *spatial), for `hard`.
            generator: on the CPU; in place of the sampler's own.

        Returns:
            At most `max_samples` voxels (but for `all`).

        Raises:
            ValueError: shapes that do not fit.
        """
        for name, value in (("pair_ids", pair_ids), ("logits", logits)):
            shape = None if value is None else value.shape if name == "pair_ids" else value[:, 0].shape
            if shape is not None and shape != labels.shape:
                raise ValueError(f"{name} must match labels {tuple(labels.shape)}, got {tuple(shape)}")
        draw = _Draw(labels, logits, generator or self.generator)
        drawable = labels.reshape(-1)
        if pair_ids is not None:
            drawable = drawable.masked_fill(pair_ids.reshape(-1) < 0, -1)
        counts = _class_counts(drawable)
        if self.background == "exclude" and counts:
            counts[0] = 0
        if self.strategy == "all":
            lowest = 1 if self.background == "exclude" else 0
            indices = (labels.reshape(-1) >= lowest).nonzero()[:, 0]
        elif pair_ids is None:
            indices = self._draw(draw, drawable, counts, self.max_samples)
        else:
            seeds = self._draw(draw, drawable, counts, (self.max_samples + 1) // 2)
            indices = self._with_partners(draw, seeds, drawable, pair_ids.reshape(-1))
        anchors = torch.ones_like(indices, dtype=torch.bool)
        if self.background == "negatives_only":
            anchors = labels.reshape(-1)[indices] != 0
        return VoxelSample(indices, anchors)

    def _draw(self, draw: _Draw, drawable: Tensor, counts: list[int], budget: int) -> Tensor:
        """Sorted indices of `budget` voxels (or of all there are) by the strategy."""
        if self.strategy == "uniform":
            lowest = 1 if self.background == "exclude" else 0
            return draw.some(drawable, None, sum(counts), budget, lowest).sort().values
        parts = []
        for c, quota in enumerate(class_quotas(counts, budget)):
            if quota == 0:
                continue
            hard = round(quota * self.hard_fraction) if self.strategy == "hard" else 0
            if hard == 0 or quota == counts[c]:
                parts.append(draw.some(drawable, c, counts[c], quota))
                continue
            candidates = draw.some(drawable, c, counts[c], min(counts[c], CANDIDATES * quota))
            hardest = draw.hardness(candidates, c).argsort(descending=True)
            rest = hardest[hard:]
            rest = rest[draw.choose(len(rest), quota - hard)]
            parts.append(candidates[torch.cat((hardest[:hard], rest))])
        return torch.cat(parts).sort().values if parts else drawable.new_zeros(0, dtype=torch.long)

    def _with_partners(self, draw: _Draw, seeds: Tensor, drawable: Tensor, pair_ids: Tensor) -> Tensor:
        """Every drawable voxel of the seeds' ids; whole ids are dropped until `max_samples` is kept."""
        wanted = torch.unique(pair_ids[seeds])
        wanted = wanted[draw.permutation(len(wanted))]
        # A small table sieves the dense map; only what passes is looked up exactly.
        sieve = torch.zeros(1 << 20, dtype=torch.bool, device=pair_ids.device)
        sieve[wanted & 0xFFFFF] = True
        found = (sieve[pair_ids & 0xFFFFF] & (drawable >= 0)).nonzero()[:, 0]
        ordered, rank = wanted.sort()
        place = torch.searchsorted(ordered, pair_ids[found]).clamp_(max=max(len(ordered) - 1, 0))
        match = (
            ordered[place] == pair_ids[found] if len(ordered) else torch.zeros_like(found, dtype=torch.bool)
        )
        found, order = found[match], rank[place[match]]
        members = torch.bincount(order, minlength=len(wanted))
        fits = members.cumsum(0) <= self.max_samples
        return found[fits[order]]


def class_quotas(counts: list[int], budget: int) -> list[int]:
    """Voxels to take of each class: equal shares, except that no class gives more than it has.

    Example:
        >>> class_quotas([1000, 3, 0, 50], 60)
        [28, 3, 0, 29]
    """
    quotas = [0] * len(counts)
    present = sorted((n, c) for c, n in enumerate(counts) if n > 0)
    for position, (n, c) in enumerate(present):
        share = -(-budget // (len(present) - position))
        quotas[c] = min(n, share)
        budget -= quotas[c]
    return quotas


class _Draw:
    """Random choices on one batch of label maps, made on the CPU: a seed means one thing everywhere."""

    def __init__(self, labels: Tensor, logits: Tensor | None, generator: torch.Generator | None) -> None:
        self.labels, self.logits, self.generator = labels, logits, generator

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.labels.device)

    def choose(self, n: int, k: int) -> Tensor:
        """k distinct numbers out of 0 .. n - 1, every set of them equally likely."""
        if 4 * k >= n:
            return self.permutation(n)[:k]
        drawn = torch.zeros(0, dtype=torch.long)
        while len(drawn) < k:
            more = torch.randint(n, (k + k // 4 + 8,), generator=self.generator)
            drawn = torch.unique(torch.cat((drawn, more)))
        return drawn[torch.randperm(len(drawn), generator=self.generator)[:k]].to(self.labels.device)

    def some(self, drawable: Tensor, c: int | None, n: int, k: int, lowest: int = 0) -> Tensor:
        """k of the n voxels of class c (None: of any class from `lowest` on)."""
        total = len(drawable)
        if n * 16 < total or 2 * k >= n:
            members = (drawable == c if c is not None else drawable >= lowest).nonzero()[:, 0]
            return members if k >= n else members[self.choose(n, k)]
        # A class that fills much of the batch is met by chance: no list of its voxels is made.
        drawn = drawable.new_zeros(0, dtype=torch.long)
        while len(drawn) < k:
            tries = int(1.2 * k * total / n) + 16
            more = torch.randint(total, (tries,), generator=self.generator).to(drawable.device)
            hit = drawable[more] == c if c is not None else drawable[more] >= lowest
            drawn = torch.unique(torch.cat((drawn, more[hit])))
        return drawn[self.permutation(len(drawn))[:k]]

    def hardness(self, voxels: Tensor, c: int) -> Tensor:
        """1 - p(true class), or the share of the neighbourhood that has another label; ties at random."""
        where = torch.unravel_index(voxels, self.labels.shape)
        if self.logits is not None:
            index: tuple[Tensor | slice, ...] = (where[0], slice(None), *where[1:])
            return 1.0 - self.logits[index].float().softmax(1)[:, c]
        score = torch.rand(len(voxels), generator=self.generator).to(voxels.device) * 0.5
        for axis in range(1, self.labels.ndim):
            for step in (-2, -1, 1, 2):
                moved = list(where)
                moved[axis] = (where[axis] + step).clamp(0, self.labels.shape[axis] - 1)
                neighbour = self.labels[tuple(moved)]
                score += (neighbour != c) & (neighbour >= 0)
        return score


def _class_counts(labels: Tensor) -> list[int]:
    """Voxels of class 0, 1, ...; negative labels are not counted."""
    if labels.numel() == 0:
        return []
    counts: list[int] = torch.bincount(labels.clamp_min(-1) + 1).tolist()
    return counts[1:]
