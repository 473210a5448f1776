"""Two gloo processes against one process that holds the whole batch.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg_supcon.losses import MemoryBank, SupConLoss, VoxelSampler, VoxelSupConLoss

VOXEL = {"positives": "same_voxel", "keys": "other_view"}
CASES = {
    "same_class": ({}, {}),
    "weighted": ({"class_weights": [1.0, 2.0, 0.5], "temperature": 0.01}, {}),
    "balanced": ({"class_weights": "balanced"}, {}),
    "balanced article": (
        {**VOXEL, "denominator": "same_class", "class_weights": "balanced"},
        {"within_scan": True},
    ),
    "balanced background": ({"class_weights": "balanced"}, {"background": "negatives_only", "bank": True}),
    "other_class": ({"denominator": "other_class"}, {}),
    "euclidean": ({"similarity": "euclidean"}, {}),
    "same_voxel": (VOXEL, {}),
    "article": ({**VOXEL, "denominator": "same_class"}, {"within_scan": True}),
    "bank": ({}, {"bank": True}),
}


def elements(split: str) -> list[dict[str, torch.Tensor]]:
    """The batch of each rank: (2, 4, 3, 3) features, labels and ids."""
    ranks = []
    for rank in range(2):
        g = torch.Generator().manual_seed(rank)
        labels = torch.randint(-1, 3, (2, 1, 3, 3), generator=g)
        if rank == 1 and split == "uneven":
            labels[:, :, 1:] = -1
        if rank == 1 and split == "none":
            labels[:] = -1
        pairs = torch.arange(9).view(1, 1, 3, 3).repeat(2, 1, 1, 1)  # the same ids on both ranks
        pairs[:, :, 0, 0] = -1
        ranks.append(
            {
                "features": torch.randn(2, 4, 3, 3, generator=g, dtype=torch.float64),
                "labels": labels,
                "pair_ids": pairs,
                "view_ids": torch.tensor([0, 1]),
                "scan_ids": torch.tensor([5, 5]),
            }
        )
    return ranks


def make(case: str) -> VoxelSupConLoss:
    options, more = CASES[case]
    torch.manual_seed(0)
    projection = nn.Linear(4, 3).double()
    bank = MemoryBank(3, 3, 4).double() if more.get("bank") else None
    sampler = VoxelSampler("all", background=more.get("background", "anchor"))
    within_scan = bool(more.get("within_scan"))
    return VoxelSupConLoss(
        SupConLoss(**{"temperature": 0.1, **options}), sampler, projection, bank=bank, within_scan=within_scan
    )


def two_steps(module: nn.Module, inner: VoxelSupConLoss, batch: dict[str, torch.Tensor]) -> dict[str, object]:
    """Two steps (the second sees the bank): values and the projection's gradients."""
    values = []
    for _ in range(2):
        value = module(**batch)
        value.backward()
        values.append(value.detach())
    return {
        "values": values,
        "gradients": [p.grad for p in inner.projection.parameters()],
        "bank": list(inner.bank.entries()) if inner.bank is not None else [],
    }


def rank_main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for split in ("uneven", "none"):
        for case in CASES:
            inner = make(case)
            results[split, case] = two_steps(DistributedDataParallel(inner), inner, elements(split)[rank])
    torch.save(results, out)
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, str(Path(__file__))]
    processes = [
        subprocess.Popen([*command, str(r), str(folder / "store"), str(outs[r])], stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(out, weights_only=False) for out in outs]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ("uneven", "none"))
def test_two_ranks_equal_one_process(ranks, split, case):
    parts = elements(split)
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    whole["scan_ids"] = torch.tensor([0, 0, 1, 1])
    inner = make(case)
    expected = two_steps(inner, inner, whole)
    assert expected["values"][0] != 0
    for rank in ranks:
        torch.testing.assert_close(rank[split, case], expected, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
