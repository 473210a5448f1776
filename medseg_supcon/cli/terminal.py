"""What the command line prints: tables and closing sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from medseg_supcon.errors import RunError

# without markup: names and paths may hold [brackets]
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

EXIT_DONE, EXIT_INPUT, EXIT_SOME_FAILED = 0, 2, 3


def say(console: Console, word: str, color: str, text: str) -> None:
    """A line that begins with a coloured word."""
    console.print(Text.assemble((f"{word:<7} ", color), text))


def memory_ran_out(error: Exception) -> str:
    """Whose memory it was, and the cure."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
        return "memory ran out. Close other programs, or use a machine with more of it."
    return (
        "the GPU's memory ran out. Plan with fewer scans per step (--set plan::batch_size=2) or smaller patches (--set "
        "'plan::patch_size=[96,96,96]'), end what else uses the GPU, or take --device cpu."
    )


def print_report(report: Any, console: Console) -> None:
    """The findings of a data set's check, a table, and a closing sentence."""
    for finding in report.findings:
        color = "red" if finding.severity == "error" else "yellow"
        say(console, finding.severity, color, f"{finding.case or '(all)'}: {finding.message}")
    console.print(report.summary())


def print_plan(plan: dict[str, Any], split: Any, run: Path) -> None:
    """The plan in six lines."""
    from medseg_supcon.plan import plan_warnings

    expected = plan["expected"]
    cases = f"{len(split.training)} to train on, {len(split.validation)} to validate, {len(split.unlabelled)} unlabelled"
    rows = [
        ("cases", cases),
        ("classes", ", ".join(plan["labels"])),
        ("spacing", " x ".join(f"{s:g}" for s in plan["spacing"]) + f" mm ({plan['orientation']})"),
        ("patch", " x ".join(map(str, plan["patch_size"])) + f" voxels, {2 * plan['batch_size']} a step"),
        ("length", f"{plan['epochs']} epochs of {plan['steps_per_epoch']} steps"),
        (
            "expected",
            f"about {expected['minutes']:.0f} min, {expected['memory_gib']:.1f} GiB on {expected['machine']}",
        ),
    ]
    err.print(f"Plan: {run / 'configs' / 'plan.json'}")
    for name, text in rows:
        err.print(f"  {name:<9} {text}")
    for warning in (*split.warnings, *plan_warnings(plan)):
        say(err, "warning", "yellow", warning)


def print_metrics(path: Path) -> dict[str, Any]:
    """Mean scores per class and over classes, from ``metrics.json``, whose content is returned."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from None
    table = Table("class", "Dice", "HD95 mm", "surface Dice", "cases", box=None, pad_edge=False)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    summary = report["summary"]
    for name, row in {**summary["classes"], "mean": summary["mean"]}.items():
        scores = [number(row[m], d) for m, d in (("dice", 4), ("hd95_mm", 2), ("surface_dice", 4))]
        table.add_row(name, *scores, str(row["n"]) if name in summary["classes"] else "")
    out.print(table)
    for warning in report.get("warnings", ()):
        say(err, "warning", "yellow", warning)
    for problem in report["problems"]:
        say(err, "not scored", "yellow", f"{problem['case']}: {problem['problem']}")
    return report


def predict_paths(
    runs: Sequence[Path],
    scans: Sequence[Path],
    folder: Path,
    *,
    probabilities: bool = False,
    tta: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    trust: bool = False,
) -> int:
    """Predict scans into a folder with a progress display; a failed scan is a sentence on stderr.

    Returns:
        exit code: 0 all done, 3 some failed, 2 all failed.
    """
    from medseg_supcon.inference import Predictor

    predictor = Predictor(list(runs), device=device, tta=tta, trust=trust)
    if tta and not any(model.plan["flip_axes"] for model in predictor.models):
        say(
            err,
            "note",
            "yellow",
            "--tta changes nothing here: plan.json allows no flip_axes (classes that tell left from right).",
        )
    found = predictor.find_scans(scans)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err,
        disable=not err.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("predicting", total=len(found))

        def progress(done: int, total: int, entry: dict[str, Any]) -> None:
            bar.update(task, completed=done)
            if entry["status"] == "failed":
                say(err, "failed", "red", entry["error"])
            for warning in entry.get("warnings", []):
                say(err, "warning", "yellow", f"{entry['name']}: {warning}")

        counts = predictor.run(found, folder, probabilities, overwrite, progress)["summary"]
    parts = [f"{counts['done']} predicted"]
    parts += [f"{counts['skipped']} there already (redo with --overwrite)"] if counts["skipped"] else []
    parts += [f"{counts['failed']} failed"] if counts["failed"] else []
    out.print(f"{folder}: {', '.join(parts)}; manifest.json lists every scan.")
    if not counts["failed"]:
        return EXIT_DONE
    return EXIT_SOME_FAILED if counts["done"] + counts["skipped"] else EXIT_INPUT
