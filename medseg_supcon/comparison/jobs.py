"""``medseg compare``: prepare every run, train and test what is not done yet, and write the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any

import torch

from medseg_supcon.comparison.cell import is_done
from medseg_supcon.comparison.design import Cell, Design
from medseg_supcon.comparison.report import write_comparison
from medseg_supcon.comparison.results import read_results
from medseg_supcon.comparison.runs import Say, make_plans, prepare_cells, refuse_untrusted
from medseg_supcon.errors import RunError
from medseg_supcon.files import folder_lock, read_json, write_text
from medseg_supcon.text import counted

MARKER = "comparison.json"
# With -m, Python would import modules from the working folder before its own.
WITHOUT_WORKING_FOLDER = """
import sys; sys.path = [p for p in sys.path if p]
from medseg_supcon.comparison import cell; sys.exit(cell.main())
"""


def devices(device: str | None, workers: int | None = None) -> list[str]:
    """A device for each of the workers (None: one for each device); without ``device`` every GPU, or the CPU."""
    every = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    known = every if device is None else [device]
    return [known[i % len(known)] for i in range(workers or len(known))]


def run_jobs(jobs: Sequence[Path], where: Sequence[str], done: Callable[[Path, str], None]) -> None:
    """Run job files, each in its own process; a failed one does not stop the others.

    One worker shows its progress. Several are silent, write ``JOB.log``, and share CPU threads and memory for scans.
    ``where`` has a device for each worker; ``done`` is called here after each job, with what went wrong ("": nothing).
    """
    pool = _Pool(where)
    free: SimpleQueue[str] = SimpleQueue()
    for device in where:
        free.put(device)

    def task(job: Path) -> str:
        device = free.get()
        try:
            return pool.run(job, device, log=job.with_suffix(".log") if len(where) > 1 else None)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(where)) as threads:
        running = {threads.submit(task, job): job for job in jobs}
        try:
            for future in as_completed(running):
                done(running[future], future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(pool.running):  # a checkpoint is written whole or not at all
                process.terminate()
            raise


class _Pool:
    """The running processes."""

    def __init__(self, where: Sequence[str]) -> None:
        self.where = where
        self.running: set[subprocess.Popen[bytes]] = set()

    def run(self, job: Path, device: str, log: Path | None) -> str:
        """One job to its end: what went wrong, or an empty string."""
        environment, name = self._environment(device)
        command = [sys.executable, "-W", "ignore", "-c", WITHOUT_WORKING_FOLDER, str(job), "--device", name]
        command += ["--beside", str(len(self.where) - 1), "--parent", str(os.getpid())] + ["--quiet"] * bool(log)
        with log.open("wb") if log else nullcontext() as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code < 0:  # the process itself says nothing
            return f"it was ended by {signal.Signals(-code).name}; perhaps memory ran out"
        if code == 0 or log is None:
            return "see above" if code else ""
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("medseg: ") if lines else f"see {log}"

    def _environment(self, device: str) -> tuple[dict[str, str], str]:
        """The process's environment, and its device's name in it."""
        environment = dict(os.environ)
        if device.startswith("cuda:"):
            # A process sees its own GPU only: nothing in it can use another by default.
            number, visible = device.removeprefix("cuda:"), environment.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
            return environment, "cuda"
        sharing = self.where.count(device)
        if device == "cpu" and sharing > 1:
            threads = str(max(1, torch.get_num_threads() // sharing))
            environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return environment, device


def compare(
    design: Design,
    out: Path,
    *,
    epochs: int | None = None,
    settings: Sequence[tuple[str, Any]] = (),
    device: str | None = None,
    workers: int | None = None,
    robustness: bool = True,
    training_score: bool = False,
    trust_scan_affine: bool = False,
    trust: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Train and test every run of a design, write tables, pictures and ``report.html``; returns ``comparison.json``.

    Finished runs are kept and interrupted ones go on, so the same call can be made again. ``epochs`` (default: the first
    plan's length) and ``settings`` are those of all runs, ``trust_scan_affine`` is ``--allow-affine-mismatch``, and with
    ``trust`` foreign code in the folder's runs is run. A `RunError` if the folder holds something else, another call is at
    work in it, an earlier run was made with something else, a run failed, or one needs trust.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise RunError(f"{out} is not empty and holds no comparison. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        write_text(out / MARKER, "{}\n")
    with folder_lock(out, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg compare is at work in {out}. Wait for it, or choose another --out.")
        refuse_untrusted(out, trust)
        plans = make_plans(design, out, settings, epochs, device, trust_scan_affine, say)
        jobs = prepare_cells(design, out, plans, settings, robustness, training_score)
        _run(jobs, devices(device, workers), say)
        report = write_comparison(out, read_results(design, next(iter(plans.values())), jobs, settings))
        write_text(out / MARKER, json.dumps(report, indent=1, allow_nan=False) + "\n")
        return report


def _run(jobs: dict[Path, Cell], where: list[str], say: Say) -> None:
    todo = [job for job in jobs if not is_done(read_json(job))]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already.")
    start, ended = monotonic(), dict[Path, str]()

    def done(job: Path, problem: str) -> None:
        ended[job] = problem
        count = len(ended)
        left = (monotonic() - start) / count * (len(todo) - count) / 60
        rest = f"; about {max(left, 1):.0f} min left" if count < len(todo) else ""
        say(f"{count}/{len(todo)}  {jobs[job].name} {f'failed: {problem}' if problem else 'done'}{rest}")

    if todo:
        together = f", {len(where)} at the same time" if len(where) > 1 else ""
        say(f"{counted(len(todo), 'run')} to do on {', '.join(dict.fromkeys(where))}{together}.")
    run_jobs(todo, where, done)
    failed = [(jobs[job].name, problem) for job, problem in ended.items() if problem]
    if failed:
        name, problem = failed[0]
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed; {name}: {problem}. The others are kept: give the same command "
            "again to go on."
        )
