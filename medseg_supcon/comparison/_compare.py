"""``medseg compare``: prepare every run, train and test what is not done yet, and write what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from medseg_supcon.comparison._cell import is_done, run_cell
from medseg_supcon.comparison._design import Cell, Design
from medseg_supcon.comparison._findings import write_findings
from medseg_supcon.comparison._runs import conditions_of, make_plans, prepare_cells
from medseg_supcon.comparison._workers import devices, run_jobs
from medseg_supcon.errors import RunError
from medseg_supcon.files import alone, write_text

MARKER = "comparison.json"
Say = Callable[[str], None]


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
    say: Say = print,
    processes: bool = True,
) -> dict[str, Any]:
    """Train and test every run of a design, and write tables, pictures and ``report.html``.

    What is finished is kept and what is half done goes on, so the same call can be made again.

    Args:
        design: of `design_comparison`.
        out: folder of the comparison; new, or of an earlier call.
        epochs: of every run; by default what fits the planned time of the first plan.
        settings: (key, value) overrides for all runs, as of ``medseg train --set``.
        device: of all runs; by default every GPU there is, else the CPU.
        workers: runs at once; by default one on each device. On a CPU they divide its threads: a run's figures
            depend on its seed and its number of threads, not on what runs beside it.
        robustness: test on corrupted scans, too.
        training_score: Dice on the scans trained on, too.
        trust_scan_affine: as ``medseg train --allow-affine-mismatch``.
        say: told what is going on, in lines.
        processes: False: run everything in this process, quietly.

    Returns:
        what ``comparison.json`` holds.

    Raises:
        RunError: the folder holds something else, another call is at work in it, an earlier run was made
            otherwise, or a run failed.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise RunError(f"{out} is not empty and holds no comparison. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        write_text(out / MARKER, "{}\n")
    with alone(out, wait=False) as free:
        if not free:
            raise RunError(
                f"Another medseg compare is at work in {out}. Wait for it, or choose another --out."
            )
        plans = make_plans(
            design, out, settings=settings, epochs=epochs, device=device, trust_scan_affine=trust_scan_affine, say=say
        )  # fmt: skip
        conditions = conditions_of(robustness)
        jobs = prepare_cells(design, out, plans, settings, conditions, training_score)
        _run(jobs, devices(device, workers), say, processes)
        found = write_findings(design, out, next(iter(plans.values())), conditions, settings, training_score)
        write_text(out / MARKER, json.dumps(found, indent=1, allow_nan=False) + "\n")
        return found


def _run(jobs: dict[Path, Cell], where: list[str], say: Say, processes: bool) -> None:
    todo = [job for job in jobs if not is_done(json.loads(job.read_text()))]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already.")
    start, failed, count = monotonic(), {}, 0

    def done(job: Path, problem: str) -> None:
        nonlocal count
        count += 1
        if problem:
            failed[jobs[job].name] = problem
        left = (monotonic() - start) / count * (len(todo) - count) / 60
        state = f"failed: {problem}" if problem else "done"
        say(
            f"{count}/{len(todo)}  {jobs[job].name} {state}"
            + (f"; about {left:.0f} min left" if left else "")
        )

    if todo:
        at_once = f", {len(where)} at once" if len(where) > 1 else ""
        say(f"{len(todo)} runs to do on {', '.join(dict.fromkeys(where))}{at_once}.")
    if processes:
        run_jobs(todo, where, done)
    else:
        for job in todo:
            run_cell(json.loads(job.read_text()), where[0], quiet=True)
            done(job, "")
    if failed:
        name, problem = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed; {name}: {problem}. The others are kept: the same "
            "command goes on from here."
        )
