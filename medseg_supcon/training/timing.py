"""How long a step takes on this machine, measured, so that the plan's length fits a person's patience."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from monai.bundle import ConfigParser

from medseg_supcon.errors import ConfigError
from medseg_supcon.plan import literal, write_plan
from medseg_supcon.training.throughput import free_memory, keep_freed_memory, tune_gpu

NICE_EPOCHS = (5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400, 500, 700, 1000)


def machine_name(device: torch.device) -> str:
    """What a time was measured on, e.g. ``"cpu, 2 threads"``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def time_training(run: Path, device: str | None = None, steps: int = 4) -> dict[str, Any]:
    """Time steps of the run's own training, augmentation and contrast included, and one validation case.

    Args:
        run: a planned run.
        device: overrides the config's.
        steps: steps to time, after one that is not counted.

    Returns:
        ``seconds_per_step``, ``seconds_per_validation_case``, ``memory_gib``, ``machine``.
    """
    keep_freed_memory()  # as the training will
    try:
        return _measure(run, device, steps)
    finally:
        free_memory()


def time_within_memory(run: Path, device: str | None, plan: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """:func:`time_training`; where the GPU's memory is too small for a plan's guess, of half the scans per step.

    Args:
        run: a planned run.
        device: overrides the config's.
        plan: the run's; ``batch_size`` is changed in it and in the run.
        fixed: somebody chose ``batch_size``: it stays.

    Raises:
        torch.OutOfMemoryError: two scans per step are too many, or as many as were chosen.
    """
    while True:
        try:
            return time_training(run, device)
        except torch.OutOfMemoryError:
            if fixed or plan["batch_size"] <= 2:
                raise
        free_memory()  # not before: the error holds what was on the GPU
        plan["batch_size"] = max(2, plan["batch_size"] // 2)
        write_plan(plan, run / "configs" / "plan.json")


def _measure(run: Path, device: str | None, steps: int) -> dict[str, Any]:
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = literal(str(run))
    parser["init_weights"] = None
    if device is not None:
        parser["device"] = f"$torch.device('{device}')"
    lists = parser.get_parsed_content("case_lists")
    workers = int(parser.get_parsed_content("num_workers")) if "num_workers" in parser else 0
    parser["case_lists"] = literal({key: items[:2] for key, items in lists.items()})
    parser["num_workers"] = 0
    parser["quiet"] = True
    parser.parse(reset=True)
    trainer, where = parser.get_parsed_content("train::trainer"), parser.get_parsed_content("device")
    speed = {"tf32": "tf32", "benchmark": "cudnn_benchmark"}
    tune_gpu(where, **{name: parser.get_parsed_content(key) for name, key in speed.items() if key in parser})
    batches = iter(parser.get_parsed_content("train::dataloader"))
    loading, computing = [], []
    for _ in range(steps + 1):
        start = perf_counter()
        with _threads_of_a_worker(workers):
            batch = next(batches)
        loaded = perf_counter()
        _step(trainer, batch, where)
        loading.append(loaded - start)
        computing.append(perf_counter() - loaded)
    evaluator = parser.get_parsed_content("validate::evaluator")
    for _ in range(
        2 if parser.get("compile") else 1
    ):  # what is compiled is compiled anew for evaluation, once
        start = perf_counter()
        with torch.inference_mode():
            evaluator.network.eval()
            evaluator.inferer(next(iter(evaluator.data_loader))["image"].to(where), evaluator.network)
            _wait(where)
    return {
        "seconds_per_step": seconds_per_step(loading[1:], computing[1:], workers),
        "seconds_per_validation_case": perf_counter() - start,
        "memory_gib": round(peak_memory_gib(where), 2),
        "machine": machine_name(where),
    }


def seconds_per_step(loading: Sequence[float], computing: Sequence[float], workers: int) -> float:
    """The middle one of the steps' times; workers load beside the computation, each a batch at a time.

    >>> seconds_per_step([2.0], [0.5], 0), seconds_per_step([2.0], [0.5], 2), seconds_per_step([2.0], [0.5], 8)
    (2.5, 1.0, 0.5)
    """
    pairs = zip(loading, computing, strict=True)
    times = sorted(max(load / workers, compute) if workers else load + compute for load, compute in pairs)
    return times[len(times) // 2]


@contextlib.contextmanager
def _threads_of_a_worker(workers: int) -> Iterator[None]:
    """A loader's worker has one thread; without workers everything stays as it is."""
    threads = torch.get_num_threads()
    if workers:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _step(trainer: Any, batch: Any, device: torch.device) -> None:
    inputs, target = trainer.prepare_batch(batch, device, False)
    trainer.network.train()
    with torch.autocast(device.type, enabled=trainer.amp, **trainer.amp_kwargs):
        loss = trainer.loss_function(trainer.inferer(inputs, trainer.network), target)
    loss.backward()
    trainer.optimizer.zero_grad()
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def epochs_within(minutes: float, plan: dict[str, Any], timing: dict[str, Any], validation_cases: int) -> int:
    """The largest round number of epochs that fits, validations (ten) included.

    >>> epochs_within(20, {"steps_per_epoch": 50}, {"seconds_per_step": 0.4, "seconds_per_validation_case": 1}, 3)
    50
    """
    left = 60 * minutes - 10 * validation_cases * timing["seconds_per_validation_case"]
    fitting = [e for e in NICE_EPOCHS if e * plan["steps_per_epoch"] * timing["seconds_per_step"] <= left]
    return fitting[-1] if fitting else NICE_EPOCHS[0]


def default_minutes(device: torch.device) -> float:
    """How long training may take by default: 22 minutes on a CPU, 60 on a GPU; ``MEDSEG_MINUTES`` overrides."""
    text = os.environ.get("MEDSEG_MINUTES")
    try:
        return float(text) if text else (22.0 if device.type == "cpu" else 60.0)
    except ValueError:
        raise ConfigError(f"MEDSEG_MINUTES must be a number of minutes, found {text!r}.") from None
