"""The supervised contrastive loss, exact, in memory that grows with N: anchors and keys; `sums.py` adds up the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_supcon.losses.bank import Bank, bank_entries
from medseg_supcon.losses.checks import Ids, check_choice, check_ids, check_number, check_rows, number_vector
from medseg_supcon.losses.sums import Pairs, log_sum_exp, mean_dot_of_positives, mean_over_positives

MIN_TEMPERATURE = 1e-6  # at smaller ones the scores exceed what float32 can resolve


class SupConLoss(nn.Module):
    r"""Supervised contrastive loss of N embeddings.

    With s_ij = sim(z_i, z_j) / temperature, keys j != i, denominator keys D(i) and positives P(i):

        L_i = LSE_{j in D(i)} s_ij  -  mean_{p in P(i)} s_ip
        L   = sum_i w_{y_i} L_i / sum_i w_{y_i}      over anchors that have a positive

    Without any anchor the loss is 0 and attached to the graph. Half precision, and any input under autocast, is
    computed in float32. There is no second derivative: a backward pass with create_graph=True raises RuntimeError.

    Args:
        temperature: tau, at least 1e-6.
        similarity: `cosine` (a zero vector is similar to nothing), or `euclidean` (minus the distance of the
            embeddings as they are).
        positives: P(i): `same_class`, y_j = y_i, or `same_voxel`, equal pair_ids.
        denominator: D(i): `all` keys (Khosla et al. 2020, eq. 2); `same_class`: the keys of i's class; `other_class`:
            per pair, the pair's own positive and all keys of other classes (Wang et al. 2021):
            L_i = mean_p -log(e^{s_ip} / (e^{s_ip} + sum_{n: y_n != y_i} e^{s_in})).
        keys: `all`, or `other_view`: only voxels whose view_id differs from the anchor's, positives too.
        class_weights: (C,) w >= 0, one per class; None: 1; "balanced": n / (C n_c), where n_c of the n anchors are
            of class c, so that each of the C classes present weighs the same.
        ignore_index: label of voxels that are neither anchors nor keys; None: no label is ignored.

    The source article's loss is `positives="same_voxel", denominator="same_class", keys="other_view"`: it contrasts
    voxels within a class, and by itself does not push classes apart.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> round(SupConLoss(temperature=0.1)(z, torch.tensor([0, 0, 1, 1])).item(), 6)
        9.1e-05
    """

    def __init__(
        self,
        temperature: float = 0.1,
        similarity: Literal["cosine", "euclidean"] = "cosine",
        positives: Literal["same_class", "same_voxel"] = "same_class",
        denominator: Literal["all", "same_class", "other_class"] = "all",
        keys: Literal["all", "other_view"] = "all",
        class_weights: Tensor | Sequence[float] | Literal["balanced"] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, MIN_TEMPERATURE)
        check_choice("similarity", similarity, ("cosine", "euclidean"))
        check_choice("positives", positives, ("same_class", "same_voxel"))
        check_choice("denominator", denominator, ("all", "same_class", "other_class"))
        check_choice("keys", keys, ("all", "other_view"))
        if ignore_index is not None:
            check_number("ignore_index", ignore_index, integer=True)
        self.temperature, self.similarity, self.ignore_index = float(temperature), similarity, ignore_index
        self.positives, self.denominator, self.keys = positives, denominator, keys
        self.class_weights: tuple[float, ...] | str | None = None
        if isinstance(class_weights, str):
            check_choice("class_weights as a word", class_weights, ("balanced",))
            self.class_weights = class_weights
        elif class_weights is not None:
            self.class_weights = tuple(number_vector("class_weights", class_weights).tolist())

    def forward(
        self, embeddings: Tensor, labels: Ids = None, *, pair_ids: Ids = None, view_ids: Ids = None,
        bank: Bank | None = None, anchors: Ids = None,
    ) -> Tensor:  # fmt: skip
        """The mean of L_i over the anchors, a scalar, float64 for float64 embeddings, else float32.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers; not needed for `same_voxel` with the denominator `all` and no weights.
            pair_ids: (N,) integers, for `same_voxel`; equal ids are one physical voxel, any number of times.
            view_ids: (N,) integers, for `other_view`.
            bank: a `MemoryBank`, or embeddings (M, D) and labels (M,): further keys and positives, never anchors, of
                no view and without gradient.
            anchors: (N,) bool, the voxels that may be anchors; the others are keys only. None: all.
        """
        total, weight = self.terms(embeddings, labels, pair_ids, view_ids, bank, anchors)
        return total / torch.where(weight > 0, weight, 1.0)

    def terms(
        self, z: Tensor, y: Ids, pair_ids: Ids, view_ids: Ids, bank: Bank | None, anchors: Ids, share: Ids = None
    ) -> tuple[Tensor, Tensor]:
        """Numerator sum_i w_{y_i} L_i and denominator sum_i w_{y_i} of the loss, over the anchors of `share` (N,) bool."""
        check_rows("embeddings", z)
        n, each, device = len(z), z.shape[:1], z.device
        if y is None and (self.positives, self.denominator, self.class_weights) == ("same_voxel", "all", None):
            y = torch.full((n,), int(self.ignore_index == 0), device=device)  # any but the ignored one
        y = check_ids("labels", y, each, device, "this loss (only same_voxel with all needs none)")
        by_voxel, by_view = self.positives == "same_voxel", self.keys == "other_view"
        pair_ids = check_ids("pair_ids", pair_ids, each, device, "positives='same_voxel'") if by_voxel else None
        view_ids = check_ids("view_ids", view_ids, each, device, "keys='other_view'") if by_view else None
        anchors = torch.ones(n, dtype=torch.bool, device=device) if anchors is None else anchors
        if anchors.dtype != torch.bool or anchors.shape != (n,):
            raise ValueError(f"anchors must be ({n},) bool, got {tuple(anchors.shape)} {anchors.dtype}")
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        with torch.autocast(device.type, enabled=False):
            pairs = self._pairs(z, y, pair_ids, view_ids, bank, anchors, share)
            if pairs is None:
                nothing = z[:0].to(dtype).sum()  # 0 whatever the embeddings hold, and attached to their graph
                return nothing, torch.zeros_like(nothing)
            losses = log_sum_exp(pairs, self.denominator)
            if self.denominator == "other_class":
                losses = mean_over_positives(pairs, losses)
            elif pairs.euclidean:
                losses = losses + mean_over_positives(pairs, None)
            else:
                losses = losses - mean_dot_of_positives(pairs) / self.temperature
            return (pairs.weights * losses).sum().to(dtype), pairs.weights.sum().to(dtype)

    def _pairs(
        self, z: Tensor, y: Tensor, pair_ids: Ids, view_ids: Ids, bank: Bank | None, may: Tensor, share: Ids
    ) -> Pairs | None:
        """Leave out what is ignored and choose the anchors: those with a positive, a denominator and w > 0."""
        stored, stored_y = bank_entries(bank, z)
        n, y = len(z), torch.cat((y, stored_y))
        # by number: a GPU waits for the size of each thing that a mask picks from
        kept = torch.arange(len(y), device=y.device)
        if self.ignore_index is not None:
            kept = (y != self.ignore_index).nonzero()[:, 0]
            y = y[kept]

        def with_bank(values: Tensor, of_bank: int) -> Tensor:
            return F.pad(values, (0, len(stored)), value=of_bank)[kept]

        classes = _compact(y)
        # A bank's entry is of no view, so of another than the batch's, and of no voxel: n is nobody's number.
        views = None if view_ids is None else with_bank(_compact(view_ids), n)
        groups = classes if pair_ids is None else with_bank(_compact(pair_ids), n)
        subgroups = None if views is None else _compact(groups * (n + 1) + views)
        n_positives = _occurrences(groups) - (1 if subgroups is None else _occurrences(subgroups))
        is_anchor = with_bank(may, False) & (n_positives > 0)
        if self.denominator == "same_class" and pair_ids is not None:
            # Its positive may be of another class, and the only other key.
            own = 1 if views is None else _occurrences(_compact(classes * (n + 1) + views))
            is_anchor &= _occurrences(classes) > own
        weights = self._weights(y, classes, is_anchor)
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
        euclidean, of_bank = self.similarity == "euclidean", stored[rows[b:] - n]
        z = _Prepared.apply(z if a == n else z[rows[:b]], of_bank, euclidean)  # type: ignore[no-untyped-call]
        views, subgroups = (ids if ids is None else ids[order] for ids in (views, subgroups))
        counts, w = n_positives[anchors].to(z.dtype), weights[anchors].to(z.dtype)
        ids = classes[order], views, groups[order], subgroups
        return Pairs(z, (a, b, len(z)), *ids, counts, w, euclidean, self.temperature)

    def _weights(self, y: Tensor, classes: Tensor, is_anchor: Tensor) -> Tensor:
        """(R,) float64 w of each row: n / (C n_c) over the anchors for "balanced", else the class's number."""
        if self.class_weights is None or len(y) == 0:
            return torch.ones(len(y), dtype=torch.float64, device=y.device)
        if isinstance(self.class_weights, str):
            n_c = torch.bincount(classes[is_anchor], minlength=int(classes.max()) + 1).double()
            return (n_c.sum() / ((n_c > 0).sum() * n_c.clamp_min(1.0)))[classes]
        n = len(self.class_weights)
        for label in (int(y.min()), int(y.max())):
            if not 0 <= label < n:
                raise ValueError(f"labels must be in 0 .. {n - 1} (there are {n} class_weights), got {label}")
        # Over the largest, which no dtype overflows; the loss, a weighted mean, is the same.
        w = torch.tensor(self.class_weights, dtype=torch.float64, device=y.device)
        return (w / w.max().clamp_min(torch.finfo(w.dtype).tiny))[y]

    def extra_repr(self) -> str:
        names = ("temperature", "similarity", "positives", "denominator", "keys", "class_weights", "ignore_index")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def balanced_class_weights(counts: Tensor | Sequence[float]) -> Tensor:
    """Class weights w_c = n / (C n_c), (C,) float64, of (C,) voxels per class n_c, or their share; 0 for an absent class.

    >>> balanced_class_weights([12, 4, 0, 8]).tolist()
    [0.5, 1.5, 0.0, 0.75]
    """
    n_c = number_vector("counts", counts)
    if not bool(n_c.sum() > 0):
        raise ValueError(f"counts must be finite and >= 0 with a positive sum, got {n_c.tolist()}")
    return torch.where(n_c > 0, n_c.sum() / (len(n_c) * n_c), 0.0)


def _compact(ids: Tensor) -> Any:
    """Ids as 0, 1, ..."""
    return torch.unique(ids, return_inverse=True)[1]


def _occurrences(ids: Tensor) -> Tensor:
    """How often each row's id occurs."""
    return ids.bincount()[ids]


class _Prepared(torch.autograd.Function):
    """The batch's rows and a bank's in float32 or float64, as unit vectors unless `euclidean`; zero vectors stay zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stored: Tensor, euclidean: bool) -> Tensor:
        ctx.dtype, ctx.n = rows.dtype, len(rows)
        z = rows.to(torch.promote_types(rows.dtype, torch.float32))
        z = torch.cat((z, stored.to(z.dtype))) if len(stored) else z
        largest = z.abs().amax(1, keepdim=True)
        if euclidean:
            # float32 cannot square the length of so long or short a row
            extreme = bool(((largest > 1e15) | ((largest > 0) & (largest < 1e-15))).any())
            return z.double() if extreme else z
        # by the largest entry first, so that no square overflows or vanishes
        z = torch.where(largest == 0, 0.0, z / largest)
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min_(torch.finfo(z.dtype).tiny)
        ctx.save_for_backward(z.div_(norm), norm, largest)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("SupConLoss has no second derivative: create_graph must be False")
        grad = grad[: ctx.n]
        if ctx.saved_tensors:
            unit, norm, largest = (t[: ctx.n] for t in ctx.saved_tensors)
            grad = (grad - unit * (unit * grad).sum(1, keepdim=True)).div_(norm)
            grad = torch.where(largest == 0, 0.0, grad.div_(largest))
        # every gradient of the loss passes here
        limit = min(torch.finfo(ctx.dtype).max, torch.finfo(grad.dtype).max)
        return grad.clamp(-limit, limit).to(ctx.dtype), None, None
