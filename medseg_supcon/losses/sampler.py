"""Which voxels of a batch the contrastive loss looks at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from medseg_supcon.losses.checks import Ids, check_choice, check_number, check_tensor

CANDIDATES = 8  # of so many random candidates per voxel wanted, `hard` takes the hardest
SIEVE = (1 << 20) - 1
MAX_TABLE = 1 << 12  # class ids below this are counted in a table; one of 1e8 would need gigabytes


class VoxelSample(NamedTuple):
    indices: Tensor  # (S,) int64, sorted, distinct, into the flattened (B, *spatial) label maps
    anchors: Tensor  # (S,) bool, False for voxels that serve as keys only


class VoxelSampler:
    """Draws voxels for `VoxelSupConLoss`.

    Args:
        strategy: how `max_samples` are spent:
            `stratified`: equally over the classes present; a class rarer than its share is taken whole, and what it
            leaves over goes to the others.
            `uniform`: every labelled voxel is equally likely.
            `hard`: as stratified, but a share of each class comes from where the network gives the true class the
            least probability, if logits are given, else from near label boundaries.
            `all`: every labelled voxel, whatever `max_samples` is.
        max_samples: voxels per call, over the whole batch.
        background: role of class 0: `anchor`, as any other class; `negatives_only`, keys but not anchors; `exclude`,
            not sampled.
        hard_fraction: share of a class's voxels that `hard` picks for hardness, 0 .. 1.
        seed: for a generator of the sampler's own; None: torch's global one, which a trainer seeds.
        membership: (R, C) booleans, if the logits are of R regions that may overlap: which classes each region holds.

    Example:
        >>> labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
        >>> labels[0, 0, 0, :3] = 1
        >>> labels.flatten()[VoxelSampler(max_samples=10, seed=0)(labels).indices].bincount().tolist()
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
        membership: Tensor | Sequence[Sequence[bool]] | None = None,
    ) -> None:
        check_choice("strategy", strategy, ("stratified", "uniform", "hard", "all"))
        check_choice("background", background, ("anchor", "negatives_only", "exclude"))
        check_number("max_samples", max_samples, 1, integer=True)
        check_number("hard_fraction", hard_fraction)
        if not 0 <= hard_fraction <= 1:
            raise ValueError(f"hard_fraction must be in 0 .. 1, got {hard_fraction}")
        self.strategy, self.max_samples, self.background = strategy, max_samples, background
        self.hard_fraction, self.generator = hard_fraction, None
        self.membership = None if membership is None else torch.as_tensor(membership, dtype=torch.float32)
        if seed is not None:
            check_number("seed", seed, integer=True)
            self.generator = Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(
        self, labels: Tensor, *, pair_ids: Ids = None, logits: Tensor | None = None, generator: Generator | None = None
    ) -> VoxelSample:
        """Draw at most `max_samples` voxels (with `all`: every labelled one).

        Args:
            labels: (B, *spatial) integer class indices of any size; negative: never drawn.
            pair_ids: (B, *spatial) int64, unique to a physical voxel over the batch, negative: no partner. Then half of
                `max_samples` are drawn from the voxels with an id; the rest are their partners, rare classes' first.
            logits: (B, C, *spatial), for `hard`, a channel for every class that occurs; with `membership` (B, R, *spatial).
            generator: on the CPU, instead of the sampler's own.
        """
        check_tensor("labels", labels)
        labels = labels.long()  # uint8 would wrap at -1
        shape = tuple(labels.shape)
        if pair_ids is not None and pair_ids.shape != shape:
            raise ValueError(f"pair_ids must match labels {shape}, got {tuple(pair_ids.shape)}")
        if logits is not None and logits.shape[:1] + logits.shape[2:] != shape:
            raise ValueError(f"logits must be (B, C, *spatial) like labels {shape}, got {tuple(logits.shape)}")
        drawable = labels.reshape(-1)
        if self.background == "exclude":
            drawable = drawable.masked_fill(drawable == 0, -1)
        if pair_ids is not None and self.strategy != "all":
            drawable = drawable.masked_fill(pair_ids.reshape(-1) < 0, -1)
        if self.strategy == "uniform":
            drawable = drawable.clamp(max=0)  # one class
        if logits is not None and self.membership is not None and self.strategy == "hard":
            # log p of a class is the sum of the logits of its regions, up to a constant of the voxel
            logits = torch.einsum("rc,br...->bc...", self.membership.to(logits.device), logits.float())
        draw = _Draw(labels, drawable, logits, generator or self.generator)
        if self.strategy == "all":
            indices = (drawable >= 0).nonzero()[:, 0]
        elif pair_ids is None:
            indices, _ = self._voxels(draw, self.max_samples)
        else:
            indices = self._with_partners(draw, pair_ids.reshape(-1))
        anchors = labels.reshape(-1)[indices] != 0
        return VoxelSample(indices, anchors if self.background == "negatives_only" else torch.ones_like(anchors))

    def _voxels(self, draw: _Draw, budget: int) -> tuple[Tensor, Tensor]:
        """Sorted indices of `budget` voxels (or of all) by the strategy, and whose partners come first."""
        classes, counts = _class_counts(draw.drawable)
        if self.strategy == "hard" and draw.logits is not None and bool((classes >= draw.logits.shape[1]).any()):
            needed, got = int(classes[-1]) + 1, draw.logits.shape[1]
            raise ValueError(f"logits must have a channel for each class, at least {needed}, got {got}")
        quotas = _class_quotas(counts, budget)
        wanted = zip(classes.tolist(), counts, quotas, strict=True)
        parts = [self._of_class(draw, c, n, quota) for c, n, quota in wanted if quota > 0]
        voxels = torch.cat([draw.drawable[:0], *parts]).sort().values
        # The partners of classes taken whole come first, of the rarest at the head; then those of all others.
        rank = [n if q == n else sum(counts) for q, n in zip(quotas, counts, strict=True)]
        number = torch.searchsorted(classes, draw.drawable[voxels])
        return voxels, torch.tensor(rank, dtype=torch.long, device=voxels.device)[number]

    def _of_class(self, draw: _Draw, c: int, n: int, quota: int) -> Tensor:
        """`quota` of the n voxels of class c."""
        hard = round(quota * self.hard_fraction) if self.strategy == "hard" else 0
        if hard == 0 or quota == n:
            return draw.some(c, n, quota)
        candidates = draw.some(c, n, min(n, CANDIDATES * quota))
        candidates = candidates[draw.hardness(candidates, c).argsort(descending=True)]
        rest = hard + draw.permutation(len(candidates) - hard)[: quota - hard]
        return torch.cat((candidates[:hard], candidates[rest]))

    def _with_partners(self, draw: _Draw, pair_ids: Tensor) -> Tensor:
        """Half by the strategy and their partners; whole ids of the last ranks go until `max_samples` is kept."""
        seeds, rank = self._voxels(draw, (self.max_samples + 1) // 2)
        wanted, place = torch.unique(pair_ids[seeds], return_inverse=True)
        if len(wanted) == 0:
            return seeds
        first = rank.new_zeros(len(wanted)).scatter_reduce_(0, place, rank, "amin", include_self=False)
        chance = draw.permutation(len(wanted))
        wanted, order = wanted[chance[first[chance].argsort(stable=True)]].sort()
        # A small table sieves the dense map; only what passes is looked up exactly.
        sieve = torch.zeros(SIEVE + 1, dtype=torch.bool, device=pair_ids.device)
        sieve[wanted & SIEVE] = True
        voxels = (sieve[pair_ids & SIEVE] & (draw.drawable >= 0)).nonzero()[:, 0]
        place = torch.searchsorted(wanted, pair_ids[voxels]).clamp_(max=len(wanted) - 1)
        match = wanted[place] == pair_ids[voxels]
        voxels, order = voxels[match], order[place[match]]
        fits = torch.bincount(order, minlength=len(wanted)).cumsum(0) <= self.max_samples
        return voxels[fits[order]]


def _class_counts(labels: Tensor) -> tuple[Tensor, list[int]]:
    """The classes present, sorted, and the voxels of each; negative labels are not counted."""
    table = torch.bincount(labels.clamp(-1, MAX_TABLE) + 1, minlength=MAX_TABLE + 2)[1:]
    classes, counts = table.nonzero()[:, 0], table[table > 0]
    if bool(table[MAX_TABLE]):
        classes, counts = torch.unique(labels[labels >= 0], return_counts=True)
    return classes, counts.tolist()


def _class_quotas(counts: list[int], budget: int) -> list[int]:
    """Voxels to take of each class: equal shares, except that no class gives more than it has.

    >>> _class_quotas([1000, 3, 50], 60)
    [28, 3, 29]
    """
    quotas = [0] * len(counts)
    for position, (n, c) in enumerate(sorted((n, c) for c, n in enumerate(counts))):
        quotas[c] = min(n, -(-budget // (len(counts) - position)))
        budget -= quotas[c]
    return quotas


class _Draw(NamedTuple):
    """Random choices on one batch of label maps, made on the CPU: a seed means the same on every device."""

    labels: Tensor  # (B, *spatial)
    drawable: Tensor  # flattened, negative where a voxel must not be drawn
    logits: Tensor | None
    generator: Generator | None

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.labels.device)

    def some(self, c: int, n: int, k: int) -> Tensor:
        """k of the n voxels of class c."""
        if n < 32 * k:
            members = (self.drawable == c).nonzero()[:, 0]
            return members if k >= n else members[self.permutation(n)[:k]]
        # A class that fills much of the batch is met by chance: no list of its voxels is made.
        total, drawn = len(self.drawable), self.drawable[:0]
        while len(drawn) < k:
            more = torch.randint(total, (int(1.2 * k * total / n) + 16,), generator=self.generator).to(drawn.device)
            drawn = torch.unique(torch.cat((drawn, more[self.drawable[more] == c])))
        return drawn[self.permutation(len(drawn))[:k]]

    def hardness(self, voxels: Tensor, c: int) -> Tensor:
        """1 - p(true class), or the number of near voxels that have another label; ties at random."""
        where = torch.unravel_index(voxels, self.labels.shape)
        if self.logits is not None:
            return 1.0 - self.logits.movedim(1, -1)[where].float().softmax(1)[:, c]
        score = torch.rand(len(voxels), generator=self.generator).to(voxels.device) * 0.5
        for axis, step in product(range(1, self.labels.ndim), (-2, -1, 1, 2)):
            moved = (where[axis] + step).clamp(0, self.labels.shape[axis] - 1)
            neighbour = self.labels[(*where[:axis], moved, *where[axis + 1 :])]
            score += (neighbour != c) & (neighbour >= 0)
        return score
