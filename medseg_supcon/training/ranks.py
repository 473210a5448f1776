"""Voxels for the contrast, drawn over the scans of all ranks as one process draws them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from monai.transforms import MapTransform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX, VoxelSample, VoxelSampler

FILLER = "filler"
PATIENCE = timedelta(minutes=30)  # a rank may validate longer than another
SOON = timedelta(minutes=5)  # where all should arrive together: one may write a file meanwhile, no more


def rank() -> int:
    """This process's number, 0 .. K-1; 0 without torchrun. Rank 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number K of processes, over all machines; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ranks_here() -> int:
    """Number of processes on this machine, which share its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_device() -> torch.device:
    """This process's own GPU, or the CPU where there is none.

    Raises:
        ConfigError: torchrun started more processes than this machine has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= gpus:
        raise ConfigError(
            f"torchrun started {ranks_here()} processes here, but torch finds {gpus} GPU(s). Use "
            f"--nproc_per_node {gpus}, or --nproc_per_node gpu."
        )
    return torch.device("cuda", here)


def join_ranks(device: str | torch.device) -> None:
    """Meet the other processes that torchrun started (NCCL on GPUs, gloo on CPUs); without torchrun, stay alone."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    if dist.get_rank() > 0:
        logging.disable(logging.INFO)  # rank 0 tells it


def leave_ranks() -> None:
    """End what :func:`join_ranks` began."""
    if dist.is_available() and dist.is_initialized():
        meet()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


def meet(patience: timedelta = SOON) -> None:
    """All ranks wait here for one another; for a rank that died no longer than ``patience``.

    Raises:
        RuntimeError: a rank has not come; gloo says which.
    """
    if dist.get_backend() == "gloo":
        dist.monitored_barrier(timeout=patience)
    elif (work := dist.barrier(async_op=True)) is not None:
        work.wait(patience)


def batch_share(batch_size: int) -> int:
    """Scans per step on each rank, of ``batch_size`` scans over all of them.

    Raises:
        ConfigError: the ranks cannot have the same number.
    """
    ranks = world_size()
    if batch_size % ranks:
        raise ConfigError(
            f"batch_size = {batch_size} scans per step cannot be shared out evenly among {ranks} processes. "
            f"Use a multiple of {ranks}, for instance --batch_size {ranks * -(-batch_size // ranks)}."
        )
    return batch_size // ranks


def distributed(module: nn.Module, device: str | torch.device) -> nn.Module:
    """The module under ``DistributedDataParallel``, or itself: in one process, or with nothing to learn.

    Wrap where the trainer calls it and nowhere else, so that checkpoints hold the module's own names. Norms over
    the batch become synchronised ones, on GPUs.
    """
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    if torch.device(device).type == "cuda":
        # in place, all but a module that is a norm itself
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # unused parameters: a projection head at contrast_weight 0, frozen stages, deep-supervision heads
    return DistributedDataParallel(module, find_unused_parameters=True)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over the ranks, with K times the gradient of this rank's part, which DDP's averaging takes back.

    A loss made of such sums is the loss of the whole batch on every rank, and so is its gradient.
    """
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + world_size() * (x - x.detach())


def on_any_rank(flag: bool, device: str | torch.device | None = None) -> bool:
    """Whether the flag is set on a rank: what all of them act upon alike. Every rank must call it."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each value's mean over the ranks; every rank must bring the same names in the same order."""
    if world_size() == 1 or not values:
        return dict(values)
    mean = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(mean)
    return dict(zip(values, mean / world_size(), strict=True))


def rank_share(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every K-th case, beginning with this rank's: no case twice, and shares may differ by one.

    A rank without a case gets the first one as a filler (see :class:`BlankFillerd`), since metrics are gathered
    from all ranks.
    """
    share = list(items[rank() :: world_size()])
    return share or [{**item, FILLER: True} for item in items[:1]]


class BlankFillerd(MapTransform):  # type: ignore[misc]
    """Marks every voxel of a filler's label map as not annotated, so that metrics leave the case out.

    Example:
        >>> BlankFillerd("label")({"label": torch.ones(2), "filler": True})["label"]
        tensor([-1., -1.])
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The case with a blank label map if it is a filler, else as it is."""
        case = dict(data)
        if case.pop(FILLER, False):
            for key in self.keys:
                case[key] = torch.full_like(case[key], IGNORE_INDEX)
        return case


class RankSampler(VoxelSampler):
    """A ``VoxelSampler`` whose ``max_samples`` and classes are those of the batch over all ranks.

    Every rank looks at the label maps of all of them, draws the same voxels (rank 0's random state decides) and
    keeps its own. K ranks thus contrast the voxels that one process with the whole batch would. All ranks must
    have batches of one shape. Arguments as for ``VoxelSampler``; in one process it is one.
    """

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        *,
        pair_ids: Tensor | None = None,
        logits: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VoxelSample:
        """This rank's voxels; arguments as for ``VoxelSampler``."""
        if world_size() == 1:
            return super().__call__(labels, pair_ids=pair_ids, logits=logits, generator=generator)
        if pair_ids is not None:
            # ids count within a rank; those of different ranks must not meet
            pair_ids = torch.where(pair_ids >= 0, pair_ids + (rank() << 40), pair_ids)
        everyones = _of_all(labels.to(torch.int32)).to(labels.dtype)  # NCCL knows no int16
        drawn = super().__call__(
            everyones,
            pair_ids=None if pair_ids is None else _of_all(pair_ids),
            logits=None if logits is None or self.strategy != "hard" else _of_all(logits),
            generator=generator or self.generator or _of_rank_0(labels.device),
        )
        first = rank() * labels.numel()
        mine = (drawn.indices >= first) & (drawn.indices < first + labels.numel())
        return VoxelSample(drawn.indices[mine] - first, drawn.anchors[mine])


def _of_all(x: Tensor) -> Tensor:
    """(B, ...) of every rank as (K B, ...)."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _of_rank_0(device: torch.device) -> torch.Generator:
    """A CPU generator in the state of rank 0's global one."""
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, src=0)
    generator = torch.Generator()
    generator.set_state(state.cpu())
    return generator
