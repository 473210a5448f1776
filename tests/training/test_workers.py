"""How many processes load batches: cores, and room in the shared memory that they come through."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.bundle import ConfigParser

from medseg_supcon.training import batch_bytes, loader_workers

LARGE = {"patch_size": [128, 128, 128], "channels": ["MRI"]}


@pytest.mark.parametrize(
    ("cores", "gib", "batch_size", "workers"),
    [
        (4, 64, 2, 4),  # one a core
        (64, 64, 2, 16),
        (64, 16, 8, 6),  # 8 GiB for two batches of 640 MiB each
        (64, 1 / 16, 2, 0),  # a container's 64 MB hold not even one batch
    ],
)
def test_workers_have_cores_and_shared_memory(
    monkeypatch: pytest.MonkeyPatch, cores: int, gib: float, batch_size: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * 2**30))
    assert loader_workers("cuda:1", batch_size, LARGE) == workers
    assert loader_workers("cpu", batch_size, LARGE) == 0


def test_a_system_without_that_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", missing)
    assert loader_workers("cuda", 8, LARGE) == 16


def test_a_batch_is_as_large_as_it_is_taken_for(trained_run: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(trained_run / "configs" / "train.yaml"))
    parser.update({"bundle_root": str(trained_run)})
    item = parser.get_parsed_content("train::dataset")[1, 0, 0]
    found = sum(tensor.numel() * tensor.element_size() for tensor in item.values() if isinstance(tensor, torch.Tensor))
    assert batch_bytes(1, parser.get_parsed_content("plan")) == found
