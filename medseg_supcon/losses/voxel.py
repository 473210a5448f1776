"""The losses of a training step on dense features: contrast of sampled voxels over all ranks, and Dice beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medseg_supcon.losses.bank import MemoryBank
from medseg_supcon.losses.checks import check_number
from medseg_supcon.losses.sampler import VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss

IGNORE_INDEX = -1
"""Class index of a voxel that nobody labelled, or that is outside the scan (padding)."""
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
            z = self._project(features.movedim(1, -1)[where])
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
        """(B, *spatial) int64 class indices, `IGNORE_INDEX` if nobody labelled the voxel or the loss ignores it."""
        shape, got = tuple(features.shape), tuple(labels.shape)
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(f"features must be (B, F, *spatial) floating point, got {shape} {features.dtype}")
        if got[:1] != shape[:1] or got[2:] != shape[2:] or got[1] == 0:
            raise ValueError(f"labels must be (B, 1 or C, *spatial) like features {shape}, got shape {got}")
        y = labels[:, 0].long()
        if got[1] != 1:
            one_hot = labels > 0.5
            y = one_hot.to(torch.uint8).argmax(1).masked_fill_(~one_hot.any(1), IGNORE_INDEX)
        elif labels.is_floating_point() and bool((wrong := y != labels[:, 0]).any()):
            value = labels[:, 0][wrong][0].item()
            raise ValueError(
                f"labels must be whole numbers (class indices), got {value}; were they interpolated linearly?"
            )
        ignored = self.loss.ignore_index
        return y if ignored is None else y.masked_fill(y == ignored, IGNORE_INDEX)


class DiceSupConLoss(nn.Module):
    """segmentation_loss + w(step) * contrastive_loss, with a linear warm-up of w.

    Step t = 1, 2, ... (one for each forward pass in training mode) has w = weight * min(1, t / warmup_steps). The
    first is above 0, so every parameter has a gradient from the start, as DDP needs.

    Args:
        segmentation_loss: called with (logits, labels): MONAI's DiceCELoss, say.
        contrastive_loss: called with (features, labels) and pair_ids, view_ids, scan_ids, logits: a
            `VoxelSupConLoss`. Its projection's parameters are parameters of this module.
        weight: final weight of the contrast, >= 0. At 0 the contrast is not computed.
        warmup_steps: steps until w is `weight`; 0: from the first step on.

    Attributes:
        terms: the last call's detached scalars: "loss", "segmentation", "contrastive", "contrast_weight".
        step: steps so far, a buffer, so checkpoints contain it.

    Raises:
        ValueError, TypeError: weight is not a finite number >= 0, or warmup_steps not an integer >= 0.

    Example:
        >>> dice, contrast = (lambda logits, labels: logits.mean()), (lambda f, labels, **ids: f.sum())
        >>> both = DiceSupConLoss(dice, contrast, weight=0.5, warmup_steps=2)
        >>> [both(torch.ones(2), torch.ones(2), torch.ones(4)).item() for _ in range(3)]
        [2.0, 3.0, 3.0]
    """

    step: Tensor

    def __init__(
        self,
        segmentation_loss: Callable[..., Tensor],
        contrastive_loss: Callable[..., Tensor],
        weight: float = 0.1,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_number("weight", weight, 0)
        check_number("warmup_steps", warmup_steps, 0, integer=True)
        self.segmentation_loss, self.contrastive_loss = segmentation_loss, contrastive_loss
        self.weight, self.warmup_steps = float(weight), warmup_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.terms: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, labels: Tensor, features: Tensor | None = None, **ids: Tensor | None) -> Tensor:
        """The weighted sum, a scalar, of logits (B, C, *spatial), labels (B, 1, *spatial), features (B, F, *spatial).

        Features may be None if weight is 0; `ids` are pair_ids, view_ids, scan_ids as for `VoxelSupConLoss`.
        """
        loss = segmentation = self.segmentation_loss(logits, labels)
        dtype = torch.promote_types(segmentation.dtype, torch.float32)
        weight = torch.full((), self.weight, device=segmentation.device, dtype=dtype)
        if self.warmup_steps > 0:
            weight = weight * ((self.step + 1) / self.warmup_steps).clamp(max=1.0).to(weight)
        contrastive = torch.zeros_like(weight)
        if self.weight > 0:
            if features is None:
                raise ValueError(f"features must be given if weight > 0 (weight={self.weight}), got None")
            contrastive = self.contrastive_loss(features, labels, **ids, logits=logits.detach())
            loss = segmentation + weight * contrastive
        if self.training:
            self.step += 1
        terms = {"loss": loss, "segmentation": segmentation, "contrastive": contrastive}
        self.terms = {name: term.detach() for name, term in terms.items()} | {"contrast_weight": weight}
        return loss


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
    gathered, all_ids = (_Gather.apply(x, sizes, mine) for x in (rows, ids))  # type: ignore[no-untyped-call]
    return gathered, all_ids, mine


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], mine: Tensor) -> Tensor:
        ctx.save_for_backward(mine)
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))  # the backends want one size
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.saved_tensors[0]], None, None
