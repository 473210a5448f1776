"""Voxels for the contrast, drawn over the scans of all ranks as one process draws them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from medseg_supcon.losses import VoxelSample, VoxelSampler
from medseg_supcon.training._ranks import rank, world_size


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
