"""The batch and the bank as one list of keys, parted into anchors and keys that are no anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg_supcon.losses._checks import check_in_range
from medseg_supcon.losses._positives import mean_dot
from medseg_supcon.losses._similarity import UnitVectors, Widen, dtype_for
from medseg_supcon.losses._tiles import Criterion

Weights = tuple[float, ...] | None


@dataclass(frozen=True)
class Voxels:
    """What the loss is given, checked: embeddings (N, D), the rest (N,); None: ids that no option needs."""

    embeddings: Tensor
    labels: Tensor
    pair_ids: Tensor | None
    view_ids: Tensor | None
    may_anchor: Tensor

    def take(self, kept: Tensor) -> Voxels:
        return Voxels(
            self.embeddings[kept],
            self.labels[kept],
            self.pair_ids[kept] if self.pair_ids is not None else None,
            self.view_ids[kept] if self.view_ids is not None else None,
            self.may_anchor[kept],
        )


@dataclass(frozen=True)
class Rows:
    """All R keys (the batch, then the bank), of which A are anchors and M are not."""

    x: Tensor  # (A, D) anchors
    y: Tensor  # (M, D) other keys
    z: Tensor  # (R, D) both, in their first order
    own: Tensor  # (A,) rows of z that are anchors
    rest: Tensor  # (M,) rows of z that are not
    labels: Tensor  # (R,)
    views: Tensor | None  # (R,)
    groups: Tensor  # (R,) equal: positive pair
    subgroups: Tensor | None  # (R,) equal: the same group and view
    n_positives: Tensor  # (A,) |P(i)|, > 0
    weights: Tensor  # (A,) w
    log_k: tuple[Tensor, Tensor] | None  # (A,), (M,) logarithms of the key weights, float64
    unit_length: bool  # cosine

    def criterion(self, ids: Tensor, equal: bool) -> Criterion:
        return Criterion(ids[self.own], ids[self.rest], equal)

    def mean_dot(self) -> Tensor:
        """(A,) mean over P(i) of z_i . z_p."""
        return mean_dot(
            self.x, self.z, self.own, self.groups, self.subgroups, self.n_positives, self.unit_length
        )


def make_rows(
    batch: Voxels,
    bank: tuple[Tensor, Tensor],
    unit_length: bool,
    ignore_index: int | None,
    class_weights: Weights,
    key_weights: Weights,
) -> Rows | None:
    """Leave out what is ignored, count positives, and choose the anchors: those with w > 0 and a positive.

    Returns:
        None where there is no anchor.
    """
    stored, stored_labels = bank
    if ignore_index is not None:
        # by number: a GPU waits for the size of each thing that a mask picks from
        batch = batch.take((batch.labels != ignore_index).nonzero()[:, 0])
        if len(stored):
            held = (stored_labels != ignore_index).nonzero()[:, 0]
            stored, stored_labels = stored[held], stored_labels[held]
    # Only now do the vectors count: an ignored voxel may hold anything, NaN included.
    z: Tensor
    if unit_length:
        z = UnitVectors.apply(batch.embeddings)  # type: ignore[no-untyped-call]
        stored = UnitVectors.apply(stored.detach()).to(z.dtype)  # type: ignore[no-untyped-call]
    else:
        dtype = dtype_for(batch.embeddings, stored)
        z, stored = Widen.apply(batch.embeddings, dtype), stored.detach().to(dtype)  # type: ignore[no-untyped-call]
    n_batch, n_stored = len(z), len(stored)

    labels = torch.cat((batch.labels, stored_labels))
    check_in_range("labels", labels, class_weights, key_weights)
    views = _with_stored(batch.view_ids, n_stored) if batch.view_ids is not None else None
    if batch.pair_ids is not None:
        groups = _with_stored(batch.pair_ids, n_stored)
    else:
        groups = torch.unique(labels, return_inverse=True)[1]
    subgroups = None
    n_positives = _occurrences(groups)
    if views is None:
        n_positives -= 1
    else:
        subgroups = torch.unique(groups * (n_batch + 1) + views, return_inverse=True)[1]
        n_positives -= _occurrences(subgroups)

    w = z.new_tensor(_relative(class_weights))[labels] if class_weights else z.new_ones(len(labels))
    may_anchor = torch.cat((batch.may_anchor, batch.may_anchor.new_zeros(n_stored)))
    is_anchor = may_anchor & (n_positives > 0) & (w > 0)
    own, rest = is_anchor.nonzero()[:, 0], (~is_anchor).nonzero()[:, 0]
    if len(own) == 0:
        return None
    # The bank needs no gradient; neither does y where nothing but the bank is in it.
    beside = rest[rest < n_batch] if n_stored else rest
    log_k = _logarithms(key_weights, labels) if key_weights is not None else None
    return Rows(
        x=z if len(own) == n_batch else z[own],
        y=torch.cat((z[beside], stored)) if len(beside) else stored,
        z=torch.cat((z, stored)) if n_stored else z,
        own=own,
        rest=rest,
        labels=labels,
        views=views,
        groups=groups,
        subgroups=subgroups,
        n_positives=n_positives[own].to(z.dtype),
        weights=w[own],
        log_k=(log_k[own], log_k[rest]) if log_k is not None else None,
        unit_length=unit_length,
    )


def _relative(weights: tuple[float, ...]) -> list[float]:
    """Weights over the largest, which no dtype overflows; the loss, a weighted mean, is the same."""
    largest = max(weights) or 1.0
    return [w / largest for w in weights]


def _logarithms(weights: tuple[float, ...], labels: Tensor) -> Tensor:
    """log of each row's weight, float64: a weight itself may be too small or large for float32."""
    logs = [math.log(k) if k > 0 else -math.inf for k in weights]
    return torch.tensor(logs, dtype=torch.float64, device=labels.device)[labels]


def _with_stored(ids: Tensor, n_stored: int) -> Tensor:
    """Ids as 0, 1, ..., and after them one that no voxel of the batch has, for the bank's entries."""
    found, compact = torch.unique(ids, return_inverse=True)
    return torch.cat((compact, compact.new_full((n_stored,), len(found))))


def _occurrences(ids: Tensor) -> Tensor:
    """How often each row's id occurs."""
    return torch.bincount(ids)[ids] if len(ids) else ids
