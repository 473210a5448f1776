"""The runs of a comparison, spread over the devices there are: one process each, one at a time per device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import torch

Done = Callable[[Path, str], None]  # job file, what went wrong ("": nothing)


def devices(device: str | None) -> list[str]:
    """The one asked for, else every GPU, else the CPU."""
    if device is not None:
        return [device]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def run_jobs(jobs: Sequence[Path], where: Sequence[str], done: Done) -> None:
    """Run job files, each in a process of its own; a failed one does not stop the others.

    Args:
        jobs: files that ``python -m medseg_supcon.comparison`` takes.
        where: devices.
        done: called in this process after each.
    """
    if len(where) == 1:
        for job in jobs:
            done(job, _run(job, where[0], log=None))
        return
    free: SimpleQueue[str] = SimpleQueue()
    for device in where:
        free.put(device)

    def task(job: Path) -> str:
        device = free.get()
        try:
            return _run(job, device, log=job.with_suffix(".log"))
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(where)) as pool:
        running = {pool.submit(task, job): job for job in jobs}
        try:
            for future in as_completed(running):
                done(running[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(job: Path, device: str, log: Path | None) -> str:
    environment = dict(os.environ)
    if device.startswith("cuda:"):
        # A process sees its GPU only: nothing in it can land on another by default.
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        number = int(device.removeprefix("cuda:"))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        device = "cuda"
    command = [sys.executable, "-W", "ignore", "-m", "medseg_supcon.comparison", str(job), "--device", device]
    if log is None:
        code, told = subprocess.run(command, env=environment, check=False).returncode, "see above"
    else:
        with log.open("w") as stream:
            code = subprocess.run(
                [*command, "--quiet"], env=environment, check=False, stdout=stream, stderr=stream
            ).returncode
        lines = log.read_text().strip().splitlines()
        told = lines[-1].removeprefix("medseg: ") if lines else f"see {log}"
    if code in (130, -2):
        raise KeyboardInterrupt
    return told if code else ""
