"""The contrastive loss on dense features: sample, project what was sampled, contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_supcon.losses.bank import MemoryBank
from medseg_supcon.losses.checks import check_number
from medseg_supcon.losses.distributed import gather_rows, mean_over_ranks, world_size
from medseg_supcon.losses.labels import IGNORE_INDEX, class_indices
from medseg_supcon.losses.sampler import VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss

MAX_PAIR_ID = 1 << 40  # the scans' and the ranks' numbers are stored above it


class VoxelSupConLoss(nn.Module):
    """`SupConLoss` on voxels sampled from dense features.

    Only the sampled voxels are projected, in float32 or the dtype of the projection's parameters. Unlabelled
    voxels (`IGNORE_INDEX`, and the loss's own `ignore_index`) are never sampled. The loss's
    `class_weights="balanced"` counts the sampled anchors of all ranks (with `within_scan`, of each scan).

    Under torch.distributed with several ranks the keys of all ranks are gathered, with gradient. Every
    rank returns the loss of the concatenated batch, and after DistributedDataParallel's averaging the
    gradients are those of one process; a rank without a labelled voxel takes part. All views of a
    scan must be on one rank.

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
        self.loss, self.sampler, self.projection, self.bank = loss, sampler, projection, bank
        self.within_scan, self.gather, self.enqueue_per_class = within_scan, gather, enqueue_per_class

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
            scan_ids: (B,) integers; elements with equal ids are views of one scan, and pair_ids count within
                it, below 2^40. None: pair_ids are unique over the batch. Needed for within_scan.
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
        ids = self._unique_ids(pair_ids, scan_ids, y) if paired else None

        sample = self.sampler(y, pair_ids=ids, logits=logits.detach() if logits is not None else None)
        where = torch.unravel_index(sample.indices, y.shape)
        element, label, zeros = where[0], y[where], torch.zeros_like(where[0])
        with torch.autocast(features.device.type, enabled=False):
            index: tuple[Tensor | slice, ...] = (element, slice(None), *where[1:])
            z = self._project(features[index])
        pair = zeros
        if ids is not None:
            # Voxels without a partner (the sampler `all` takes them, too) must not find each other.
            pair = torch.where(ids[where] >= 0, ids[where], -1 - torch.arange(len(zeros), device=y.device))
        view = view_ids[element] if view_ids is not None else zeros

        if scan_ids is not None and self.within_scan:
            total, weight = self._by_scan(z, label, pair, view, sample.anchors, scan_ids[element])
            return mean_over_ranks(total, weight, self._ranks)
        anchors, share = sample.anchors, None
        if self._ranks > 1:
            # Ids count within a rank; those of different ranks must not meet.
            pair = torch.unique(pair, return_inverse=True)[1] + (torch.distributed.get_rank() << 40)
            z, columns, share = gather_rows(z, torch.stack((label, pair, view, anchors.long()), 1))
            label, pair, view, anchors = columns.unbind(1)
            anchors = anchors.bool()
        total, weight = self.loss.terms(
            z, label, pair_ids=pair, view_ids=view, bank=self.bank, anchors=anchors, share=share
        )
        if self.bank is not None and self.training:
            few = _evenly(label, self.enqueue_per_class)
            self.bank.enqueue(z[few], label[few])
        return mean_over_ranks(total, weight, self._ranks)

    @property
    def _ranks(self) -> int:
        return world_size() if self.gather else 1

    def _project(self, rows: Tensor) -> Tensor:
        """Embeddings of the rows, in the dtype of the projection; without one, at least in float32."""
        parameters = self.projection.parameters() if self.projection is not None else ()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
        rows = rows.to(dtype or torch.promote_types(rows.dtype, torch.float32))
        return self.projection(rows) if self.projection is not None else rows

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
        shape = tuple(features.shape)
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(
                f"features must be (B, F, *spatial) floating point, got {shape} {features.dtype}"
            )
        if labels.shape[:1] != features.shape[:1] or labels.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"labels must be (B, 1 or C, *spatial) like features {shape}, got {tuple(labels.shape)}"
            )
        y = class_indices(labels)
        ignored = self.loss.ignore_index
        return y if ignored is None else y.masked_fill(y == ignored, IGNORE_INDEX)

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
    def _unique_ids(pair_ids: Tensor | None, scan_ids: Tensor | None, y: Tensor) -> Tensor:
        """(B, *spatial) ids that are unique over the batch, not only within a scan."""
        shape = (len(y), 1, *y.shape[1:])
        if pair_ids is None or pair_ids.shape != shape or pair_ids.dtype != torch.int64:
            got = None if pair_ids is None else f"{tuple(pair_ids.shape)} {pair_ids.dtype}"
            raise ValueError(f"pair_ids must be {shape} int64 for positives='same_voxel', got {got}")
        ids = pair_ids[:, 0]
        if scan_ids is None or ids.numel() == 0:
            return ids
        if int(ids.max()) >= MAX_PAIR_ID:
            raise ValueError(f"pair_ids must be below 2**40 for ids of several scans, got {int(ids.max())}")
        number = torch.unique(scan_ids, return_inverse=True)[1].view(-1, *[1] * (y.ndim - 1))
        return torch.where(ids >= 0, ids + number * (ids.max() + 1), -1)


def _evenly(labels: Tensor, per_class: int) -> Tensor:
    """Indices of at most `per_class` voxels of each class, evenly over the batch."""
    order = torch.argsort(labels, stable=True)
    _, place, counts = torch.unique(labels[order], return_inverse=True, return_counts=True)
    n, first = counts[place], (counts.cumsum(0) - counts)[place]
    rank = (torch.arange(len(order), device=labels.device) - first) * per_class
    # whole steps of n that are passed on the way from one voxel to the next
    return order[(rank // n != (rank - per_class) // n) | (n <= per_class)]
