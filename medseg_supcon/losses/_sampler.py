"""Which voxels of a batch the contrastive loss looks at."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from medseg_supcon.losses._checks import check_choice, check_integers, check_number
from medseg_supcon.losses._draw import Draw, class_counts, class_quotas

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
        TypeError: an argument of another type.

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
        check_number("max_samples", max_samples, 1, integer=True)
        check_number("hard_fraction", hard_fraction)
        if seed is not None:
            check_number("seed", seed, integer=True)
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
                half of `max_samples` by the strategy, the rest are their partners. Where the partners are
                more than that, those of a class that the half took whole come before the others.
            logits: (B, C, *spatial), for `hard`, a channel for every class that occurs.
            generator: on the CPU; in place of the sampler's own.

        Returns:
            At most `max_samples` voxels (but for `all`).

        Raises:
            ValueError: shapes that do not fit.
            TypeError: labels that are not integers.
        """
        check_integers("labels", labels)
        labels = labels.long()  # uint8 would wrap at -1
        for name, value in (("pair_ids", pair_ids), ("logits", logits)):
            if value is None:
                continue
            shape = value.shape if name == "pair_ids" else value.shape[:1] + value.shape[2:]
            if shape != labels.shape:
                raise ValueError(f"{name} must match labels {tuple(labels.shape)}, got {tuple(shape)}")
        draw = Draw(labels, logits, generator or self.generator)
        drawable = labels.reshape(-1)
        if self.background == "exclude":
            drawable = drawable.masked_fill(drawable == 0, -1)
        if self.strategy == "all":
            indices = (drawable >= 0).nonzero()[:, 0]
        else:
            if pair_ids is not None:
                drawable = drawable.masked_fill(pair_ids.reshape(-1) < 0, -1)
            counts = class_counts(drawable)
            if self.strategy == "hard" and logits is not None and logits.shape[1] < len(counts):
                raise ValueError(
                    f"logits must have a channel for each class, at least {len(counts)}, got {logits.shape[1]}"
                )
            if pair_ids is None:
                indices = self._draw(draw, drawable, counts, self.max_samples)
            else:
                half = (self.max_samples + 1) // 2
                seeds = self._draw(draw, drawable, counts, half)
                rank = self._precedence(counts, half).to(labels.device)[drawable[seeds]]
                indices = self._with_partners(draw, seeds, rank, drawable, pair_ids.reshape(-1))
        anchors = torch.ones_like(indices, dtype=torch.bool)
        if self.background == "negatives_only":
            anchors = labels.reshape(-1)[indices] != 0
        return VoxelSample(indices, anchors)

    def _draw(self, draw: Draw, drawable: Tensor, counts: list[int], budget: int) -> Tensor:
        """Sorted indices of `budget` voxels (or of all there are) by the strategy."""
        if self.strategy == "uniform":
            return draw.some(drawable, None, sum(counts), budget).sort().values
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

    def _precedence(self, counts: list[int], budget: int) -> Tensor:
        """(C,) for classes taken whole their size, the rarest first; the others come last, all alike."""
        last = sum(counts)
        whole = [
            self.strategy != "uniform" and q == n
            for q, n in zip(class_quotas(counts, budget), counts, strict=True)
        ]
        return torch.tensor([n if w else last for n, w in zip(counts, whole, strict=True)], dtype=torch.long)

    def _with_partners(
        self, draw: Draw, seeds: Tensor, rank: Tensor, drawable: Tensor, pair_ids: Tensor
    ) -> Tensor:
        """Every drawable voxel of the seeds' ids; whole ids of the last ranks go until `max_samples` is kept."""
        wanted, place = torch.unique(pair_ids[seeds], return_inverse=True)
        first = rank.new_zeros(len(wanted)).scatter_reduce_(0, place, rank, "amin", include_self=False)
        chance = draw.permutation(len(wanted))
        wanted = wanted[chance[first[chance].argsort(stable=True)]]
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
