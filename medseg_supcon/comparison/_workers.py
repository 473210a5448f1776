"""The runs of a comparison, spread over workers: each run in a process of its own, on the worker's device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import torch

Done = Callable[[Path, str], None]  # job file, what went wrong ("": nothing)
INTERRUPTED = (130, -2)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def devices(device: str | None, workers: int | None = None) -> list[str]:
    """A device for each worker.

    Args:
        device: the one asked for; None: every GPU, else the CPU.
        workers: how many runs at once; None: one for each device. Several may share one.
    """
    every = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    known = every if device is None else [device]
    return [known[i % len(known)] for i in range(workers or len(known))]


def run_jobs(jobs: Sequence[Path], where: Sequence[str], done: Done) -> None:
    """Run job files, each in a process of its own; a failed one does not stop the others.

    One worker shows its progress. Several are silent, write ``JOB.log``, and share the machine: the threads
    torch would use are divided among those on the CPU, the memory for cached scans among all.

    Args:
        jobs: files that ``python -m medseg_supcon.comparison`` takes.
        where: a device for each worker.
        done: called in this process after each.
    """
    pool = _Pool(where)
    if len(where) == 1:
        for job in jobs:
            done(job, pool.run(job, where[0], log=None))
        return
    free: SimpleQueue[str] = SimpleQueue()
    for device in where:
        free.put(device)

    def task(job: Path) -> str:
        device = free.get()
        try:
            return pool.run(job, device, log=job.with_suffix(".log"))
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(where)) as threads:
        running = {threads.submit(task, job): job for job in jobs}
        try:
            for future in as_completed(running):
                done(running[future], future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.stop()
            raise


class _Pool:
    """The processes under way."""

    def __init__(self, where: Sequence[str]) -> None:
        self.where = where
        self.running: set[subprocess.Popen[bytes]] = set()

    def run(self, job: Path, device: str, log: Path | None) -> str:
        """One job to its end: what went wrong, or an empty string."""
        environment, name = self._environment(device)
        command = [sys.executable, "-W", "ignore", "-m", "medseg_supcon.comparison", str(job)]
        command += ["--device", name, "--beside", str(len(self.where) - 1), "--parent", str(os.getpid())]
        if log is None:
            code, told = self._wait(command, environment, None), "see above"
        else:
            with log.open("wb") as stream:
                code = self._wait([*command, "--quiet"], environment, stream)
            lines = log.read_text(errors="replace").strip().splitlines()
            told = lines[-1].removeprefix("medseg: ") if lines else f"see {log}"
        if code in INTERRUPTED:
            raise KeyboardInterrupt
        if code < 0:  # nothing of its own tells why
            return f"it was ended by {signal.Signals(-code).name}; perhaps memory ran out"
        return told if code else ""

    def stop(self) -> None:
        """End what is under way; a checkpoint is written whole or not at all."""
        for process in list(self.running):
            process.terminate()

    def _environment(self, device: str) -> tuple[dict[str, str], str]:
        """The process's environment, and its device's name in there."""
        environment = dict(os.environ)
        if device.startswith("cuda:"):
            # A process sees its GPU only: nothing in it can land on another by default.
            visible = environment.get("CUDA_VISIBLE_DEVICES", "")
            number = int(device.removeprefix("cuda:"))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
            return environment, "cuda"
        sharing = self.where.count(device)
        if device == "cpu" and sharing > 1:
            threads = max(1, torch.get_num_threads() // sharing)
            environment |= dict.fromkeys(THREADS, str(threads))
        return environment, device

    def _wait(self, command: list[str], environment: dict[str, str], stream: object) -> int:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)  # type: ignore[call-overload]
        self.running.add(process)
        try:
            return int(process.wait())
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            self.running.discard(process)
