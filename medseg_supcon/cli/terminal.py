"""What the command line prints: sentences, tables, and nothing that a terminal would take for a command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json
from medseg_supcon.text import counted

# without markup: names and paths may contain [brackets]
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

EXIT_INPUT, EXIT_SOME_FAILED, EXIT_CLOSED_PIPE = 2, 3, 141


def printable(text: object) -> str:
    """A name or message on one line: control characters and line breaks, which file names may contain, as escapes.

    >>> printable("scan\\x1b[2J\\n.nii")
    'scan\\\\x1b[2J\\\\n.nii'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(console: Console, word: str, color: str, text: str) -> None:
    """Print a line that begins with a coloured word."""
    console.print(Text.assemble((f"{word:<7} ", color), printable(text)))


def end_at_closed_pipe(*_: object) -> None:
    """End quietly if nobody reads the output any more, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(EXIT_CLOSED_PIPE)


def out_of_memory(error: Exception) -> str:
    """Which memory was too small, and what to do."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
        return "out of memory. Close other programs, or use a machine with more memory."
    return (
        "out of GPU memory. Plan with fewer scans per step (--set plan::batch_size=2) or smaller patches (--set "
        "'plan::patch_size=[96,96,96]'), close other programs that use the GPU, or use --device cpu."
    )


def print_report(report: Any, console: Console = err) -> None:
    """Print the findings of a data set's check, and a closing sentence."""
    for finding in report.findings:
        color = "red" if finding.severity == "error" else "yellow"
        say(console, finding.severity, color, f"{finding.case or '(all)'}: {finding.message}")
    console.print(printable(report.summary()))


def print_plan(plan: dict[str, Any], split: Any, run: Path) -> None:
    """Print the plan in six lines."""
    from medseg_supcon.plan import plan_warnings

    expected = read_json(run / "logs" / "expected.json")
    minutes = round(expected["minutes"])
    time = f"about {counted(minutes, 'minute')}" if minutes else "less than a minute"
    fitted = f", fitted to {plan['minutes']:g} minutes on this machine" if "minutes" in plan else ""
    rows = {
        "cases": f"{len(split.training)} for training, {len(split.validation)} for validation, "
        f"{len(split.unlabelled)} unlabelled",
        "classes": ", ".join(plan["labels"]),
        "spacing": " x ".join(f"{s:g}" for s in plan["spacing"]) + f" mm ({plan['orientation']})",
        "patch": " x ".join(map(str, plan["patch_size"])) + f" voxels, {2 * plan['batch_size']} per step",
        "length": f"{counted(plan['epochs'], 'epoch')} of {counted(plan['steps_per_epoch'], 'step')}{fitted}",
        "expected": f"{time}, {expected['memory_gib']:.1f} GiB on {expected['machine']}",
    }
    err.print(printable(f"Plan: {run / 'configs' / 'plan.json'}"))
    for name, text in rows.items():
        err.print(f"  {name:<9} {printable(text)}")
    for warning in (*split.warnings, *plan_warnings(plan)):
        say(err, "warning", "yellow", warning)


def print_metrics(path: Path) -> dict[str, Any]:
    """Print mean scores per class and over classes from ``metrics.json``, and return its content."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from None
    table = Table("class", "Dice", "HD95 mm", "surface Dice", "cases", box=None, pad_edge=False)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    summary = report["summary"]
    for name, row in {**summary["classes"], "mean": summary["mean"]}.items():
        scores = [number(row[m], d) for m, d in (("dice", 4), ("hd95_mm", 2), ("surface_dice", 4))]
        table.add_row(printable(name), *scores, str(row["n"]) if name in summary["classes"] else "")
    wide = Console(width=10_000, highlight=False, markup=False)  # in a file names are not cut
    (out if out.is_terminal else wide).print(table)
    for warning in report.get("warnings", ()):
        say(err, "warning", "yellow", warning)
    for problem in report["problems"]:
        say(err, "not scored", "yellow", f"{problem['case']}: {problem['problem']}")
    seen = {row["case"] for row in report["rows"] if row.get("trained_on")}
    if seen:
        text = (
            f"the run was trained on {len(seen)} of {counted(summary['cases'], 'case')} (trained_on in metrics.csv): "
            "the scores of those say nothing about new scans. Choose other cases with --cases."
        )
        say(err, "warning", "yellow", text)
    return report
