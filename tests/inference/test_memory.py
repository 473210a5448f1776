"""Running out of memory: smaller batches give the same mask, and no other error is mistaken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import UNET, blobs, save_nifti

from medseg_supcon.inference import Predictor, with_less_memory


class Hungry(torch.nn.Module):
    """Fails on batches of more than `most` windows."""

    def __init__(self, network: torch.nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.network, self.most, self.error = network, most, error
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        if len(x) > self.most:
            raise self.error
        return torch.as_tensor(self.network(x))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_the_same_mask_from_less_memory(make_run: Callable[..., Path], tmp_path: Path, error: Exception) -> None:
    predictor = Predictor(make_run(network_def=UNET), device="cpu")
    path = save_nifti(tmp_path / "a.nii", blobs((20, 24, 18)))
    expected = predictor.predict(path)
    model = predictor.models[0]
    hungry = Hungry(model.network, 1, error)
    object.__setattr__(model, "network", hungry)
    prediction = predictor.predict(path)
    assert hungry.batches[0] == 2 and set(hungry.batches[1:]) == {1}
    assert (prediction.mask != expected.mask).sum() <= 2
    assert any("out of memory" in warning for warning in prediction.warnings)


def test_too_little_memory_for_one_window_is_a_sentence(make_run: Callable[..., Path], tmp_path: Path) -> None:
    predictor = Predictor(make_run(network_def=UNET), device="cpu")
    object.__setattr__(predictor.models[0], "network", Hungry(torch.nn.Identity(), 0, OUT_OF_MEMORY[0]))
    path = save_nifti(tmp_path / "a.nii", blobs((20, 24, 18)))
    manifest = predictor.run([path], tmp_path / "out")
    assert "not enough memory for this scan" in manifest["scans"][0]["error"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("out of memory")])
def test_other_errors_are_not_tried_again(make_run: Callable[..., Path], tmp_path: Path, error: Exception) -> None:
    predictor = Predictor(make_run(network_def=UNET), device="cpu")
    hungry = Hungry(predictor.models[0].network, 1, error)
    object.__setattr__(predictor.models[0], "network", hungry)
    with pytest.raises(type(error)):
        predictor.predict(save_nifti(tmp_path / "a.nii", blobs((20, 24, 18))))
    assert hungry.batches == [2]


def test_a_gpu_falls_back_to_stitching_elsewhere_then_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    warnings: list[str] = []
    seen: list[Any] = []

    def work(device: torch.device, buffers: torch.device, batch: int) -> str:
        seen.append((device.type, buffers.type, batch))
        if len(seen) < 4:
            raise OUT_OF_MEMORY[0]
        return "done"

    assert with_less_memory(work, torch.device("cuda"), 4, warnings) == "done"
    assert seen == [("cuda", "cuda", 4), ("cuda", "cpu", 4), ("cuda", "cpu", 1), ("cpu", "cpu", 1)]
    assert len(warnings) == 3


def test_no_more_than_a_patch_deep_of_all_classes_is_held(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty classes, a long scan: no tensor of all classes holds more than a patch's depth of it."""
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 20, "kernel_size": 1}
    labels = {f"label{i}": i for i in range(20)}
    predictor = Predictor(make_run(network_def=network, labels=labels, patch_size=[8, 8, 8]), device="cpu")
    path = save_nifti(tmp_path / "a.nii", blobs((64, 16, 16)), np.diag([1, 2, 1, 1.0]))
    largest, zeros = [0], torch.zeros

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        made = zeros(*arguments, **options)
        largest[0] = max(largest[0], made.numel())
        return made

    monkeypatch.setattr(torch, "zeros", counted)
    predictor.predict(path)
    assert largest[0] == 20 * 8 * 31 * 16  # classes x patch x the model's grid
