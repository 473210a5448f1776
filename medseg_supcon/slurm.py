"""Runs as jobs of a Slurm cluster, by submitit: submitted once, waited for, requeued and resumed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.text import counted, exit_problem

Task = Callable[[], str]  # picklable; returns what went wrong, or an empty string
Say = Callable[[str], None]
EXAMPLE = "--slurm partition=gpu,gres=gpu:1,time=02:00:00"
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
# Options of sbatch that would break a job: it is one process, and its files and signals are submitit's.
OURS = "array error input job-name nodes ntasks ntasks-per-node open-mode output parsable signal wait wrap"
REQUEUES = 20  # how often a job whose time is up goes on from its checkpoint
LATE = 15.0  # seconds after which a file that another machine wrote is seen here
FIRST_LOOK, LONGEST_PAUSE = 1.0, 20.0  # seconds between two questions to Slurm
QUEUED = ("None", "Priority", "Resources", "BeginTime", "Licenses", "JobArrayTaskLimit", "Dependency", "Cleaning")
# Slurm sends these to all processes of a job before it preempts the job, or its time is up: the first one decides what to do.
SHIELD = ("sh", "-c", 'trap "" TERM USR2; exec "$@"', "sh")
# submitit's own start is ``python -m``, which imports modules from the working folder before Python's own.
START = """
import sys; sys.path = [p for p in sys.path if p]
from submitit.core.submission import process_job; process_job(sys.argv[-1])
"""


@dataclass(frozen=True)
class Cluster:
    """What ``--slurm`` says.

    Attributes:
        minutes: how long one job may take before it is requeued.
        options: sbatch's own, without the dashes: ``{"partition": "gpu", "gres": "gpu:1"}``.
        executor: "slurm", or "local": processes of this machine, to try it.
    """

    minutes: int
    options: dict[str, str] = field(default_factory=dict)
    executor: str = "slurm"


def read_cluster(text: str) -> Cluster:
    """The cluster of ``--slurm KEY=VALUE,...``; `ConfigError` if that cannot be, or Slurm or submitit is missing.

    A part without "=" belongs to the value before it, as in ``partition=gpu,long``.

    >>> read_cluster("executor=local,time=1-12")
    Cluster(minutes=2160, options={}, executor='local')
    """
    options: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        key = key.strip().lstrip("-").replace("_", "-") if equals else next(reversed(options), "")
        if not key:
            raise ConfigError(f"--slurm {text}: must be KEY=VALUE pairs, separated by commas, such as {EXAMPLE}")
        if equals and key in options:
            raise ConfigError(f"--slurm: {key} is given twice. Give each key once.")
        options[key] = value.strip() if equals else f"{options[key]},{part.strip()}"
    if bad := [key for key in options if key in OURS.split() or not re.fullmatch("[a-z][a-z0-9-]*", key)]:
        raise ConfigError(f"--slurm: {bad[0]} cannot be set, because each run is one job of one process. Remove it.")
    if bad := [key for key, value in options.items() if not value or not value.isprintable()]:
        raise ConfigError(f"--slurm: {bad[0]} has no value. Write KEY=VALUE; an option without a value is KEY=true.")
    executor, time = options.pop("executor", "slurm"), options.pop("time", None)
    if executor not in ("slurm", "local"):
        raise ConfigError(f"--slurm: executor must be slurm or local, found {executor!r}.")
    if time is None:
        needed = "add time=HH:MM:SS, how long one job may take. When its time is up, it is requeued and goes on"
        raise ConfigError(f"--slurm {text}: {needed}. An example: {EXAMPLE}")
    if importlib.util.find_spec("submitit") is None:
        cure = "Run: pip install 'medseg-supcon[slurm]'"
        raise ConfigError(f"--slurm needs submitit, which is not installed. {cure}")
    if missing := [name for name in ("sbatch", "squeue", "srun") if executor == "slurm" and not shutil.which(name)]:
        where = "Use a login node of the cluster, or try it on this machine with --slurm executor=local,time=02:00:00"
        raise ConfigError(f"--slurm: this machine has no {missing[0]}. {where}")
    return Cluster(_minutes(time), options, executor)


def _minutes(time: str) -> int:
    """Whole minutes of a time in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = TIME.fullmatch(time)
    numbers = list(map(int, match["fields"].split(":"))) if match else [0]
    if match and match["days"]:
        numbers = [int(match["days"]) * 24 + numbers[0], *numbers[1:], 0, 0][:3]
    elif len(numbers) < 3:
        numbers = [0, *numbers, 0][:3]
    minutes = math.ceil(numbers[0] * 60 + numbers[1] + numbers[2] / 60)
    if not 0 < minutes < 10**7:
        raise ConfigError(
            f"--slurm: time must be like 02:00:00 (hours, minutes, seconds) or 1-12 (days, hours), found {time!r}."
        )
    return minutes


@dataclass(frozen=True)
class Command:
    """A task that is a command of ours in a process of its own, which writes all that it prints to ``log``."""

    arguments: Sequence[str]
    log: Path

    def __call__(self) -> str:
        with self.log.open("wb") as stream:
            process = subprocess.Popen([*SHIELD, *self.arguments], stdout=stream, stderr=stream)
            try:
                return exit_problem(process.wait(), self.log)
            finally:  # also if the job's time is up
                process.kill()
                process.wait()


def run_on_cluster(
    tasks: Mapping[str, Task], cluster: Cluster, folder: Path, done: Callable[[str, str], None], say: Say,
    at_once: int | None = None,
) -> None:  # fmt: skip
    """Run each task as a job; ``done(name, problem)`` is called here after each, with what went wrong ("": nothing).

    A job that is preempted, or whose time is up, is requeued and calls its task again. Jobs go on if this process ends: the
    next call with the same folder waits for those that are still in the queue and submits the others.

    Args:
        tasks: by name, which becomes part of file names.
        folder: that all machines see; gets submitit's files, and NAME.json and NAME.outcome.json of each task.
        at_once: the number of jobs in the queue; None: all on a cluster, one on this machine.

    Raises:
        RunError: sbatch refuses a job, or Slurm cannot use the folder.
    """
    folder = folder.resolve()
    if "%" in str(folder):
        raise RunError(
            f"{folder}: a path with % cannot be used with --slurm, because Slurm replaces it. Choose another --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    at_once = at_once or (1 if cluster.executor == "local" else len(tasks))
    jobs: dict[str, _Job] = {}
    for name in tasks:  # of an earlier call
        job = _Job.read(folder, name)
        if job is not None and job.outcome() is None and job.name in _alive([job]):
            say(f"{name}: waiting for {job.label}, which an earlier call submitted.")
            jobs[name] = job
    waiting = [name for name in tasks if name not in jobs]
    pause, next_look = FIRST_LOOK, monotonic() + FIRST_LOOK
    told, ended = dict[str, str](), dict[str, float]()
    try:
        while jobs or waiting:
            while waiting and len(jobs) < at_once:
                name = waiting.pop(0)
                jobs[name] = _submit(name, tasks[name], cluster, folder)
                say(f"{name}: submitted as {jobs[name].label}")
                pause = FIRST_LOOK
            sleep(min(0.5, FIRST_LOOK))
            with suppress(OSError):  # makes a network drive look at the folder again
                folder.chmod(folder.stat().st_mode)
            for name, job in list(jobs.items()):
                problem = job.outcome()
                if problem is None and name in ended and monotonic() - ended[name] >= job.patience:
                    problem = job.end()
                if problem is not None:
                    job.leave()
                    del jobs[name]
                    done(name, problem)
            if monotonic() >= next_look:
                alive = _alive(list(jobs.values()))
                for name in jobs:
                    if name not in alive:
                        ended.setdefault(name, monotonic())
                    elif (reason := alive[name]) and told.get(name) != reason:
                        say(f"{name}: {jobs[name].label} waits in the queue: {reason}")
                        told[name] = reason
                    ended = {n: t for n, t in ended.items() if n not in alive}
                next_look, pause = monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
    except KeyboardInterrupt:
        if jobs:
            ids = " ".join(job.number for job in jobs.values())
            command = "scancel" if cluster.executor == "slurm" else "kill"
            say(
                f"{counted(len(jobs), 'job')} may go on: run the same command again to wait for them, or {command} {ids}"
            )
        raise


@dataclass(frozen=True)
class _Job:
    """A submitted job, as its file in the folder says."""

    folder: Path
    name: str
    number: str  # Slurm's id, or that of the process
    executor: str
    handle: Any = None  # submitit's, if this process submitted it

    @classmethod
    def read(cls, folder: Path, name: str) -> _Job | None:
        with suppress(MedsegError, KeyError):
            saved = read_json(folder / f"{name}.json")
            return cls(folder, name, str(saved["job"]), str(saved["executor"]))
        return None

    @property
    def label(self) -> str:
        return f"{'Slurm job' if self.executor == 'slurm' else 'process'} {self.number}"

    @property
    def patience(self) -> float:
        """Seconds to wait for the outcome of a job that is not in the queue any more."""
        return LATE if self.executor == "slurm" else 0.0

    def outcome(self) -> str | None:
        """What went wrong, or an empty string; None if the job has not said so yet."""
        with suppress(MedsegError, KeyError):
            saved = read_json(self.folder / f"{self.name}.outcome.json")
            return str(saved["problem"]) if saved["job"] == self.number else None
        return None

    def leave(self) -> None:
        """Wait for the process of a job on this machine, which ends soon after the outcome is written."""
        while self.executor == "local" and self.handle is not None and not self.handle.done():
            sleep(0.01)

    def end(self) -> str:
        """Why a job ended without an outcome, as far as Slurm knows."""
        state = "was stopped"
        if self.executor == "slurm":
            shown = _ask("scontrol", "--oneliner", "show", "job", self.number) or ""
            found = re.search(r"JobState=(\w+)", shown) or re.match(r"(\w+)", self._accounting())
            state = f"ended as {found[1]}" if found else "ended"
        return f"{self.label} {state}; see {self.folder / f'{self.number}_0_log.out'}"

    def _accounting(self) -> str:
        command = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={self.number}")
        return _ask(*command) or ""


def _ask(*command: str) -> str | None:
    """What one of Slurm's commands prints; None if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
        return answer.stdout if answer.returncode == 0 else None
    return None


def _alive(jobs: list[_Job]) -> dict[str, str]:
    """The names of jobs that are queued or running, each with the reason why it may wait long ("": none).

    If Slurm does not answer, all are.
    """
    alive = {job.name: "" for job in jobs if job.executor == "local" and _is_running(job)}
    if slurm := [job for job in jobs if job.executor == "slurm"]:
        queue = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%i %t %r")
        if queue is None:
            return alive | {job.name: "" for job in slurm}
        listed = {line.split()[0]: line.split(maxsplit=2)[1:] for line in queue.splitlines() if line.strip()}
        for job in slurm:
            if job.number in listed:
                state, *reason = listed[job.number]
                told = reason[0] if state == "PD" and reason else ""
                alive[job.name] = "" if told.strip("()") in QUEUED else told
    return alive


def _is_running(job: _Job) -> bool:
    """Whether submitit's process of a job on this machine runs; another one may have got its number."""
    with suppress(psutil.Error, ValueError):
        process = psutil.Process(int(job.number))
        return process.status() != psutil.STATUS_ZOMBIE and str(job.folder) in process.cmdline()
    return False


def _submit(name: str, task: Task, cluster: Cluster, folder: Path) -> _Job:
    import submitit

    kind = cluster.executor
    python = f"{shlex.quote(sys.executable)} -u -W ignore -c {shlex.quote(START)}"
    executor = submitit.AutoExecutor(
        folder, cluster=kind, **{f"{kind}_python": python, f"{kind}_max_num_timeout": REQUEUES}
    )
    executor.update_parameters(name=f"medseg-{name}", timeout_min=cluster.minutes, stderr_to_stdout=True)
    if kind == "slurm":
        options: dict[str, Any] = {key: True if value == "true" else value for key, value in cluster.options.items()}
        # since Slurm 22.05, srun does not take this over from sbatch
        cores = [f"--cpus-per-task={value}" for key, value in cluster.options.items() if key == "cpus-per-task"]
        executor.update_parameters(slurm_additional_parameters={"requeue": True} | options, slurm_srun_args=cores)
    (folder / f"{name}.outcome.json").unlink(missing_ok=True)
    try:
        submitted = executor.submit(_Attempt(name, task, folder))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        said = " ".join(str(error).split()).removeprefix("sbatch: error: ")
        raise RunError(f"sbatch refused {name}: {said}. Check --slurm.") from None
    job = _Job(folder, name, str(submitted.job_id), kind, submitted)
    write_text(folder / f"{name}.json", json.dumps({"job": job.number, "executor": kind}) + "\n")
    return job


@dataclass(frozen=True)
class _Attempt:
    """What a job calls, every time that it is started: the task, and then it writes the outcome."""

    name: str
    task: Task
    folder: Path

    def __call__(self) -> None:
        import submitit

        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("OMP_NUM_THREADS", cores)
        write = partial(self._write, submitit.JobEnvironment().job_id)
        try:
            write(self.task())
        except MedsegError as error:
            write(str(error))
        except Exception as error:  # the log has its traceback
            write(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise

    def checkpoint(self) -> Any:
        """submitit calls this before it requeues the job: its task finds its own checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _write(self, job: str, problem: str) -> None:
        write_text(self.folder / f"{self.name}.outcome.json", json.dumps({"job": job, "problem": problem}) + "\n")
