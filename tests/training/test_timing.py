"""How long a step takes: what the loader workers do while a GPU works, and what is left behind."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training import seconds_per_step, time_training, time_within_memory
from medseg_supcon.training import speed as _timing


def test_workers_load_beside_the_computation() -> None:
    assert seconds_per_step([1.0, 9.0, 2.0], [0.5, 0.5, 0.5], workers=0) == 2.5  # one after the other
    assert seconds_per_step([1.6, 9.0, 1.6], [0.5, 0.5, 0.5], workers=16) == 0.5  # the GPU is the slower one
    assert seconds_per_step([4.0, 9.0, 2.0], [0.5, 0.5, 0.5], workers=2) == 2.0  # the workers are


def networks_alive() -> int:
    # type(), since some objects import things when they are asked for their class
    return sum(issubclass(type(thing), ContrastiveNetwork) for thing in gc.get_objects())


def test_nothing_of_the_measurement_stays_in_memory(trained_run: Path) -> None:
    """On a GPU it would take memory from the training, or from the workers of a comparison."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.disable()  # it might come by itself
    try:
        before = networks_alive()
        timing = time_training(trained_run, "cpu")
        assert networks_alive() == before
    finally:
        gc.enable()
    assert timing["seconds_per_step"] > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("guess", "fits", "ends"), [(8, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, None), (7, 2, 2), (3, 1, None)]
)
def test_a_gpu_too_small_for_the_plans_guess(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guess: int, fits: int, ends: int | None
) -> None:
    """The batch is halved, here and on disk, down to two scans; then, and where somebody chose it, the error passes."""
    file = tmp_path / "configs" / "plan.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"batch_size": guess}))

    def measure(run: Path, device: str | None) -> dict[str, Any]:
        if json.loads(file.read_text())["batch_size"] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"machine": "a GPU"}

    monkeypatch.setattr(_timing, "time_training", measure)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 << 30, 8 << 30))  # 1 GiB: of the screen
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    plan = {"batch_size": guess}
    if ends is None:
        with pytest.raises(torch.OutOfMemoryError):
            time_within_memory(tmp_path, "cuda", plan, fixed=False)
        return
    assert time_within_memory(tmp_path, "cuda", plan, fixed=False) == {"machine": "a GPU"}
    assert plan["batch_size"] == ends == json.loads(file.read_text())["batch_size"]
    if fits < guess:
        file.write_text(json.dumps({"batch_size": guess}))
        with pytest.raises(torch.OutOfMemoryError):
            time_within_memory(tmp_path, "cuda", {"batch_size": guess}, fixed=True)


def test_a_gpu_that_others_use_changes_no_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Halving the batch because of what another program holds would make the plan depend on it."""

    def measure(run: Path, device: str | None) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_timing, "time_training", measure)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 30)  # and others hold 10 GiB
    plan = {"batch_size": 8}
    with pytest.raises(torch.OutOfMemoryError):
        time_within_memory(tmp_path, "cuda", plan, fixed=False)
    assert plan == {"batch_size": 8} and not list(tmp_path.iterdir())
