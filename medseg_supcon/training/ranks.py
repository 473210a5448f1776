"""Training by several processes (ranks): who they are, and losses and samples of the batch over all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.transforms import MapTransform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX, VoxelSample, VoxelSampler

FILLER = "filler"
PATIENCE = timedelta(minutes=30)  # one rank may validate longer than another
SOON = timedelta(minutes=5)  # for ranks that arrive together, while one of them may write a file


def ranks_here() -> int:
    """Number of processes on this machine, which share its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_device() -> torch.device:
    """This process's own GPU, or the CPU of a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= gpus:
        raise ConfigError(f"torchrun started {ranks_here()} processes for {gpus} GPU(s). Use --nproc_per_node gpu.")
    return torch.device("cuda", here)


def join_ranks(device: str | torch.device) -> None:
    """Join the other processes that torchrun started (NCCL on GPUs, gloo on CPUs); without torchrun, do nothing."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    job = os.environ.pop("SLURM_JOB_ID", None)  # ignite would overwrite torchrun's LOCAL_RANK with Slurm's
    idist.sync()
    if job is not None:
        os.environ["SLURM_JOB_ID"] = job
    if idist.get_rank() > 0:
        logging.disable(logging.INFO)  # rank 0 reports


def leave_ranks() -> None:
    """End what :func:`join_ranks` began."""
    if dist.is_initialized():
        meet()  # no rank leaves while another still talks to it
        idist.finalize()


def meet(patience: timedelta = SOON) -> None:
    """Wait for all ranks; RuntimeError if one does not arrive within ``patience`` (gloo says which)."""
    if idist.backend() == "gloo":
        dist.monitored_barrier(timeout=patience)
    elif (work := dist.barrier(async_op=True)) is not None:
        work.wait(patience)


def batch_share(batch_size: int) -> int:
    """Scans per step on each rank, for ``batch_size`` scans over all of them."""
    ranks: int = idist.get_world_size()
    if batch_size % ranks:
        raise ConfigError(
            f"batch_size = {batch_size} scans per step cannot be shared out evenly among {ranks} processes. "
            f"Use a multiple of {ranks}, for instance --batch_size {ranks * -(-batch_size // ranks)}."
        )
    return batch_size // ranks


def distributed(module: nn.Module, device: str | torch.device) -> nn.Module:
    """The module under ``DistributedDataParallel``, on GPUs with synchronised batch norms; unchanged in one process."""
    if idist.get_world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    if torch.device(device).type == "cuda":
        # in place, except for a module that is itself a norm
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # unused parameters: a projection head at contrast_weight 0, frozen stages, deep-supervision heads
    return DistributedDataParallel(module, find_unused_parameters=True)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over the K ranks, with K times the gradient of this rank's part, because DDP averages gradients."""
    if idist.get_world_size() == 1:
        return x
    total = torch.as_tensor(idist.all_reduce(x.detach().clone()))
    return total + int(idist.get_world_size()) * (x - x.detach())


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Every rank must call it."""
    return bool(idist.all_reduce(int(flag), op="MAX"))


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each value's mean over the ranks; every rank must bring the same names in the same order."""
    if idist.get_world_size() == 1 or not values:
        return dict(values)
    total: Any = idist.all_reduce(torch.stack([value.detach().double() for value in values.values()]))
    return dict(zip(values, total / idist.get_world_size(), strict=True))


def rank_share(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every K-th case, from this rank's; without one, the first as a filler, because metrics are gathered from all."""
    share = list(items[idist.get_rank() :: idist.get_world_size()])
    return share or [{**item, FILLER: True} for item in items[:1]]


class BlankFillerd(MapTransform):  # type: ignore[misc]
    """Marks every voxel of a filler's label map as not annotated, so that metrics leave the case out."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        case = dict(data)
        if case.pop(FILLER, False):
            for key in self.keys:
                case[key] = torch.full_like(case[key], IGNORE_INDEX)
        return case


class RankSampler(VoxelSampler):
    """A ``VoxelSampler`` over the batch of all ranks: all draw the same voxels, by rank 0's random state, and keep theirs."""

    @torch.no_grad()
    def __call__(
        self, labels: Tensor, *, pair_ids: Tensor | None = None, logits: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VoxelSample:  # fmt: skip
        if idist.get_world_size() == 1:
            return super().__call__(labels, pair_ids=pair_ids, logits=logits, generator=generator)
        rank = idist.get_rank()
        if pair_ids is not None:  # ids are unique within a rank only
            pair_ids = _of_all(torch.where(pair_ids >= 0, pair_ids + (rank << 40), pair_ids))
        logits = _of_all(logits) if logits is not None and self.strategy == "hard" else None
        generator = generator or self.generator
        if generator is None:  # a CPU generator in the state of rank 0's global one
            generator = torch.Generator()
            generator.set_state(torch.as_tensor(idist.broadcast(torch.get_rng_state(), src=0)).cpu())
        labels_of_all = _of_all(labels.to(torch.int32)).to(labels.dtype)  # NCCL knows no int16
        drawn = super().__call__(labels_of_all, pair_ids=pair_ids, logits=logits, generator=generator)
        first = rank * labels.numel()
        mine = (drawn.indices >= first) & (drawn.indices < first + labels.numel())
        return VoxelSample(drawn.indices[mine] - first, drawn.anchors[mine])


def _of_all(x: Tensor) -> Tensor:
    """(B, ...) of every rank, all of one shape, as (K B, ...)."""
    return torch.as_tensor(idist.all_gather(x.contiguous()))
