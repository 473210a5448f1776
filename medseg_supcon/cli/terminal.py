"""Options that several commands share, and printing without control characters."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json
from medseg_supcon.text import counted

# without markup: names and paths may contain [brackets]
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

EXIT_INPUT, EXIT_SOME_FAILED = 2, 3
DRIVER = Path("/proc/driver/nvidia/version")  # exists while NVIDIA's driver is loaded


def printable(text: object) -> str:
    """A name or message on one line: control characters and line breaks, which file names may contain, as escapes.

    >>> printable("scan\\x1b[2J\\n.nii")
    'scan\\\\x1b[2J\\\\n.nii'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: str, word: str = "warning", color: str = "yellow", console: Console = err) -> None:
    """Print a line that begins with a coloured word."""
    console.print(Text.assemble((f"{word:<7} ", color), printable(text)))


def warn_of_unused_gpu(device: str | None) -> str | None:
    """Warn before a long training if torch cannot use the GPU."""
    if device is not None or not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return device
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        reason = " ".join(str(w.message) for w in caught) or "it finds no GPU"
        reason = "it is a CPU build" if torch.version.cuda is None else reason
        say(
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it ({reason}), so the CPU is used. "
            "Install a torch build that matches the GPU's driver. In a container, add --gpus all. To use the CPU "
            "without this warning, pass --device cpu."
        )
    return device


DatasetArg = Annotated[
    Path, typer.Argument(metavar="DATASET", help="Decathlon folder, nnU-Net v2 raw folder, or MONAI datalist JSON.")
]
TRAINED = "A trained run (a MONAI bundle), or hippocampus, which comes with medseg."
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help=TRAINED)]
CASES = "File with the names of the cases to use, one per line."
CasesOption = Annotated[Path | None, typer.Option(metavar="FILE", help=CASES)]
DEVICE = "cpu, cuda or cuda:1; default: the first GPU, or the CPU."
DeviceOption = Annotated[str | None, typer.Option(callback=warn_of_unused_gpu, metavar="NAME", help=DEVICE)]
SLURM = (
    "Run each as a job of a Slurm cluster: sbatch's options, such as time=02:00:00. "
    "With --workers N, at most N jobs are in the queue."
)
SlurmOption = Annotated[str | None, typer.Option(metavar="KEY=VALUE,...", help=SLURM)]
MISMATCH = "If the affine of a label map differs from its scan's, use the scan's."
MismatchOption = Annotated[bool, typer.Option("--allow-affine-mismatch", help=MISMATCH)]
SETTINGS = "Set a key of train.yaml, or plan::KEY. Can be repeated."
SettingsOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SETTINGS)]
SHARE = "Share of the labelled scans used for validation (default: 0.15); with 0, all are used for training."
ValidationOption = Annotated[float | None, typer.Option(min=0, max=0.9, metavar="SHARE", help=SHARE)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
TRUST = "Allow the run's own code. Use it only for runs from people you trust."
TrustOption = Annotated[bool, typer.Option("--trust", help=TRUST)]


def read_selected(path: Path, cases: Path | None) -> Any:
    """A data set, or the cases of it that a file names."""
    from medseg_supcon.datasets import read_case_names, read_dataset

    dataset = read_dataset(path)
    return dataset if cases is None else dataset.select(read_case_names(cases))


def refuse_to_overwrite(file: Path, overwrite: bool) -> None:
    """Refuse if a file exists, unless the user passed --overwrite."""
    if file.exists() and not overwrite:
        raise RunError(f"{file} already exists. Replace it with --overwrite, or choose another --out.")


def print_report(report: Any, console: Console = err) -> None:
    """Print the findings of a data set's check, and a closing sentence."""
    for finding in report.findings:
        color = "red" if finding.severity == "error" else "yellow"
        say(f"{finding.case or '(all)'}: {finding.message}", finding.severity, color, console)
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
        **({"regions": ", ".join(plan["regions"])} if "regions" in plan else {}),
        "spacing": " x ".join(f"{s:g}" for s in plan["spacing"]) + f" mm ({plan['orientation']})",
        "patch": " x ".join(map(str, plan["patch_size"])) + f" voxels, {2 * plan['batch_size']} per step",
        "length": f"{counted(plan['epochs'], 'epoch')} of {counted(plan['steps_per_epoch'], 'step')}{fitted}",
        "expected": f"{time}, {expected['memory_gib']:.1f} GiB on {expected['machine']}, in {expected['precision']}",
    }
    err.print(printable(f"Plan: {run / 'configs' / 'plan.json'}"))
    for name, text in rows.items():
        err.print(f"  {name:<9} {printable(text)}")
    for warning in (*split.warnings, *plan_warnings(plan)):
        say(warning)


def print_metrics(path: Path) -> dict[str, Any]:
    """Print mean scores per class and over classes from ``metrics.json``, and return its content."""
    report = read_json(path)
    table = Table("class", "Dice", "HD95 mm", "surface Dice", "cases", box=None, pad_edge=False)
    summary, digits = report["summary"], {"dice": 4, "hd95_mm": 2, "surface_dice": 4}
    for name, row in {**summary["classes"], "mean": summary["mean"]}.items():
        scores = ["-" if row[metric] is None else f"{row[metric]:.{n}f}" for metric, n in digits.items()]
        table.add_row(printable(name), *scores, str(row["n"]) if name in summary["classes"] else "")
    wide = Console(width=10_000, highlight=False, markup=False)  # in a file names are not cut
    (out if out.is_terminal else wide).print(table)
    for warning in report.get("warnings", ()):
        say(warning)
    for problem in report["problems"]:
        say(f"{problem['case']}: {problem['problem']}", "not scored")
    if seen := {row["case"] for row in report["rows"] if row.get("trained_on")}:
        say(
            f"the run was trained on {len(seen)} of {counted(summary['cases'], 'case')} (trained_on in metrics.csv), "
            "and their scores say nothing about new scans. Choose other cases with --cases."
        )
    return report
