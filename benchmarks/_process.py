"""Measures commands from outside, in a process that imports nothing large: its own peak would count as theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cost:
    """What a command cost.

    Attributes:
        seconds: wall-clock time from start to end.
        cpu: processor seconds, user and system, of the command and of all processes that it started and waited for.
        peak: largest resident set in MiB (the system's ``ru_maxrss``).
        output: what it printed.
    """

    seconds: float
    cpu: float
    peak: float
    output: str


def run(
    command: Sequence[object], threads: int, log: Path | None = None, variables: Mapping[str, object] | None = None
) -> Cost:
    """Run a command from the checkout with a number of threads; its stderr goes to ``log``, and is shown if it fails."""
    environment = dict(os.environ) | {name: str(value) for name, value in (variables or {}).items()}
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "nnUNet_def_n_proc"):
        environment[variable] = str(threads)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as printed, log.open("wb+") if log else tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, cwd=ROOT, stdout=printed, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        said.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"{command} ended with {process.returncode}:\n{said.read().decode()[-3000:]}")
        cpu = usage.ru_utime + usage.ru_stime
        return Cost(seconds, cpu, usage.ru_maxrss / 1024, printed.read().decode())


def make(
    scan: Path,
    run_folder: Path,
    shape: Sequence[int],
    spacing: Sequence[float],
    organs: int,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Make a scan, unless it exists, and a run for it (see `benchmarks._scan`); return the run's plan."""
    wanted = {"scan": str(scan), "run": str(run_folder), "shape": shape, "spacing": spacing}
    arguments = json.dumps({**wanted, "organs": organs, "changes": changes})
    run([sys.executable, "-m", "benchmarks._scan", arguments], 1)
    plan: dict[str, Any] = json.loads((run_folder / "configs" / "plan.json").read_text())
    return plan


def machine(threads: int) -> str:
    """One line with the processor, the threads and the versions."""
    from importlib.metadata import version

    names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else "unknown processor"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "monai"))
    return f"{model}, {threads} threads of {os.cpu_count()} cores, {versions}"


def times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
