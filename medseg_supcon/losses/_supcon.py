"""The supervised contrastive loss, exact, in memory that grows with N.

Read `SupConLoss` first; `_log_sum_exp.py` and `_positives.py` hold the two sums over pairs that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medseg_supcon.losses._bank import Bank, bank_entries
from medseg_supcon.losses._checks import check_choice, check_ids, check_matrix, check_number, class_vector
from medseg_supcon.losses._log_sum_exp import log_sum_exp
from medseg_supcon.losses._positives import mean_over_pairs
from medseg_supcon.losses._rows import Rows, Voxels, make_rows
from medseg_supcon.losses._similarity import Similarity, compute_dtype

# Rows of a tile: on a CPU it fits the caches; a GPU wants work for all its cores.
CPU_TILE, GPU_TILE = 384, 2048


class SupConLoss(nn.Module):
    r"""Supervised contrastive loss of N embeddings.

    With s_ij = sim(z_i, z_j) / temperature, keys j != i, denominator keys D(i) and positives P(i), anchor i
    that has a positive contributes

        L_i = LSE_{j in D(i)} (s_ij + log k_{y_j})  -  mean_{p in P(i)} s_ip
        L   = sum_i w_{y_i} L_i / sum_i w_{y_i}

    Args:
        temperature: tau > 0.
        similarity: `cosine` (unit vectors; a zero vector is similar to nothing), `dot`, or `euclidean`
            (minus the distance); the last two take the embeddings as they are.
        positives: P(i): `same_class`, y_j = y_i, or `same_voxel`, equal pair_ids.
        denominator: D(i): `all` keys (Khosla et al. 2020, eq. 2); the keys of i's class, `same_class`;
            or `other_class`: per pair, the pair's own positive and all keys of other classes (Wang et al.
            2021): L_i = mean_p -log(e^{s_ip} / (e^{s_ip} + sum_{n: y_n != y_i} k_{y_n} e^{s_in})).
        keys: `all`, or `other_view`: only voxels whose view_id differs from the anchor's (positives, too).
            Bank entries belong to no view and so count as other views.
        class_weights: (C,) w >= 0, one per class; None: 1. `balanced_class_weights` makes them.
        key_weights: (C,) k >= 0; None: 1. They weigh every key inside the LSE, positives too, but neither
            the mean over P nor the own positive of `other_class`. 0 removes a class from the denominator.
        ignore_index: label of voxels that are neither anchors nor keys; None: there is none.
        positive_mean: `outside_log`, as above, or `inside_log`: L_i = LSE_D - log mean_p e^{s_ip}
            (Khosla et al. 2020, eq. 3); not for `other_class`.
        tile_size: rows of a tile; None: chosen for the device. Memory beside the embeddings is a few
            tiles; the result does not depend on it.

    The source article's loss is `positives="same_voxel", denominator="same_class", keys="other_view"`: it
    contrasts voxels within a class, and by itself does not push classes apart.

    An anchor whose denominator is empty (all its keys have weight 0) is left out, as one without positives
    is. With no anchor left, the loss is 0 and attached to the graph. Half precision inputs, and any under
    autocast, are computed in float32. The loss can be differentiated once.

    Raises:
        ValueError: an option or a weight that is not allowed.
        TypeError: a number that is none.

    Example:
        >>> loss = SupConLoss(temperature=0.1)
        >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> round(loss(z, torch.tensor([0, 0, 1, 1])).item(), 6)
        9.1e-05
    """

    def __init__(
        self,
        temperature: float = 0.1,
        similarity: Literal["cosine", "dot", "euclidean"] = "cosine",
        positives: Literal["same_class", "same_voxel"] = "same_class",
        denominator: Literal["all", "same_class", "other_class"] = "all",
        keys: Literal["all", "other_view"] = "all",
        class_weights: Tensor | Sequence[float] | None = None,
        key_weights: Tensor | Sequence[float] | None = None,
        ignore_index: int | None = None,
        *,
        positive_mean: Literal["outside_log", "inside_log"] = "outside_log",
        tile_size: int | None = None,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature)
        if temperature <= 0:
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        check_choice("similarity", similarity, ("cosine", "dot", "euclidean"))
        check_choice("positives", positives, ("same_class", "same_voxel"))
        check_choice("denominator", denominator, ("all", "same_class", "other_class"))
        check_choice("keys", keys, ("all", "other_view"))
        check_choice("positive_mean", positive_mean, ("outside_log", "inside_log"))
        if positive_mean == "inside_log" and denominator == "other_class":
            raise ValueError("positive_mean='inside_log' is not defined for denominator='other_class'")
        if tile_size is not None:
            check_number("tile_size", tile_size, 1, integer=True)
        if ignore_index is not None:
            check_number("ignore_index", ignore_index, integer=True)
        self.temperature = float(temperature)
        self.similarity = similarity
        self.positives = positives
        self.denominator = denominator
        self.keys = keys
        self.class_weights = class_vector("class_weights", class_weights)
        self.key_weights = class_vector("key_weights", key_weights)
        self.ignore_index = ignore_index
        self.positive_mean = positive_mean
        self.tile_size = tile_size

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        pair_ids: Tensor | None = None,
        view_ids: Tensor | None = None,
        bank: Bank | None = None,
        anchors: Tensor | None = None,
    ) -> Tensor:
        """The mean of L_i over the anchors.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers; needed unless `positives="same_voxel"`, `denominator="all"` and no weights.
            pair_ids: (N,) integers; equal ids are one physical voxel, any id any number of times (once: no
                positive). Needed for `positives="same_voxel"`.
            view_ids: (N,) integers. Needed for `keys="other_view"`.
            bank: a `MemoryBank`, or embeddings (M, D) and labels (M,): further keys, and positives of their
                class, never anchors, without gradient.
            anchors: (N,) bool, the voxels that may be anchors; the others are keys only. None: all.

        Returns:
            Scalar, float64 for float64 embeddings, else float32.

        Raises:
            ValueError: shapes that do not fit, ids that an option needs and that are missing, a label
                outside the range of the weights.
            TypeError: embeddings that are not floating point, labels or ids that are not integers.
        """
        total, weight = self.terms(
            embeddings, labels, pair_ids=pair_ids, view_ids=view_ids, bank=bank, anchors=anchors
        )
        return total / torch.where(weight > 0, weight, torch.ones_like(weight))

    def terms(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        pair_ids: Tensor | None = None,
        view_ids: Tensor | None = None,
        bank: Bank | None = None,
        anchors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Numerator sum_i w_{y_i} L_i and denominator sum_i w_{y_i} of the loss, to be added up over parts.

        Arguments as for `forward`; the second result carries no gradient.
        """
        check_matrix("embeddings", embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            batch = self._checked(embeddings, labels, pair_ids, view_ids, anchors)
            rows = make_rows(
                batch,
                bank_entries(bank, batch.embeddings),
                self.similarity == "cosine",
                self.ignore_index,
                self.class_weights,
                self.key_weights,
            )
            if rows is None:
                # A sum over no rows: 0 whatever the embeddings hold, and attached to their graph.
                nothing = embeddings[:0].to(compute_dtype(embeddings.dtype)).sum()
                return nothing, torch.zeros_like(nothing)
            losses, contrasted = self._anchor_losses(rows)
            contrasted = contrasted.nonzero()[:, 0]
            weights = rows.weights[contrasted]
            dtype = compute_dtype(embeddings.dtype)
            return (weights * losses[contrasted]).sum().to(dtype), weights.sum().to(dtype)

    def _anchor_losses(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """L_i of every anchor, (A,), and which of them have a denominator, (A,) bool."""
        similarity = Similarity(self.similarity == "euclidean", self.temperature)
        tile = self.tile_size or (CPU_TILE if rows.x.device.type == "cpu" else GPU_TILE)
        other_view = [rows.criterion(rows.views, equal=False)] if rows.views is not None else []
        positive = [rows.criterion(rows.groups, equal=True), *other_view]
        denominator = list(other_view)
        if self.denominator != "all":
            denominator.insert(0, rows.criterion(rows.labels, equal=self.denominator == "same_class"))

        lse = log_sum_exp(rows.x, rows.y, denominator, similarity, rows.log_k, tile)
        if self.denominator == "other_class":
            loss = mean_over_pairs(rows.x, rows.y, lse, rows.n_positives, positive, similarity, tile)
            return loss, torch.ones_like(loss, dtype=torch.bool)
        if self.positive_mean == "inside_log":
            towards = log_sum_exp(rows.x, rows.y, positive, similarity, None, tile) - rows.n_positives.log()
        elif self.similarity == "euclidean":
            towards = -mean_over_pairs(rows.x, rows.y, None, rows.n_positives, positive, similarity, tile)
        else:
            towards = rows.mean_dot() / self.temperature
        # An infinite distance to every key empties no denominator: it must show.
        return lse - towards, (lse.detach() != -torch.inf) | ~towards.detach().isfinite()

    def _checked(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        pair_ids: Tensor | None,
        view_ids: Tensor | None,
        anchors: Tensor | None,
    ) -> Voxels:
        """The batch, with the ids that the options need and without others."""
        n = len(embeddings)
        weighted = self.class_weights is not None or self.key_weights is not None
        if labels is not None or self.positives == "same_class" or self.denominator != "all" or weighted:
            labels = check_ids(
                "labels", labels, embeddings, "this loss (only same_voxel with all needs none)"
            )
        else:
            # Any label but the one that is ignored.
            labels = torch.full((n,), int(self.ignore_index == 0), device=embeddings.device)
        pairs = views = None
        if self.positives == "same_voxel":
            pairs = check_ids("pair_ids", pair_ids, embeddings, "positives='same_voxel'")
        if self.keys == "other_view":
            views = check_ids("view_ids", view_ids, embeddings, "keys='other_view'")
        if anchors is None:
            anchors = torch.ones(n, dtype=torch.bool, device=embeddings.device)
        elif anchors.dtype != torch.bool or anchors.shape != (n,):
            raise ValueError(f"anchors must be ({n},) bool, got {tuple(anchors.shape)} {anchors.dtype}")
        return Voxels(embeddings, labels, pairs, views, anchors)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, similarity={self.similarity!r}, positives={self.positives!r}, "
            f"denominator={self.denominator!r}, keys={self.keys!r}, class_weights={self.class_weights}, "
            f"key_weights={self.key_weights}, ignore_index={self.ignore_index}, "
            f"positive_mean={self.positive_mean!r}"
        )
