"""Device, precision, workers and memory of a training, and how long its steps take on this machine."""

from __future__ import annotations

import gc
import logging
import math
import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from medseg_supcon.bundle import innermost
from medseg_supcon.errors import ConfigError
from medseg_supcon.inference import tune_malloc
from medseg_supcon.plan import literal, write_plan

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_WORKERS = 16
AHEAD = 2  # batches that a worker of torch's DataLoader has ready
SHARED = "/dev/shm"  # where workers pass batches to the trainer; 64 MB in a container, and a worker dies without room
TIMED_STEPS = 4
OTHERS_MAY_HOLD = 2.0  # GiB of a GPU: a screen, and what CUDA itself takes


def check_device(device: str | None) -> str | None:
    """The device's name; `ConfigError` if this machine does not have it."""
    if device is None:
        return None
    try:
        known = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"Unknown device {device!r}. Use --device cpu, cuda, or cuda:0, cuda:1, ...") from None
    if known.type == "cuda" and not (torch.cuda.is_available() and (known.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ConfigError(f"--device {device}: torch finds {count} CUDA device(s) here. Use --device cpu.")
    return device


def amp_dtype(name: str) -> torch.dtype:
    """The type of mixed precision that ``amp_dtype`` of train.yaml names."""
    if name not in DTYPES:
        raise ConfigError(f"amp_dtype must be bfloat16 or float16, got {name!r}.")
    return DTYPES[name]


def usual_amp_dtype(device: str | torch.device) -> str:
    """``"bfloat16"``, which needs no scaled loss; ``"float16"`` on GPUs before Ampere, which have no fast bfloat16."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return "float16" if on_gpu and torch.cuda.get_device_capability(device)[0] < 8 else "bfloat16"


def tune_gpu(device: str | torch.device, *, tf32: bool = True, benchmark: bool = True) -> None:
    """Let GPUs use their fastest kernels, at the price of reproducibility: docs/workstation.md."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.deterministic = not benchmark
        torch.backends.cudnn.benchmark = benchmark


def compiled(network: nn.Module, backend: str | None) -> nn.Module:
    """The network, from now on run by ``torch.compile`` with a backend; the names of its weights stay. None: as it is.

    Also as it is, with a warning, if the backend does not work on this machine.
    """
    if backend is None:
        return network
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"compile must be null or one of {', '.join(known)}, got {backend!r}.")
    device = next(network.parameters()).device
    try:
        torch.compile(torch.exp, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever a backend raises, for example if there is no C++ compiler
        reason = str(innermost(error)).strip().split("\n")[0].rstrip(".")
        logging.getLogger(__name__).warning("compile=%s does not work here, so it is off: %s.", backend, reason)
        return network
    network.compile(backend=backend)
    return network


def loader_workers(device: str | torch.device, batch_size: int, plan: Mapping[str, Any]) -> int:
    """Processes that load batches: 0 on a CPU, else one per usable core, at most 16, within half the free shared memory."""
    if torch.device(device).type == "cpu":
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not every system has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        room = shutil.disk_usage(SHARED).free / 2
    except OSError:  # a system that shares memory differently
        room = math.inf
    return int(min(MOST_WORKERS, cores, room // (AHEAD * batch_bytes(batch_size, plan))))


def batch_bytes(batch_size: int, plan: Mapping[str, Any]) -> int:
    """Two views of each scan: per voxel float32 for every channel, an int64 label and an int64 pair id."""
    return int(batch_size * 2 * math.prod(plan["patch_size"]) * (4 * len(plan["channels"]) + 8 + 8))


def free_memory() -> None:
    """Give unused GPU memory back, for the next task or another process."""
    gc.collect()  # trainer and handlers refer to each other
    torch.cuda.empty_cache()


def machine_name(device: torch.device) -> str:
    """What a time was measured on, e.g. ``"x86_64 cpu, 2 threads"``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def time_training(run: Path, device: str | None = None) -> dict[str, Any]:
    """Time four steps of a planned run's training, after one that is not counted, and one validation case."""
    threads = torch.get_num_threads()
    tune_malloc(keep=True)  # as the training will
    try:
        return _measure(run, device, threads)
    finally:
        torch.set_num_threads(threads)
        free_memory()


def time_within_memory(run: Path, device: str | None, plan: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """`time_training`; if the GPU's memory is too small for the plan's ``batch_size``, with half, unless it is ``fixed``."""
    while True:
        try:
            return time_training(run, device)
        except torch.OutOfMemoryError:
            where = torch.device(device or "cuda")
            free, total = torch.cuda.mem_get_info(where)
            others = (total - free - torch.cuda.memory_reserved(where)) / 2**30
            # a plan must not depend on other programs
            if fixed or plan["batch_size"] <= 2 or others > OTHERS_MAY_HOLD:
                raise
        free_memory()  # not before: the error holds what was on the GPU
        plan["batch_size"] = max(2, plan["batch_size"] // 2)
        write_plan(plan, run / "configs" / "plan.json")


def _measure(run: Path, device: str | None, threads: int) -> dict[str, Any]:
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser.update({"bundle_root": literal(str(run)), "init_weights": None, "quiet": True})
    if device is not None:
        parser["device"] = f"$torch.device('{device}')"
    lists, workers = parser.get_parsed_content("case_lists"), int(parser.get_parsed_content("num_workers"))
    parser.update({"case_lists": literal({key: items[:2] for key, items in lists.items()}), "num_workers": 0})
    parser.parse(reset=True)
    trainer, where = parser.get_parsed_content("train::trainer"), parser.get_parsed_content("device")
    tune_gpu(where, tf32=parser.get_parsed_content("tf32"), benchmark=parser.get_parsed_content("cudnn_benchmark"))
    precision = parser.get_parsed_content("precision")
    precision.choose()
    batches = iter(parser.get_parsed_content("train::dataloader"))
    wait = torch.cuda.synchronize if where.type == "cuda" else lambda _: None
    loading, computing = [], []
    for _ in range(TIMED_STEPS + 1):
        start = perf_counter()
        torch.set_num_threads(1 if workers else threads)  # as in a loader's worker
        batch = next(batches)
        torch.set_num_threads(threads)
        loaded = perf_counter()
        inputs, target = trainer.prepare_batch(batch, where, False)
        trainer.network.train()
        with torch.autocast(where.type, enabled=trainer.amp, **trainer.amp_kwargs):
            loss = trainer.loss_function(trainer.inferer(inputs, trainer.network), target)
        loss.backward()
        trainer.optimizer.zero_grad()
        wait(where)
        loading.append(loaded - start)
        computing.append(perf_counter() - loaded)
    evaluator = parser.get_parsed_content("validate::evaluator")
    for _ in range(2 if parser.get("compile") else 1):  # the first evaluation compiles
        start = perf_counter()
        with torch.inference_mode():
            evaluator.network.eval()
            evaluator.inferer(next(iter(evaluator.data_loader))["image"].to(where), evaluator.network)
            wait(where)
    return {
        "seconds_per_step": seconds_per_step(loading[1:], computing[1:], workers),
        "seconds_per_validation_case": perf_counter() - start,
        "memory_gib": round(peak_memory_gib(where), 2),
        "machine": machine_name(where),
        "precision": precision.name,
    }


def seconds_per_step(loading: Sequence[float], computing: Sequence[float], workers: int) -> float:
    """The median of the steps' times; workers load beside the computation, each a batch at a time."""
    pairs = zip(loading, computing, strict=True)
    times = sorted(max(load / workers, compute) if workers else load + compute for load, compute in pairs)
    return times[len(times) // 2]
