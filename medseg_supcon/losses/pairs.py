"""Which voxels are anchors, which are other keys, which pairs are positive, and what each anchor weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medseg_supcon.losses.tiles import Criterion


@dataclass(frozen=True)
class Pairs:
    """R keys in the order: A anchors, the batch's other keys, the bank's. Ids are 0, 1, ..."""

    z: Tensor  # (R, D)
    stops: tuple[int, int, int]  # where each kind of key ends
    classes: Tensor  # (R,)
    views: Tensor | None  # (R,)
    groups: Tensor  # (R,) equal: positive pair
    subgroups: Tensor | None  # (R,) equal: the same group and view
    n_positives: Tensor  # (A,) |P(i)|, > 0
    weights: Tensor  # (A,) w, > 0

    def positive(self) -> list[Criterion]:
        return [Criterion(self.groups, True), *self.denominator("all")]

    def denominator(self, keys: str) -> list[Criterion]:
        """Which keys an anchor is contrasted with: `all`, or those of the `same_class` or `other_class`."""
        criteria = [] if keys == "all" else [Criterion(self.classes, keys == "same_class")]
        return criteria if self.views is None else [*criteria, Criterion(self.views, False)]


def find_pairs(
    embeddings: Tensor,
    labels: Tensor,
    pair_ids: Tensor | None,
    view_ids: Tensor | None,
    bank: tuple[Tensor, Tensor],
    may_anchor: Tensor,
    share: Tensor | None,
    *,
    unit_length: bool,
    denominator: str,
    ignore_index: int | None,
    class_weights: tuple[float, ...] | str | None,
) -> Pairs | None:
    """Leave out what is ignored and choose the anchors: those with a positive, a denominator and w > 0.

    Arguments as for `SupConLoss.terms`, checked; ids are None where no option needs them. The result is None
    where there is no anchor.
    """
    n, stored = len(embeddings), bank[0].detach()
    labels = torch.cat((labels, bank[1]))
    # by number: a GPU waits for the size of each thing that a mask picks from
    kept = torch.arange(len(labels), device=labels.device)
    if ignore_index is not None:
        kept = (labels != ignore_index).nonzero()[:, 0]
        labels = labels[kept]

    def with_bank(values: Tensor, of_bank: int) -> Tensor:
        return torch.cat((values, values.new_full((len(stored),), of_bank)))[kept]

    classes = _compact(labels)
    # A bank's entry is of no view, so of another than the batch's, and of no voxel: n is nobody's number.
    views = None if view_ids is None else with_bank(_compact(view_ids), n)
    groups = classes if pair_ids is None else with_bank(_compact(pair_ids), n)
    subgroups = None if views is None else _compact(groups * (n + 1) + views)
    n_positives = _occurrences(groups) - (1 if subgroups is None else _occurrences(subgroups))
    is_anchor = with_bank(may_anchor, False) & (n_positives > 0)
    if denominator == "same_class" and pair_ids is not None:
        # Its positive may be of another class, and the only other key.
        own = 1 if views is None else _occurrences(_compact(classes * (n + 1) + views))
        is_anchor &= _occurrences(classes) > own
    weights = _weights(class_weights, labels, classes, is_anchor)
    is_anchor &= weights > 0
    if share is not None:
        is_anchor &= with_bank(share, False)
    anchors, rest = is_anchor.nonzero()[:, 0], (~is_anchor).nonzero()[:, 0]
    if len(anchors) == 0:
        return None

    order = torch.cat((anchors, rest)) if len(rest) else anchors
    rows, a = kept[order], len(anchors)
    b = a + int((rows[a:] < n).sum())
    # Only now do the vectors count: an ignored voxel may hold anything, NaN included.
    z, stored = embeddings if a == n else embeddings[rows[:b]], stored[rows[b:] - n]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if not unit_length and (_beyond_float32(z.detach()) or _beyond_float32(stored)):
        dtype = torch.float64
    z = _Prepared.apply(z, stored, z[:0].sum(), unit_length, dtype)  # type: ignore[no-untyped-call]
    return Pairs(
        z=z,
        stops=(a, b, len(z)),
        classes=classes[order],
        views=views[order] if views is not None else None,
        groups=groups[order],
        subgroups=subgroups[order] if subgroups is not None else None,
        n_positives=n_positives[anchors].to(dtype),
        weights=weights[anchors].to(dtype),
    )


def _weights(
    class_weights: tuple[float, ...] | str | None, labels: Tensor, classes: Tensor, is_anchor: Tensor
) -> Tensor:
    """(R,) float64 w of each row: n / (C n_c) over the anchors for "balanced", else the class's number."""
    if class_weights is None or len(labels) == 0:
        return torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    if isinstance(class_weights, str):
        n_c = torch.bincount(classes[is_anchor], minlength=int(classes.max()) + 1).double()
        return (n_c.sum() / ((n_c > 0).sum() * n_c.clamp_min(1.0)))[classes]
    low, high, n = int(labels.min()), int(labels.max()), len(class_weights)
    if low < 0 or high >= n:
        raise ValueError(
            f"labels must be in 0 .. {n - 1} (there are {n} class_weights), got {low if low < 0 else high}"
        )
    # Over the largest, which no dtype overflows; the loss, a weighted mean, is the same.
    w = torch.tensor(class_weights, dtype=torch.float64, device=labels.device)
    return (w / w.max().clamp_min(torch.finfo(w.dtype).tiny))[labels]


def _compact(ids: Tensor) -> Tensor:
    """Ids as 0, 1, ..."""
    inverse: Tensor = torch.unique(ids, return_inverse=True)[1]
    return inverse


def _occurrences(ids: Tensor) -> Tensor:
    """How often each row's id occurs."""
    return ids.bincount()[ids]


def _beyond_float32(z: Tensor) -> bool:
    """Is some row so long or short that float32 cannot square its length?"""
    largest = z.abs().amax(1) if z.numel() else z.new_zeros(0)
    return bool(((largest > 1e15) | ((largest > 0) & (largest < 1e-15))).any())


class _Prepared(torch.autograd.Function):
    """Rows and a bank's in `dtype`, as unit vectors if asked for, whatever their length; zero vectors stay zero.

    A gradient too large for the rows' own dtype is clamped to its largest number. Every gradient of the loss
    passes here, so here a second derivative is refused; `path`, a 0 made from the rows, leads it here.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, stored: Tensor, path: Tensor, unit_length: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype, ctx.n = rows.dtype, len(rows)
        z = torch.cat((rows.to(dtype), stored.to(dtype))) if len(stored) else rows.to(dtype)
        if not unit_length:
            ctx.save_for_backward(path)
            return z
        # by the largest entry first, so that no square overflows or vanishes
        largest = z.abs().amax(1, keepdim=True) if z.shape[1] else z.new_zeros(len(z), 1)
        scaled = torch.where(largest == 0, 0.0, z / largest)
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny)
        unit: Tensor = scaled.div_(norm)
        ctx.save_for_backward(path, unit, norm, largest)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        path, *saved = ctx.saved_tensors
        with torch.no_grad():
            grad = grad[: ctx.n]
            if saved:
                unit, norm, largest = (t[: ctx.n] for t in saved)
                grad = (grad - unit * (unit * grad).sum(1, keepdim=True)).div_(norm)
                grad = torch.where(largest == 0, 0.0, grad.div_(largest))
            limit = min(torch.finfo(ctx.dtype).max, torch.finfo(grad.dtype).max)
            grad = grad.clamp(-limit, limit).to(ctx.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad = _OnceOnly.apply(grad, path)  # type: ignore[no-untyped-call]
        return grad, None, None, None, None


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, path: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("SupConLoss can be differentiated once: its second derivative is not implemented")
