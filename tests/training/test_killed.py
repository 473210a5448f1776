"""kill -9 at any moment, --resume, and the end is that of an uninterrupted training, bit for bit."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import IterationEvents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.training import prepare_run

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
SETTINGS: dict[str, list[tuple[str, Any]]] = {
    "joint": [
        (
            "contrastive_loss::bank",
            {"_target_": "medseg_supcon.losses.MemoryBank", "num_classes": 6, "dim": 64, "size": 8},
        )
    ],
    "semi": [("unlabelled_from", 0.25)],
    "two_stage": [],
}


class Clock:
    """Counts the moments of a training: steps and their parts, validations, files before and after they are there."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick, self.replace = tick, os.replace

    def attach(self, workflow: ConfigWorkflow) -> None:
        for event in (
            Events.ITERATION_STARTED,
            IterationEvents.MODEL_COMPLETED,
            IterationEvents.BACKWARD_COMPLETED,
            Events.ITERATION_COMPLETED,
            Events.EPOCH_COMPLETED,
        ):
            workflow.trainer.add_event_handler(event, self.tick)
        workflow.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.tick)
        os.replace = self.renamed

    def renamed(self, source: Any, target: Any) -> None:
        self.tick()  # written, not yet there
        self.replace(source, target)
        self.tick()


def train(run: Path, moment: int | None, ticks: Any, ends: Any) -> None:
    """Go on with a run in this process, up to a moment at which it is killed."""
    torch.set_num_threads(1)

    def tick() -> None:
        ticks.value += 1
        if ticks.value == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    workflow = ConfigWorkflow(
        str(run / "configs" / "train.yaml"),
        workflow_type="train",
        logging_file=False,
        bundle_root=str(run),
        quiet=True,
        resume=True,
        val_interval=2,
    )
    workflow.initialize()
    Clock(tick).attach(workflow)
    workflow.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: ends.__setitem__(engine.state.epoch, ticks.value)
    )
    workflow.trainer.run()


def trained(run: Path, moment: int | None = None) -> tuple[int, list[int]]:
    """Exit code of a process that trains, and the moments at which the epochs 0, 1, ... ended."""
    context = multiprocessing.get_context("fork")
    ticks, ends = context.Value("i", 0), context.Array("i", 5)
    process = context.Process(target=train, args=(run, moment, ticks, ends))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, list(ends)


def history(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "history.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(run / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """Equal to the last bit, tensors in whatever they lie in."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == two, where


@pytest.mark.parametrize("recipe", list(SETTINGS))
def test_killed_three_times(recipe: str, trained_run: Path, phantoms: Path, tmp_path: Path) -> None:
    dataset, planned = read_dataset(phantoms), json.loads((trained_run / "configs" / "plan.json").read_text())
    plan = {**planned, "epochs": 4, "steps_per_epoch": 2}
    split = split_cases(dataset, labels=4) if recipe == "semi" else split_cases(dataset)
    settings = [("contrast_samples", 128), *SETTINGS[recipe]]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare_run(dataset, split, whole, recipe=recipe, settings=settings, device="cpu", plan=plan)
    shutil.copytree(whole, broken)

    code, ends = trained(whole)
    assert code == 0
    length = [b - a for a, b in itertools.pairwise(ends)]
    rng = random.Random(recipe)
    for done in range(3):  # every process gets through one epoch, and dies somewhere in the one after it
        moment = length[done] + rng.randint(1, length[done + 1] - 1)
        assert trained(broken, moment)[0] == -signal.SIGKILL
        assert load_tensors(broken / "models" / "checkpoint.pt")["epoch"] > done
    assert trained(broken)[0] == 0

    for name in ("model.pt", "best.pt", "checkpoint.pt"):
        one, two = (load_tensors(run / "models" / name) for run in (whole, broken))
        assert_same(one, two, name)
    kept = load_tensors(broken / "models" / "checkpoint.pt")
    assert kept["finished"] and kept["iteration"] == 8 and kept["best"] is not None
    assert any("bank" in key for key in kept["state"]["loss"]) == (recipe == "joint")
    assert history(whole) == history(broken)
    assert scalars(whole) == scalars(broken)
    assert {step for step, _ in scalars(broken)["train/loss"]} == {2, 4, 6, 8}
    assert list(broken.rglob("*.tmp")) == []
