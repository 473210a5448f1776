"""A run appears whole or not at all, and none of the user's files are replaced or removed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny_run import TINY, TINY_NETWORK

from medseg_supcon.bundle import is_planned
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.training import extend_training, prepare_run
from medseg_supcon.training import prepare as _run
from medseg_supcon.training import speed as _speed


@pytest.fixture
def prepare(phantoms: Path, trained_run: Path) -> Any:
    """Plan a run with the plan of ``trained_run``."""
    dataset = read_dataset(phantoms)
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())

    def call(run: Path) -> dict[str, Any]:
        return prepare_run(dataset, split_cases(dataset), run, plan=plan, device="cpu")

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["configs/mine.txt", "docs/mine.txt", "LICENSE"])
def test_what_a_run_would_replace_is_refused_and_kept(prepare: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a person's own")
    with pytest.raises(RunError, match=f"contains {name.partition('/')[0]} that medseg did not write"):
        prepare(tmp_path)
    assert files(tmp_path) == {name: b"a person's own"}


@pytest.mark.parametrize("existed", [True, False])
def test_planning_that_breaks_off_leaves_the_folder_as_it_was(
    prepare: Any, tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    if existed:
        run.mkdir()
        (run / "notes.txt").write_text("a person's own")
    seen = []

    def stop(draft: Path) -> None:
        # whoever kills the process here leaves nothing that a later call would take for a plan
        seen.append(is_planned(run))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_run, "refresh_documents", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
    assert seen == [False] and run.exists() == existed
    if existed:
        assert files(run) == {"notes.txt": b"a person's own"}


def test_what_a_killed_planning_left_is_cleared_away(prepare: Any, tmp_path: Path) -> None:
    (tmp_path / ".planning" / "configs").mkdir(parents=True)
    (tmp_path / ".planning" / "configs" / "plan.json").write_text("half a pl")
    prepare(tmp_path)
    assert is_planned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LICENSE", "configs", "docs", "scripts"]


def pretend_machine(patch: pytest.MonkeyPatch, slowness: float, cores: int, gib: int, today: float) -> None:
    """Another machine, or a busy one: its clocks, cores and memory."""
    patch.setattr(_speed, "perf_counter", lambda clock=time.perf_counter: slowness * clock())
    patch.setattr(time, "time", lambda clock=time.time: clock() + today)
    patch.setattr(os, "cpu_count", lambda: cores)
    patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gib << 30, total=gib << 30))
    patch.setattr(_speed, "machine_name", lambda _: f"a machine with {cores} cores")
    patch.setattr(_speed, "peak_memory_gib", lambda _: gib / 2)


def test_two_plans_of_one_data_set_are_equal(
    medseg: Callable[..., tuple[int, str, str]], phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, whatever the machine's speed, load and date: only logs/expected.json holds what was measured."""
    network = ("--set", f"network_def={json.dumps(TINY_NETWORK)}", "--set", "plan::patch_size=[16,16,16]")
    plans, expected, threads = [], [], torch.get_num_threads()
    for slowness, cores, gib, today in ((0.01, 64, 200, 0.0), (900.0, 1, 3, 1e8)):
        run = tmp_path / str(cores) / "run"
        run.parent.mkdir()
        with monkeypatch.context() as patch:
            pretend_machine(patch, slowness, cores, gib, today)
            torch.set_num_threads(min(cores, 2))
            code, _, shown = medseg("plan", phantoms, "--out", run, "--device", "cpu", *network)
            torch.set_num_threads(threads)
        assert code == 0 and "80 epochs of 50 steps" in shown
        plans.append(files(run))
        expected.append(json.loads(plans[-1].pop("logs/expected.json")))
        assert f"{expected[-1]['memory_gib']:.1f} GiB on a machine with {cores} cores" in shown
    assert plans[0] == plans[1] and "configs/plan.json" in plans[0] and "docs/README.md" in plans[0]
    assert expected[0]["minutes"] < expected[1]["minutes"] / 100


def test_default_length_is_a_number_of_steps(phantoms: Path, tmp_path: Path) -> None:
    """Also if somebody sets the length of an epoch; --epochs counts the plan's epochs."""
    dataset = read_dataset(phantoms)
    settings = [*TINY, ("plan::steps_per_epoch", 750)]
    plan = prepare_run(dataset, split_cases(dataset), tmp_path / "a", settings=settings, device="cpu")
    assert (plan["steps_per_epoch"], plan["epochs"]) == (750, 5)
    plan = prepare_run(dataset, split_cases(dataset), tmp_path / "b", settings=settings, epochs=7, device="cpu")
    assert (plan["steps_per_epoch"], plan["epochs"]) == (750, 7)


def test_minutes_fit_the_length_to_this_machine(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 minutes: two validation cases of 3 s, ten times, and 60 s for each epoch of three steps: 19 epochs."""
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    timing = {
        "seconds_per_step": 20.0,
        "seconds_per_validation_case": 3.0,
        "memory_gib": 1.0,
        "machine": "slow",
        "precision": "float32",
    }
    monkeypatch.setattr(_run, "time_within_memory", lambda *_, **__: timing)
    split = split_cases(dataset, validation_fraction=0.34)
    assert len(split.validation) == 2
    for minutes in (1, 1e9, float("nan"), float("inf")):
        with pytest.raises(
            ConfigError, match=rf"--minutes {minutes:g} must be enough for .* take about 2 minutes".replace("+", r"\+")
        ):
            prepare_run(dataset, split, run, settings=TINY, minutes=minutes, device="cpu")
    with pytest.raises(ConfigError, match="--epochs or --minutes"):
        prepare_run(dataset, split, run, settings=TINY, minutes=20, epochs=3, device="cpu")
    assert not run.exists()
    plan = prepare_run(dataset, split, run, settings=TINY, minutes=20.0, device="cpu")
    assert (plan["epochs"], plan["minutes"]) == (19, 20)
    assert json.loads((run / "configs" / "plan.json").read_text()) == json.loads(json.dumps(plan))
    assert json.loads((run / "logs" / "expected.json").read_text())["minutes"] == 20
    length = next(line for line in (run / "docs" / "README.md").read_text().split("\n- ") if line.startswith("Length"))
    assert "19 epochs of 3 steps" in length and "about 20 minutes on the machine that planned it." in length
    extend_training(run, 40)  # which does not fit
    assert "minutes" not in json.loads((run / "configs" / "plan.json").read_text())
