"""The contrastive loss on dense features: sample, project what was sampled, contrast, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medseg_supcon.losses.bank import MemoryBank
from medseg_supcon.losses.checks import check_number
from medseg_supcon.losses.labels import IGNORE_INDEX, class_indices
from medseg_supcon.losses.sampler import VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss

MAX_PAIR_ID = 1 << 40  # the scans' and the ranks' numbers are stored above it


class VoxelSupConLoss(nn.Module):
    """`SupConLoss` on voxels sampled from dense features.

    Only the sampled voxels are projected, in float32 or the dtype of the projection's parameters. Unlabelled voxels
    (`IGNORE_INDEX`, and the loss's own `ignore_index`) are never sampled. The loss's `class_weights="balanced"`
    counts the sampled anchors of all ranks (with `within_scan`, of each scan).

    Under torch.distributed with several ranks the keys of all ranks are gathered, with gradient. Every rank returns
    the loss of the concatenated batch, and after DistributedDataParallel's averaging the gradients are those of one
    process; a rank without a labelled voxel takes part. All views of a scan must be on one rank.

    Args:
        loss: the loss of the sampled voxels.
        sampler: which voxels; with `positives="same_voxel"` they are drawn together with their partners.
        projection: maps (S, F) features to (S, D) embeddings; None: the features themselves.
        bank: earlier embeddings as further keys; filled in training mode, after the loss is computed.
        within_scan: contrast the voxels of each scan among themselves, and take the mean over the scans that have
            an anchor, as the source article does. Not with a bank.
        gather: False: each rank contrasts its own voxels only.
        enqueue_per_class: embeddings of a class that one step may write to the bank, so that it holds a variety of
            steps.

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
        """The loss of one batch, a scalar, float32 (float64 for float64 embeddings).

        Args:
            features: (B, F, *spatial), any spatial rank.
            labels: (B, 1, *spatial) class indices of any real dtype, or (B, C, *spatial) one-hot.
            pair_ids: (B, 1, *spatial) int64; voxels of one scan with equal ids are one physical voxel, negative: no
                partner. Needed for `positives="same_voxel"`, else ignored.
            view_ids: (B,) integers, the view that each batch element is. Needed for `keys="other_view"`.
            scan_ids: (B,) integers; elements with equal ids are views of one scan, and pair_ids count within it,
                below 2^40. None: pair_ids are unique over the batch. Needed for within_scan.
            logits: (B, C, *spatial), for a sampler that looks for voxels where the network is unsure.

        Raises:
            ValueError: shapes that do not fit, or ids that an option needs and that are missing.
        """
        y = self._labels(features, labels)
        scan_ids = _per_element("scan_ids", scan_ids, y, self.within_scan)
        view_ids = _per_element("view_ids", view_ids, y, self.loss.keys == "other_view")
        ids = _unique_ids(pair_ids, scan_ids, y) if self.loss.positives == "same_voxel" else None
        sample = self.sampler(y, pair_ids=ids, logits=logits.detach() if logits is not None else None)
        where = torch.unravel_index(sample.indices, y.shape)
        element, label, anchors = where[0], y[where], sample.anchors
        with torch.autocast(features.device.type, enabled=False):
            index: tuple[Tensor | slice, ...] = (element, slice(None), *where[1:])
            z = self._project(features[index])
        pair = view = torch.zeros_like(element)
        if ids is not None:
            # Voxels without a partner (the sampler `all` takes them, too) must not find each other.
            pair = torch.where(ids[where] >= 0, ids[where], -1 - torch.arange(len(pair), device=y.device))
        if view_ids is not None:
            view = view_ids[element]

        ranks = dist.get_world_size() if self.gather and dist.is_available() and dist.is_initialized() else 1
        if scan_ids is not None and self.within_scan:
            # Sum of the scans' losses, and the number of scans that have one.
            total = z[:0].sum()
            weight = torch.zeros_like(total)
            for scan in torch.unique(scan_ids[element]):
                i = scan_ids[element] == scan
                part, w = self.loss.terms(z[i], label[i], pair[i], view[i], None, anchors[i])
                total, weight = total + part / torch.where(w > 0, w, 1.0), weight + (w > 0)
            return _mean_over_ranks(total, weight, ranks)
        share = None
        if ranks > 1:
            # Ids count within a rank; those of different ranks must not meet.
            pair = torch.unique(pair, return_inverse=True)[1] + dist.get_rank() * MAX_PAIR_ID
            z, columns, share = _gather_rows(z, torch.stack((label, pair, view, anchors.long()), 1))
            label, pair, view, anchors = columns.unbind(1)
            anchors = anchors.bool()
        total, weight = self.loss.terms(z, label, pair, view, self.bank, anchors, share)
        if self.bank is not None and self.training:
            few = _evenly(label, self.enqueue_per_class)
            self.bank.enqueue(z[few], label[few])
        return _mean_over_ranks(total, weight, ranks)

    def _project(self, rows: Tensor) -> Tensor:
        """Embeddings of the rows, in the dtype of the projection; without one, at least in float32."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        if self.projection is None:
            return rows.to(wide)
        dtypes = (p.dtype for p in self.projection.parameters() if p.is_floating_point())
        embeddings: Tensor = self.projection(rows.to(next(dtypes, wide)))
        return embeddings

    def _labels(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, *spatial) class indices, `IGNORE_INDEX` where the loss ignores them."""
        shape = tuple(features.shape)
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(f"features must be (B, F, *spatial) floating point, got {shape} {features.dtype}")
        if labels.shape[:1] != features.shape[:1] or labels.shape[2:] != features.shape[2:]:
            got = tuple(labels.shape)
            raise ValueError(f"labels must be (B, 1 or C, *spatial) like features {shape}, got {got}")
        y = class_indices(labels)
        ignored = self.loss.ignore_index
        return y if ignored is None else y.masked_fill(y == ignored, IGNORE_INDEX)


def _per_element(name: str, ids: Tensor | None, y: Tensor, needed: bool) -> Tensor | None:
    if ids is None and needed:
        raise ValueError(f"{name} must be given, (B,) integers, for this loss; got None")
    if ids is None:
        return None
    if ids.shape != y.shape[:1] or ids.is_floating_point():
        raise ValueError(f"{name} must be ({len(y)},) integers, got {tuple(ids.shape)} {ids.dtype}")
    return ids.to(y.device).long()


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
    of_class = [(labels == c).nonzero()[:, 0] for c in torch.unique(labels)]
    steps = [torch.arange(min(len(i), per_class), device=i.device) * len(i) for i in of_class]
    return torch.cat([i[step // max(len(step), 1)] for i, step in zip(of_class, steps, strict=True)] or [labels[:0]])


# DistributedDataParallel averages gradients over the R ranks. So each rank returns the loss of the concatenated batch
# and back-propagates R times its own share: the average is the gradient of one process that holds the whole batch.


def _mean_over_ranks(total: Tensor, weight: Tensor, ranks: int) -> Tensor:
    """sum over ranks of total / sum over ranks of weight, with this rank's share of the gradient times R."""
    if ranks == 1:
        return total / torch.where(weight > 0, weight, 1.0)
    sums = torch.stack((total.detach(), weight.detach()))
    dist.all_reduce(sums)
    weight = torch.where(sums[1] > 0, sums[1], 1.0)
    share = ranks * (total / weight)
    return sums[0] / weight + (share - share.detach())


def _gather_rows(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (S, D) and ids (S, K) of every rank, in the order of the ranks, and which rows are ours (bool).

    S may differ between ranks and be 0. Every rank must call it and use its result: backward communicates, too.
    """
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    mine = (owner == dist.get_rank()).to(rows.device)
    gathered: Tensor = _Gather.apply(rows, sizes, mine)  # type: ignore[no-untyped-call]
    return gathered, _all_gather(ids, sizes), mine


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], mine: Tensor) -> Tensor:
        ctx.save_for_backward(mine)
        return _all_gather(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.saved_tensors[0]], None, None


def _all_gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenation over ranks; padded to one size on the way, since the backends want that."""
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
