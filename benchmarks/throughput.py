"""How fast training uses patches, and how fast a core makes them.

    python -m benchmarks.throughput --profile [--pairs 40]              the CPU side, on any machine
    python -m benchmarks.throughput [--epochs 6] [--set KEY=VALUE ...]  a training on a GPU; takes minutes

The training has the size of nnU-Net's on Task04: patches of 40 x 56 x 40, a U-Net of 32 to 256 channels, contrast
included. An epoch of nnU-Net has 250 steps of 9 patches. Ours has as many patches: 125 steps of 9 scans, with two views
of each. The scans are Task04_Hippocampus in MEDSEG_DATA, or phantoms of that size if it is not set.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from monai.bundle import ConfigParser

from medseg_supcon.bundle import parse_setting
from medseg_supcon.datasets import make_phantoms, read_dataset, split_cases
from medseg_supcon.training import prepare_run, run_config

RESULTS = Path(__file__).parent / "results"
GPU_TABLE = RESULTS / "throughput_gpu.md"
NO_GPU = """
Nothing has been measured on a GPU, neither seconds per epoch nor utilisation. On a machine with a GPU,
`python -m benchmarks.throughput` measures both and writes `throughput_gpu.md`.
"""
PATCH, SCANS, STEPS = [40, 56, 40], 9, 125
PATCHES = 2 * SCANS * STEPS  # as many as 250 steps of 9


def network(classes: int) -> dict[str, Any]:
    """The network of nnU-Net for these patches: four levels with two convolutions each."""
    levels = {"filters": [32, 64, 128, 256], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2]}
    size = {"spatial_dims": 3, "in_channels": 1, "out_channels": classes, "kernel_size": [3, 3, 3, 3]}
    return {"_target_": "DynUNet", **size, **levels, "norm_name": ["INSTANCE", {"affine": True}]}


def planned(folder: Path, settings: list[tuple[str, Any]], device: str, cases: int, small: bool) -> Path:
    """A run of that size, ready to train. A small one has the same patches, and a network that is quick to plan."""
    data = Path(os.environ.get("MEDSEG_DATA", "")) / "Task04_Hippocampus"
    if not data.is_dir():
        data = make_phantoms(folder / "data", cases=20, unseen=0, size=48.0)
    dataset = read_dataset(data)
    split, run = split_cases(dataset, labels=min(cases, len(dataset.cases))), folder / "run"
    net = network(len(dataset.labels))
    size = [
        ("network_def", {**net, "filters": [4, 4, 4, 4]} if small else net),
        ("plan::patch_size", PATCH),
        ("plan::batch_size", 1 if small else SCANS),
        ("plan::steps_per_epoch", STEPS),
    ]
    epochs = dict(settings).pop("epochs", 6)
    more = [(key, value) for key, value in settings if key != "epochs"]
    prepare_run(dataset, split, run, settings=[*size, *more], epochs=epochs, device=device)
    return run


class Stopwatch:
    """CPU time of this thread per watched function. Time in a nested function counts for that one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = thread_time() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        return timed

    def watch_transform(self, transform: Any) -> None:
        """Time a transform and those inside it, in place; its class name stays the same."""
        for inner in getattr(transform, "transforms", ()):
            self.watch_transform(inner)
        kind = type(transform)
        if kind.__name__ not in ("Compose", "OneOf"):
            change = getattr(transform, "change", kind)  # of IntensityChanged
            call = self.watch(change.__name__, kind.__call__)
            body = {"__call__": lambda *a, **k: call(*a, **k), "__module__": kind.__module__}
            transform.__class__ = type(kind.__name__, (kind,), body)


def profile(run: Path, pairs: int) -> str:
    """How many pairs of augmented patches one core makes per second, and where its time goes."""
    torch.set_num_threads(1)  # as in a worker of the data loader
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser.update({"bundle_root": str(run), "num_workers": 0})
    parser["case_lists"] = {k: v[:8] for k, v in parser.get_parsed_content("case_lists").items()}
    parser.parse(reset=True)
    dataset, views = (parser.get_parsed_content(f"train::{key}") for key in ("dataset", "two_views"))
    cases = len(dataset)
    keys = [(1, slot, slot % cases) for slot in range(pairs)]
    for key in keys[:cases]:
        dataset[key]  # warm-up: the first calls import and allocate
    watch = Stopwatch()
    for policy in {id(p): p for p in views.policies}.values():
        watch.watch_transform(policy)
    views._run = watch.watch("Compose, check the result", views._run)
    module = vars(sys.modules[type(views).__module__])
    parts = {
        "_crop": "cut the box",
        "nearest_voxels": "position of its voxels in the scan",
        "pair_ids": "which voxels are pairs",
    }
    for name, words in parts.items():
        module[name] = watch.watch(words, module[name])
    sample = watch.watch("seed, place, stack", dataset.__getitem__)
    for key in keys:
        sample(key)
    total = sum(watch.seconds.values())
    rows = sorted(watch.seconds.items(), key=lambda row: -row[1])
    table = "\n".join(f"| {n} | {1000 * s / pairs:.2f} | {100 * s / total:.0f} % |" for n, s in rows)
    rate, need = pairs / total, PATCHES / 2
    return (
        f"{pairs} pairs of patches of {' x '.join(map(str, PATCH))} voxels, CPU time of one thread, "
        f"torch {torch.__version__}, {platform.machine()}\n\n"
        f"One core makes **{rate:.1f} pairs per second**. An epoch of {PATCHES} patches ({need:.0f} pairs) takes "
        f"{need / rate:.0f} s on one core, and {need / rate / 16:.1f} s on 16 cores if they share nothing.\n\n"
        f"| what | ms per pair | share |\n|---|---|---|\n{table}\n{NO_GPU if not GPU_TABLE.exists() else ''}"
    )


class Utilisation(threading.Thread):
    """Utilisation of a GPU, which nvidia-smi reports twice a second."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.values: list[int] = []
        self.stop = threading.Event()

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        command.append(f"--id={self.number}")
        while not self.stop.wait(0.5):
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.values.append(int(told))


def training(run: Path, device: str) -> str:
    """Seconds per epoch after the first one, and the utilisation of the GPU during them."""
    watch = Utilisation(torch.device(device).index or 0)
    if device != "cpu":
        watch.start()
    start = perf_counter()
    run_config(run, device=device, quiet=True, val_interval=1000)
    whole = perf_counter() - start
    watch.stop.set()
    with (run / "logs" / "history.csv").open(newline="") as stream:
        seconds = [float(row["seconds"]) for row in csv.DictReader(stream)]
    settled = seconds[1:-1] or seconds  # the last epoch includes a validation
    name = torch.cuda.get_device_name(device) if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    lines = [
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}",
        "",
        f"{statistics.median(settled):.2f} s per epoch of {PATCHES} patches (first epoch {seconds[0]:.1f} s; "
        f"{whole:.0f} s in total)",
    ]
    if watch.values:
        used = watch.values[len(watch.values) // len(seconds) :]
        lines.append(f"GPU utilisation {statistics.mean(used):.0f} % on average, {min(used)} % at the lowest")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="measure the CPU side only")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.device == "cpu" and not given.profile:
        parser.error("torch finds no GPU on this machine; --profile measures the CPU side")
    with tempfile.TemporaryDirectory() as folder:
        settings = [("epochs", given.epochs), *map(parse_setting, given.set)]
        cases = 10 if given.profile else 100
        run = planned(Path(folder), settings, given.device, cases, small=given.profile)
        text = profile(run, given.pairs) if given.profile else training(run, given.device)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    head = f"Written by `python -m benchmarks.throughput{' --profile' if given.profile else ''}`.\n\n"
    (RESULTS / "throughput_cpu.md" if given.profile else GPU_TABLE).write_text(head + text)


if __name__ == "__main__":
    main()
