"""Rows of all ranks, with gradient, whatever number each rank has.

The convention is DistributedDataParallel's, which averages gradients over the ranks: each of the R ranks
returns the loss of the concatenated batch and back-propagates R times its own share, so that the average
over ranks is the gradient of one process that holds the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (S, D) and ids (S, K) of every rank, in the order of the ranks, and which rows are ours (bool).

    S may differ between ranks and be 0. Every rank must call it, and its result must enter every rank's loss:
    backward communicates, too.
    """
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(c) for c in counts]
    gathered: Tensor = _Gather.apply(rows, sizes)  # type: ignore[no-untyped-call]
    mine = torch.zeros(sum(sizes), dtype=torch.bool, device=rows.device)
    mine[_slice_of_rank(sizes)] = True
    return gathered, _all_gather(ids, sizes), mine


def mean_over_ranks(total: Tensor, weight: Tensor, ranks: int) -> Tensor:
    """sum over ranks of total / sum over ranks of weight, with this rank's share of the gradient times R."""
    if ranks == 1:
        return total / torch.where(weight > 0, weight, 1.0)
    sums = torch.stack((total.detach(), weight.detach()))
    dist.all_reduce(sums)
    weight = torch.where(sums[1] > 0, sums[1], 1.0)
    share = ranks * (total / weight)
    return sums[0] / weight + (share - share.detach())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather(rows, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[_slice_of_rank(ctx.sizes)], None


def _all_gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenation over ranks; padded to one size on the way, since the backends want that."""
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def _slice_of_rank(sizes: list[int]) -> slice:
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])
