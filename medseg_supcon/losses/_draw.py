"""How many voxels of each class, and random choices among them."""

from __future__ import annotations

import torch
from torch import Tensor


def class_counts(labels: Tensor) -> list[int]:
    """Voxels of class 0, 1, ...; negative labels are not counted."""
    if labels.numel() == 0:
        return []
    counts: list[int] = torch.bincount(labels.clamp_min(-1) + 1).tolist()
    return counts[1:]


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


class Draw:
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

    def some(self, drawable: Tensor, c: int | None, n: int, k: int) -> Tensor:
        """k of the n voxels of class c (None: of any class)."""
        total = len(drawable)
        if n * 16 < total or 2 * k >= n:
            members = (drawable == c if c is not None else drawable >= 0).nonzero()[:, 0]
            return members if k >= n else members[self.choose(n, k)]
        # A class that fills much of the batch is met by chance: no list of its voxels is made.
        drawn = drawable.new_zeros(0, dtype=torch.long)
        while len(drawn) < k:
            tries = int(1.2 * k * total / n) + 16
            more = torch.randint(total, (tries,), generator=self.generator).to(drawable.device)
            hit = drawable[more] == c if c is not None else drawable[more] >= 0
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
