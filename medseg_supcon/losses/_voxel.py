"""The contrastive loss on dense features: sample, project what was sampled, contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_supcon.losses._bank import MemoryBank
from medseg_supcon.losses._checks import check_number
from medseg_supcon.losses._gather import gather_rows, mean_over_ranks, world_size
from medseg_supcon.losses._labels import IGNORE_INDEX, class_indices
from medseg_supcon.losses._sampler import VoxelSampler
from medseg_supcon.losses._supcon import SupConLoss


class VoxelSupConLoss(nn.Module):
    """`SupConLoss` on voxels sampled from dense features.

    Voxels are gathered from the feature map, cast to float32 (with a projection, to the dtype of its
    parameters), and only those are projected. Unlabelled
    voxels (`IGNORE_INDEX`, and the loss's own `ignore_index`) are never sampled.

    Under torch.distributed with several ranks the keys of all ranks are gathered, with gradient. Every
    rank returns the loss of the concatenated batch, and after DistributedDataParallel's averaging the
    gradients are those of one process; a rank without a labelled voxel takes part. One scan's views must
    lie on one rank.

    Args:
        loss: the loss of the sampled voxels.
        sampler: which voxels; with `positives="same_voxel"` they are drawn together with their partners.
        projection: maps (S, F) features to (S, D) embeddings; None: the features themselves.
        bank: earlier embeddings as further keys; filled in training mode, after the loss is computed.
        within_scan: contrast the voxels of each scan among themselves, and take the mean over the scans
            that have an anchor, as the source article does. Not with a bank.
        gather: False: each rank contrasts its own voxels only.
        enqueue_per_class: embeddings of a class that one step may write to the bank, so that it holds a
            variety of steps.

    Raises:
        ValueError: a bank together with within_scan, or enqueue_per_class below 1.

    Example:
        >>> contrast = VoxelSupConLoss(SupConLoss(), VoxelSampler(max_samples=64), nn.Linear(8, 4))
        >>> contrast(torch.rand(2, 8, 6, 6, 6), torch.randint(0, 3, (2, 1, 6, 6, 6))).ndim
        0
    """

    def __init__(
        self,
        loss: SupConLoss,
        sampler: VoxelSampler,
        projection: nn.Module | None = None,
        *,
        bank: MemoryBank | None = None,
        within_scan: bool = False,
        gather: bool = True,
        enqueue_per_class: int = 64,
    ) -> None:
        super().__init__()
        if bank is not None and within_scan:
            raise ValueError("bank must be None with within_scan=True: its entries belong to other scans")
        check_number("enqueue_per_class", enqueue_per_class, 1, integer=True)
        self.loss = loss
        self.sampler = sampler
        self.projection = projection
        self.bank = bank
        self.within_scan = within_scan
        self.gather = gather
        self.enqueue_per_class = enqueue_per_class

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        pair_ids: Tensor | None = None,
        view_ids: Tensor | None = None,
        scan_ids: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            features: (B, F, *spatial), any spatial rank.
            labels: (B, 1, *spatial) class indices of any real dtype, or (B, C, *spatial) one-hot.
            pair_ids: (B, 1, *spatial) int64; voxels of one scan with equal ids are one physical voxel,
                negative: no partner. Needed for `positives="same_voxel"`, else ignored.
            view_ids: (B,) integers, the view that each batch element is. Needed for `keys="other_view"`.
            scan_ids: (B,) integers; elements with equal ids are views of one scan. None: pair_ids are
                unique over the batch. Needed for within_scan.
            logits: (B, C, *spatial), for a sampler that looks for voxels where the network is unsure.

        Returns:
            Scalar, float32; float64 for float64 embeddings.

        Raises:
            ValueError: shapes that do not fit, or ids that an option needs and that are missing.
        """
        y = self._labels(features, labels)
        scan_ids = self._per_element("scan_ids", scan_ids, y, self.within_scan)
        view_ids = self._per_element("view_ids", view_ids, y, self.loss.keys == "other_view")
        paired = self.loss.positives == "same_voxel"
        ids = self._global_ids(pair_ids, scan_ids, y) if paired else None

        sample = self.sampler(y, pair_ids=ids, logits=logits.detach() if logits is not None else None)
        where = torch.unravel_index(sample.indices, y.shape)
        with torch.autocast(features.device.type, enabled=False):
            index: tuple[Tensor | slice, ...] = (where[0], slice(None), *where[1:])
            rows = features[index]
            rows = rows.to(self._dtype(rows))
            z = self.projection(rows) if self.projection is not None else rows
        element, zeros = where[0], torch.zeros_like(where[0])
        label = y[where]
        pair = zeros
        if ids is not None:
            # Voxels without a partner (the sampler `all` takes them, too) must not find each other.
            pair = ids[where]
            pair = torch.where(pair >= 0, pair, -1 - torch.arange(len(pair), device=pair.device))
        view = view_ids[element] if view_ids is not None else zeros

        if self.within_scan and scan_ids is not None:
            total, weight = self._by_scan(z, label, pair, view, sample.anchors, scan_ids[element])
            return mean_over_ranks(total, weight) if self._spread else total / weight.clamp_min(1.0)
        anchors = sample.anchors
        if self._spread:
            # Ids count within a rank; those of different ranks must not meet.
            pair = torch.unique(pair, return_inverse=True)[1] + (torch.distributed.get_rank() << 40)
            z, columns, mine = gather_rows(z, torch.stack((label, pair, view), 1))
            label, pair, view = columns.unbind(1)
            anchors = torch.zeros_like(label, dtype=torch.bool)
            anchors[mine] = sample.anchors
        total, weight = self.loss.terms(
            z, label, pair_ids=pair, view_ids=view, bank=self.bank, anchors=anchors
        )
        loss = (
            mean_over_ranks(total, weight) if self._spread else total / torch.where(weight > 0, weight, 1.0)
        )
        if self.bank is not None and self.training:
            few = _evenly(label, self.enqueue_per_class)
            self.bank.enqueue(z[few], label[few])
        return loss

    @property
    def _spread(self) -> bool:
        return self.gather and world_size() > 1

    def _dtype(self, rows: Tensor) -> torch.dtype:
        """What the projection computes in; without one, at least float32."""
        parameters = self.projection.parameters() if self.projection is not None else ()
        own = next((p.dtype for p in parameters if p.is_floating_point()), None)
        return own or torch.promote_types(rows.dtype, torch.float32)

    def _by_scan(
        self, z: Tensor, label: Tensor, pair: Tensor, view: Tensor, anchors: Tensor, scan: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the scans' losses, and the number of scans that have one."""
        total = z[:0].sum()
        number = torch.zeros_like(total)
        for s in torch.unique(scan):
            i = scan == s
            part, weight = self.loss.terms(
                z[i], label[i], pair_ids=pair[i], view_ids=view[i], anchors=anchors[i]
            )
            total = total + part / torch.where(weight > 0, weight, 1.0)
            number = number + (weight > 0)
        return total, number

    def _labels(self, features: Tensor, labels: Tensor) -> Tensor:
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(
                f"features must be (B, F, *spatial) floating point, "
                f"got {tuple(features.shape)} {features.dtype}"
            )
        if labels.shape[:1] != features.shape[:1] or labels.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"labels must be (B, 1 or C, *spatial) like features {tuple(features.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        y = class_indices(labels)
        if self.loss.ignore_index is not None and self.loss.ignore_index != IGNORE_INDEX:
            y = y.masked_fill(y == self.loss.ignore_index, IGNORE_INDEX)
        return y

    @staticmethod
    def _per_element(name: str, ids: Tensor | None, y: Tensor, needed: bool) -> Tensor | None:
        if ids is None:
            if needed:
                raise ValueError(f"{name} must be given, (B,) integers, for this loss; got None")
            return None
        if ids.shape != y.shape[:1] or ids.is_floating_point():
            raise ValueError(f"{name} must be ({len(y)},) integers, got {tuple(ids.shape)} {ids.dtype}")
        return ids.to(y.device).long()

    @staticmethod
    def _global_ids(pair_ids: Tensor | None, scan_ids: Tensor | None, y: Tensor) -> Tensor:
        """(B, *spatial) ids that are unique over the batch, not only within a scan."""
        if pair_ids is None:
            raise ValueError(
                "pair_ids must be given, (B, 1, *spatial) int64, for positives='same_voxel'; got None"
            )
        if pair_ids.shape != (len(y), 1, *y.shape[1:]) or pair_ids.dtype != torch.int64:
            raise ValueError(
                f"pair_ids must be {(len(y), 1, *y.shape[1:])} int64, "
                f"got {tuple(pair_ids.shape)} {pair_ids.dtype}"
            )
        ids = pair_ids[:, 0]
        if scan_ids is None:
            return ids
        number = torch.unique(scan_ids, return_inverse=True)[1].view(-1, *[1] * (y.ndim - 1))
        return torch.where(ids >= 0, ids + number * (ids.max() + 1), -1)


def _evenly(labels: Tensor, per_class: int) -> Tensor:
    """Indices of at most `per_class` voxels of each class, evenly over the batch."""
    order = torch.argsort(labels, stable=True)
    _, place, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=labels.device) - first[place]
    n = counts[place]
    taken = torch.div(rank * per_class, n, rounding_mode="floor")
    before = torch.div((rank - 1) * per_class, n, rounding_mode="floor")
    return order[(taken != before) | (n <= per_class)]
