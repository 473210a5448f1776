"""The supervised contrastive loss, exact, in memory that grows with N.

`pairs.py` finds anchors and positives; `sums.py` has the two sums over pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medseg_supcon.losses.bank import Bank, bank_entries
from medseg_supcon.losses.checks import check_choice, check_ids, check_matrix, check_number, number_vector
from medseg_supcon.losses.pairs import Pairs, find_pairs
from medseg_supcon.losses.sums import Similarity, log_sum_exp, mean_dot_of_positives, mean_over_positives

# Rows of a tile: on a CPU it fits the caches; a GPU wants work for all its cores.
CPU_TILE, GPU_TILE = 384, 2048
MIN_TEMPERATURE = 1e-6  # at smaller ones the scores exceed what float32 can resolve


class SupConLoss(nn.Module):
    r"""Supervised contrastive loss of N embeddings.

    With s_ij = sim(z_i, z_j) / temperature, keys j != i, denominator keys D(i) and positives P(i):

        L_i = LSE_{j in D(i)} s_ij  -  mean_{p in P(i)} s_ip
        L   = sum_i w_{y_i} L_i / sum_i w_{y_i}      over anchors that have a positive

    Args:
        temperature: tau, at least 1e-6.
        similarity: `cosine` (unit vectors; a zero vector is similar to nothing), or `euclidean` (minus the
            distance, of the embeddings as they are).
        positives: P(i): `same_class`, y_j = y_i, or `same_voxel`, equal pair_ids.
        denominator: D(i): `all` keys (Khosla et al. 2020, eq. 2); the keys of i's class, `same_class`;
            or `other_class`: per pair, the pair's own positive and all keys of other classes (Wang et al.
            2021): L_i = mean_p -log(e^{s_ip} / (e^{s_ip} + sum_{n: y_n != y_i} e^{s_in})).
        keys: `all`, or `other_view`: only voxels whose view_id differs from the anchor's (positives, too).
            Bank entries belong to no view and so count as other views.
        class_weights: (C,) w >= 0, one per class; None: 1; "balanced": n / (C n_c), where n_c of the n
            anchors are of class c, so that each of the C classes present weighs the same.
        ignore_index: label of voxels that are neither anchors nor keys; None: no label is ignored.
        tile_size: rows of a tile; None: chosen for the device. Memory beside the embeddings is a few
            tiles; the result does not depend on it.

    The source article's loss is `positives="same_voxel", denominator="same_class", keys="other_view"`: it
    contrasts voxels within a class, and by itself does not push classes apart.

    Without any anchor the loss is 0 and attached to the graph. Half precision, and any input under autocast,
    is computed in float32. A second derivative raises RuntimeError.

    Raises:
        ValueError: an option or a weight that is not allowed.
        TypeError: an argument that is not a number where one is needed.

    Example:
        >>> loss = SupConLoss(temperature=0.1)
        >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> round(loss(z, torch.tensor([0, 0, 1, 1])).item(), 6)
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
        *,
        tile_size: int | None = None,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, MIN_TEMPERATURE)
        check_choice("similarity", similarity, ("cosine", "euclidean"))
        check_choice("positives", positives, ("same_class", "same_voxel"))
        check_choice("denominator", denominator, ("all", "same_class", "other_class"))
        check_choice("keys", keys, ("all", "other_view"))
        if tile_size is not None:
            check_number("tile_size", tile_size, 1, integer=True)
        if ignore_index is not None:
            check_number("ignore_index", ignore_index, integer=True)
        self.temperature = float(temperature)
        self.similarity, self.positives = similarity, positives
        self.denominator, self.keys = denominator, keys
        self.ignore_index, self.tile_size = ignore_index, tile_size
        self.class_weights: tuple[float, ...] | str | None = None
        if isinstance(class_weights, str):
            check_choice("class_weights as a word", class_weights, ("balanced",))
            self.class_weights = class_weights
        elif class_weights is not None:
            self.class_weights = tuple(number_vector("class_weights", class_weights).tolist())

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
            labels: (N,) integers; not needed for `same_voxel` with the denominator `all` and no weights.
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
        return total / torch.where(weight > 0, weight, 1.0)

    def terms(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        pair_ids: Tensor | None = None,
        view_ids: Tensor | None = None,
        bank: Bank | None = None,
        anchors: Tensor | None = None,
        share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Numerator sum_i w_{y_i} L_i and denominator sum_i w_{y_i} of the loss, to be added up over parts.

        Arguments as for `forward`, and `share`, (N,) bool: whose anchors are summed here (one rank's, say);
        "balanced" weights count all anchors. The second result carries no gradient.
        """
        check_matrix("embeddings", embeddings)
        n, device = len(embeddings), embeddings.device
        need_labels = (self.positives, self.denominator, self.class_weights) != ("same_voxel", "all", None)
        if labels is None and not need_labels:
            labels = torch.full((n,), int(self.ignore_index == 0), device=device)  # any but the ignored one
        labels = check_ids("labels", labels, embeddings, "this loss (only same_voxel with all needs none)")
        pair_ids = None if self.positives == "same_class" else pair_ids
        if self.positives == "same_voxel":
            pair_ids = check_ids("pair_ids", pair_ids, embeddings, "positives='same_voxel'")
        view_ids = None if self.keys == "all" else view_ids
        if self.keys == "other_view":
            view_ids = check_ids("view_ids", view_ids, embeddings, "keys='other_view'")
        if anchors is None:
            anchors = torch.ones(n, dtype=torch.bool, device=device)
        elif anchors.dtype != torch.bool or anchors.shape != (n,):
            raise ValueError(f"anchors must be ({n},) bool, got {tuple(anchors.shape)} {anchors.dtype}")
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        with torch.autocast(device.type, enabled=False):
            pairs = find_pairs(
                embeddings, labels, pair_ids, view_ids, bank_entries(bank, embeddings), anchors, share,
                unit_length=self.similarity == "cosine", denominator=self.denominator,
                ignore_index=self.ignore_index, class_weights=self.class_weights,
            )  # fmt: skip
            if pairs is None:
                # A sum over no rows: 0 whatever the embeddings hold, and attached to their graph.
                nothing = embeddings[:0].to(dtype).sum()
                return nothing, torch.zeros_like(nothing)
            total = (pairs.weights * self._anchor_losses(pairs)).sum()
            return total.to(dtype), pairs.weights.sum().to(dtype)

    def _anchor_losses(self, pairs: Pairs) -> Tensor:
        """L_i of every anchor, (A,)."""
        sim = Similarity(self.similarity == "euclidean", self.temperature)
        tile = self.tile_size or (CPU_TILE if pairs.z.device.type == "cpu" else GPU_TILE)
        lse = log_sum_exp(pairs, pairs.denominator(self.denominator), sim, tile)
        if self.denominator == "other_class":
            return mean_over_positives(pairs, lse, sim, tile)
        if sim.euclidean:
            return lse + mean_over_positives(pairs, None, sim, tile)
        return lse - mean_dot_of_positives(pairs) / self.temperature

    def extra_repr(self) -> str:
        names = ("temperature", "similarity", "positives", "denominator", "keys", "class_weights")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "ignore_index"))
