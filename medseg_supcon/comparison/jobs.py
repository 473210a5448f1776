"""One run of a comparison as a job: trained and tested in a process of its own, several at the same time."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import torch

from medseg_supcon.bundle import is_planned, read_config
from medseg_supcon.datasets import load_items
from medseg_supcon.errors import MedsegError, RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.inference import Predictor, evaluate_items
from medseg_supcon.slurm import Cluster, Command, Task, run_on_cluster
from medseg_supcon.text import exit_problem
from medseg_supcon.training import is_complete, machine_name, peak_memory_gib, train_run

CLEAN, TRAINING = "clean", "training scans"
NUMBERS = ("dice", "hd95_mm", "surface_dice", "volume_ml", "reference_volume_ml")
COLUMNS = ("case", "class", *NUMBERS, "empty")
# With -m, Python would import modules from the working folder before its own.
WITHOUT_WORKING_FOLDER = """
import sys; sys.path = [p for p in sys.path if p]
from medseg_supcon.comparison import jobs; sys.exit(jobs.main(*sys.argv[1:]))
"""
# ``run`` (a planned run), ``tests`` (a folder), ``dataset_dir``, ``classes`` and ``conditions``: name -> items
Job = Mapping[str, Any]
CLUSTER_FILES = "slurm"  # folder
Say = Callable[[str], None]
Done = Callable[[Path, str], None]  # a job file, and what went wrong


def main(job: str, device: str, sharing: str, parent: str) -> int:
    """The process of a job file, one of ``sharing`` on this machine: exit code 0, or 2 with a sentence on stderr.

    ``device``: its name, or an empty string: the first GPU, or the CPU.
    """
    Thread(target=_end_with, args=(int(parent) or os.getppid(),), daemon=True).start()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # those of third parties are not for a person at a terminal
    try:
        run_cell(read_json(Path(job)), devices(device or None)[0], int(sharing) > 1, int(sharing))
    except MedsegError as error:
        sys.stderr.write(f"medseg: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with(parent: int) -> None:
    """Ends this process if the comparison was killed, so that it does not train beside the next call."""
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(130)


def run_cell(job: Job, device: str, quiet: bool = False, sharing: int = 1) -> None:
    """Do what is left of one run, whose configs `compare` has checked for trust; ``sharing`` runs share the memory."""
    run, tests = Path(job["run"]), Path(job["tests"])
    if not is_complete(run):
        train_run(run, device=device, resume=True, quiet=quiet, trust=True, **_memory_share(run, sharing))
        # after an interruption, the larger of the two parts' peaks
        memory = max(read_cost(tests)["memory_gib"] or 0.0, peak_memory_gib(torch.device(device)))
        cost = {"memory_gib": round(memory, 3), "machine": machine_name(torch.device(device))}
        write_text(tests / "cost.json", json.dumps(cost) + "\n")
    for condition, items in job["conditions"].items():
        if read_scores(job, condition) is None:
            folder = scores_folder(tests, condition)
            (folder / "metrics.json").unlink(missing_ok=True)
            evaluate_items(Predictor(run, device=device, trust=True), load_items(items, job["dataset_dir"]), folder)
            if condition != CLEAN:
                shutil.rmtree(folder / "predictions", ignore_errors=True)


def _memory_share(run: Path, sharing: int) -> dict[str, str]:
    """This process's part of the memory that the run's config lets the cache take."""
    if sharing == 1 or not is_planned(run):
        return {}
    whole = read_config(run / "configs" / "train.yaml")["memory_share"]
    return {"memory_share": f"$({str(whole).removeprefix('$')}) / {sharing}"}


def is_done(job: Job) -> bool:
    """Trained to its end, and tested under every condition on exactly these cases."""
    return is_complete(Path(job["run"])) and all(read_scores(job, name) is not None for name in job["conditions"])


def scores_folder(tests: Path, condition: str) -> Path:
    return tests / condition.replace(" ", "_")


def read_scores(job: Job, condition: str) -> list[dict[str, Any]] | None:
    """A row per case and class; None if missing, damaged, or of other weights, cases or classes than the run's now."""
    path = scores_folder(Path(job["tests"]), condition) / "metrics.json"
    with suppress(OSError, RunError, KeyError, TypeError, ValueError):
        if path.stat().st_mtime < (Path(job["run"]) / "models" / "model.pt").stat().st_mtime:
            return None
        rows: list[dict[str, Any]] = read_json(path)["rows"]
        wanted = {(item["name"], name) for item in job["conditions"][condition] for name in job["classes"]}
        numbers = [row[key] for row in rows for key in NUMBERS if row[key] is not None]
        if {(row["case"], row["class"]) for row in rows} == wanted and all(map(math.isfinite, numbers)):
            return [{key: row.get(key) for key in COLUMNS} for row in rows]
    return None


def read_cost(tests: Path) -> dict[str, Any]:
    """``memory_gib`` (of the process or its GPU) and ``machine`` of a run's training; None if it is not known."""
    with suppress(RunError, KeyError, TypeError, ValueError):
        saved = read_json(tests / "cost.json")
        return {"memory_gib": float(saved["memory_gib"]), "machine": str(saved["machine"])}
    return {"memory_gib": None, "machine": None}


def devices(device: str | None, workers: int | None = None) -> list[str]:
    """A device for each of the workers (None: one for each device); without ``device`` every GPU, or the CPU."""
    known = [device] if device else [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    return [known[i % len(known)] for i in range(workers or len(known))]


@dataclass(frozen=True)
class Workers:
    """Where job files are run: on this machine by processes that share its devices, or as jobs of a cluster.

    Attributes:
        device: None: on this machine every GPU, or the CPU; on a cluster, what each job finds there.
        number: of jobs at the same time; None: one per device, or all jobs of a cluster.
        folder: for the cluster's files.
    """

    device: str | None = None
    number: int | None = None
    cluster: Cluster | None = None
    folder: Path = Path(CLUSTER_FILES)

    @property
    def devices(self) -> list[str]:
        return devices(self.device, self.number)

    def __str__(self) -> str:
        if self.cluster is not None:
            return "as jobs"
        together = f", {len(self.devices)} at the same time" if len(self.devices) > 1 else ""
        return f"on {', '.join(dict.fromkeys(self.devices))}{together}"

    def run(self, jobs: Sequence[Path], done: Done, say: Say) -> None:
        """Run job files; ``done`` is called here after each."""
        if self.cluster is None:
            run_jobs(jobs, self.devices, done)
            return
        files = {job.stem: job for job in jobs}
        tasks = {}
        for job in map(Path.resolve, jobs):
            tasks[job.stem] = Command(job_command(job, self.device or "", 1, 0), job.with_suffix(".log"))
        run_on_cluster(tasks, self.cluster, self.folder, lambda name, why: done(files[name], why), say, self.number)

    def call(self, name: str, task: Task, say: Say) -> None:
        """Call a task here, or on the cluster; `RunError` if it fails there."""
        if self.cluster is None:
            task()
            return
        problems: dict[str, str] = {}
        run_on_cluster({name: task}, self.cluster, self.folder, problems.__setitem__, say)
        if problems[name]:
            raise RunError(f"{name} failed: {problems[name]}")


def run_jobs(jobs: Sequence[Path], where: Sequence[str], done: Done) -> None:
    """Run job files, each in its own process; ``done`` is called here after each, with what went wrong ("": nothing).

    Of several workers, each with a device in ``where``, all are silent, write ``JOB.log`` and share CPU threads and memory.
    """
    processes, free = set[subprocess.Popen[bytes]](), list(where)

    def task(job: Path) -> str:
        device = free.pop(0)
        problem = run_process(job, device, where, processes)
        free.append(device)
        return problem

    with ThreadPoolExecutor(len(where)) as threads:
        running = {threads.submit(task, job): job for job in jobs}
        try:
            for future in as_completed(running):
                done(running[future], future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):  # a checkpoint is written whole or not at all
                process.terminate()
            raise


def job_command(job: Path, device: str, sharing: int, parent: int) -> list[str]:
    """The command of a job file's process; it ends with the process ``parent`` (0: the one that starts it)."""
    return [sys.executable, "-W", "ignore", "-c", WITHOUT_WORKING_FOLDER, str(job), device, str(sharing), str(parent)]


def run_process(job: Path, device: str, where: Sequence[str], processes: set[subprocess.Popen[bytes]]) -> str:
    """One job to its end, its process among ``processes`` until then: what went wrong, or an empty string."""
    environment, name = process_environment(device, where)
    log = job.with_suffix(".log") if len(where) > 1 else None
    with log.open("wb") if log else nullcontext() as stream:
        command = job_command(job, name, len(where), os.getpid())
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        processes.add(process)
        code = process.wait()
        processes.discard(process)
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return exit_problem(code, log)


def process_environment(device: str, where: Sequence[str]) -> tuple[dict[str, str], str]:
    """The environment of a process on one of the workers' devices, and the device's name in it."""
    environment, sharing = dict(os.environ), where.count(device)
    if device.startswith("cuda:"):
        # A process sees its own GPU only: nothing in it can use another by default.
        number, visible = device.removeprefix("cuda:"), environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
        return environment, "cuda"
    if device == "cpu" and sharing > 1:
        threads = str(max(1, torch.get_num_threads() // sharing))
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return environment, device
