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
from medseg_supcon.losses.checks import Ids, check_ids, check_number
from medseg_supcon.losses.sampler import VoxelSampler
from medseg_supcon.losses.supcon import SupConLoss

IGNORE_INDEX = -1  # class index of a voxel that nobody labelled, or that is outside the scan (padding)
MAX_PAIR_ID = 1 << 40  # the scans' and the ranks' numbers are stored above it
Loss = Callable[..., Tensor]


class VoxelSupConLoss(nn.Module):
    """`SupConLoss` on voxels sampled from dense features.

    Unlabelled voxels (`IGNORE_INDEX`, and the loss's own `ignore_index`) are never sampled. Several ranks gather each
    other's keys, with gradient: every rank returns the loss of the concatenated batch, and DistributedDataParallel's
    mean of the gradients is that of one process. All views of a scan must be on one rank.

    Args:
        loss: the loss of the sampled voxels; "balanced" weights count the anchors of all ranks, or of each scan.
        sampler: which voxels; with `positives="same_voxel"` they are drawn together with their partners.
        projection: maps (S, F) features to (S, D) embeddings, in the dtype of its parameters; None: the features.
        bank: earlier embeddings as further keys; filled in training mode, after the loss is computed.
        within_scan: contrast the voxels of each scan among themselves, and take the mean over the scans that have
            an anchor, as the source article does. Not with a bank.
        gather: False: each rank contrasts its own voxels only.
        enqueue_per_class: embeddings of a class that one step may write to the bank.

    Example:
        >>> contrast = VoxelSupConLoss(SupConLoss(), VoxelSampler(max_samples=64), nn.Linear(8, 4))
        >>> contrast(torch.rand(2, 8, 6, 6, 6), torch.randint(0, 3, (2, 1, 6, 6, 6))).ndim
        0
    """

    def __init__(
        self, loss: SupConLoss, sampler: VoxelSampler, projection: nn.Module | None = None, *,
        bank: MemoryBank | None = None, within_scan: bool = False, gather: bool = True, enqueue_per_class: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        if bank is not None and within_scan:
            raise ValueError("bank must be None with within_scan=True: its entries belong to other scans")
        check_number("enqueue_per_class", enqueue_per_class, 1, integer=True)
        self.loss, self.sampler, self.projection, self.bank = loss, sampler, projection or nn.Identity(), bank
        self.within_scan, self.gather, self.enqueue_per_class = within_scan, gather, enqueue_per_class

    def forward(
        self, features: Tensor, labels: Tensor, *, pair_ids: Ids = None, view_ids: Ids = None, scan_ids: Ids = None,
        logits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of one batch, a scalar, float32 (float64 for float64 embeddings).

        Args:
            features: (B, F, *spatial), any spatial rank.
            labels: (B, 1, *spatial) class indices of any real dtype, or (B, C, *spatial) one-hot.
            pair_ids: (B, 1, *spatial) int64, for `same_voxel`; voxels of one scan with equal ids are one physical
                voxel, negative: no partner.
            view_ids: (B,) integers, the view that each batch element is, for `other_view`.
            scan_ids: (B,) integers, for within_scan; elements with equal ids are views of one scan, and pair_ids
                count within it, below 2^40. None: pair_ids are unique over the batch.
            logits: (B, C, *spatial), for a sampler that looks for voxels where the network is unsure.
        """
        y = self._labels(features, labels)
        each, by_voxel, by_view = y.shape[:1], self.loss.positives == "same_voxel", self.loss.keys == "other_view"
        if self.within_scan or scan_ids is not None:
            scan_ids = check_ids("scan_ids", scan_ids, each, y.device, "within_scan=True")
        view_ids = check_ids("view_ids", view_ids, each, y.device, "keys='other_view'") if by_view else None
        if by_voxel:
            shape = (len(y), 1, *y.shape[1:])
            pair_ids = check_ids("pair_ids", pair_ids, shape, y.device, "positives='same_voxel'")[:, 0]
            pair_ids = pair_ids if scan_ids is None else _unique(pair_ids, scan_ids)
        pair_ids = pair_ids if by_voxel else None
        indices, anchors = self.sampler(y, pair_ids=pair_ids, logits=None if logits is None else logits.detach())
        where = torch.unravel_index(indices, y.shape)
        element, label = where[0], y[where]
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            dtype = next((p.dtype for p in self.projection.parameters() if p.is_floating_point()), wide)
            index: tuple[Tensor | slice, ...] = (where[0], slice(None), *where[1:])  # movedim would copy the gradient
            z = self.projection(features[index].to(dtype))
        view = element if view_ids is None else view_ids[element]
        pair = element if pair_ids is None else pair_ids[where]
        if pair_ids is not None:  # voxels without a partner, which `all` takes, too, must not find each other
            pair = torch.where(pair >= 0, pair, -1 - torch.arange(len(pair), device=y.device))
        ranks = dist.get_world_size() if self.gather and dist.is_available() and dist.is_initialized() else 1
        if scan_ids is not None and self.within_scan:
            total = z[:0].sum()
            weight = torch.zeros_like(total)  # the number of scans that have a loss
            for scan in torch.unique(scan_ids[element]):
                i = scan_ids[element] == scan
                part, w = self.loss.terms(z[i], label[i], pair[i], view[i], None, anchors[i])
                total, weight = total + part / torch.where(w > 0, w, 1.0), weight + (w > 0)
            return _mean_over_ranks(total, weight, ranks)
        ours = None
        if ranks > 1:
            sizes, rank = torch.zeros(ranks, dtype=torch.long, device=z.device), dist.get_rank()
            sizes[rank] = len(z)
            dist.all_reduce(sizes)
            ours = torch.arange(ranks, device=z.device).repeat_interleave(sizes) == rank
            # Ids count within a rank; those of different ranks must not meet.
            pair = torch.unique(pair, return_inverse=True)[1] + rank * MAX_PAIR_ID
            columns = torch.stack((label, pair, view, anchors.long()), 1)
            z, columns = (_Gather.apply(rows, sizes.tolist(), ours) for rows in (z, columns))  # type: ignore[no-untyped-call]
            label, pair, view, anchors = columns.unbind(1)
            anchors = anchors.bool()
        total, weight = self.loss.terms(z, label, pair, view, self.bank, anchors, ours)
        if self.bank is not None and self.training:
            few = _evenly(label, self.enqueue_per_class)
            self.bank.enqueue(z[few], label[few])
        return _mean_over_ranks(total, weight, ranks)

    def _labels(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, *spatial) int64 class indices, `IGNORE_INDEX` if nobody labelled the voxel or the loss ignores it."""
        shape, got = tuple(features.shape), tuple(labels.shape)
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(f"features must be (B, F, *spatial) floating point, got {shape} {features.dtype}")
        if got[:1] != shape[:1] or got[2:] != shape[2:] or got[1] == 0:
            raise ValueError(f"labels must be (B, 1 or C, *spatial) like features {shape}, got {got}")
        y = labels[:, 0].long()
        if got[1] != 1:
            one_hot = labels > 0.5
            y = one_hot.to(torch.uint8).argmax(1).masked_fill_(~one_hot.any(1), IGNORE_INDEX)
        elif labels.is_floating_point() and bool((wrong := y != labels[:, 0]).any()):
            value = labels[:, 0][wrong][0].item()
            raise ValueError(f"labels must be whole numbers (class indices), got {value} (interpolated linearly?)")
        ignored = self.loss.ignore_index
        return y if ignored is None else y.masked_fill(y == ignored, IGNORE_INDEX)


class DiceSupConLoss(nn.Module):
    """segmentation_loss + w(t) * contrastive_loss, where w(t) = weight * min(1, t / warmup_steps) in step t = 1, 2, ...

    A step is a forward pass in training mode. The first w is above 0, so that every parameter has a gradient, as DDP
    needs. `terms` has the last call's detached scalars, and the buffer `step` the steps so far.

    Args:
        segmentation_loss: called with (logits, labels), such as MONAI's DiceCELoss.
        contrastive_loss: called with (features, labels) and pair_ids, view_ids, scan_ids, logits: `VoxelSupConLoss`.
        weight: final weight of the contrast, >= 0. At 0 the contrast is not computed.
        warmup_steps: steps until w is `weight`, >= 0; 0: from the first step on.

    Example:
        >>> dice, contrast = (lambda logits, labels: logits.mean()), (lambda f, labels, **ids: f.sum())
        >>> both = DiceSupConLoss(dice, contrast, weight=0.5, warmup_steps=2)
        >>> [both(torch.ones(2), torch.ones(2), torch.ones(4)).item() for _ in range(3)]
        [2.0, 3.0, 3.0]
    """

    def __init__(
        self, segmentation_loss: Loss, contrastive_loss: Loss, weight: float = 0.1, warmup_steps: int = 0
    ) -> None:
        super().__init__()
        check_number("weight", weight, 0)
        check_number("warmup_steps", warmup_steps, 0, integer=True)
        self.segmentation_loss, self.contrastive_loss = segmentation_loss, contrastive_loss
        self.weight, self.warmup_steps = float(weight), warmup_steps
        self.step = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.terms: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, labels: Tensor, features: Tensor | None = None, **ids: Ids) -> Tensor:
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
            self.step.add_(1)
        terms = {"loss": loss, "segmentation": segmentation, "contrastive": contrastive, "contrast_weight": weight}
        self.terms = {name: term.detach() for name, term in terms.items()}
        return loss


def _unique(pair_ids: Tensor, scan_ids: Tensor) -> Tensor:
    """(B, *spatial) ids that are unique over the batch, not only within a scan."""
    most = int(pair_ids.max())
    if most >= MAX_PAIR_ID:
        raise ValueError(f"pair_ids must be below 2**40 for ids of several scans, got {most}")
    number = torch.unique(scan_ids, return_inverse=True)[1].view(-1, *[1] * (pair_ids.ndim - 1))
    return torch.where(pair_ids >= 0, pair_ids + number * (most + 1), -1)


def _evenly(labels: Tensor, per_class: int) -> Tensor:
    """Indices of at most `per_class` voxels of each class, evenly over the batch."""
    of_class = [(labels == c).nonzero()[:, 0] for c in torch.unique(labels)]
    steps = [torch.arange(min(len(i), per_class), device=i.device) for i in of_class]
    return torch.cat([labels[:0], *(i[k * len(i) // len(k)] for i, k in zip(of_class, steps, strict=True))])


def _mean_over_ranks(total: Tensor, weight: Tensor, ranks: int) -> Tensor:
    """Sum of total / sum of weight over R ranks, with R times this rank's share of the gradient: DDP takes the mean."""
    if ranks == 1:
        return total / torch.where(weight > 0, weight, 1.0)
    sums = torch.stack((total.detach(), weight.detach()))
    dist.all_reduce(sums)
    weight = torch.where(sums[1] > 0, sums[1], 1.0)
    share = ranks * (total / weight)
    return sums[0] / weight + (share - share.detach())


class _Gather(torch.autograd.Function):
    """Rows (S, K) of every rank, in the order of the ranks; S may differ and be 0. Backward communicates, too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], ours: Tensor) -> Tensor:
        ctx.save_for_backward(ours)
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
