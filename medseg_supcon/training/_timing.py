"""How long a step takes on this machine, measured, so that the plan's length fits a person's patience."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from monai.bundle import ConfigParser

from medseg_supcon.errors import ConfigError
from medseg_supcon.training._memory import keep_freed_memory

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
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = str(run)
    parser["init_weights"] = None
    if device is not None:
        parser["device"] = f"$torch.device('{device}')"
    lists = parser.get_parsed_content("case_lists")
    parser["case_lists"] = {key: items[:2] for key, items in lists.items()}
    parser["num_workers"] = 0
    parser["quiet"] = True
    parser.parse(reset=True)
    trainer, where = parser.get_parsed_content("train::trainer"), parser.get_parsed_content("device")
    batches = iter(parser.get_parsed_content("train::dataloader"))
    times = []
    for _ in range(steps + 1):
        start = perf_counter()
        _step(trainer, next(batches), where)
        times.append(perf_counter() - start)
    evaluator = parser.get_parsed_content("validate::evaluator")
    start = perf_counter()
    with torch.inference_mode():
        evaluator.network.eval()
        evaluator.inferer(next(iter(evaluator.data_loader))["image"].to(where), evaluator.network)
        _wait(where)
    return {
        "seconds_per_step": sorted(times[1:])[steps // 2],
        "seconds_per_validation_case": perf_counter() - start,
        "memory_gib": round(peak_memory_gib(where), 2),
        "machine": machine_name(where),
    }


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
