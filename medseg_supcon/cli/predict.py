"""The command ``medseg predict``: masks of new scans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from medseg_supcon.cli import terminal
from medseg_supcon.cli.terminal import err, out, printable, say
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.text import counted

BELOW = (
    "A mask is good if the lower end of its predicted Dice is at least DICE. Default: from the run's validation scans."
)
PICTURES = "Also write review.html, a page that shows scans and masks, worst first."
MIRROR = "Average over mirrored scans (slower), unless a class name says left or right."
AMP = (
    "Half precision: about half the time, and a few voxels per thousand of a mask change. Default: on GPUs, not on CPUs; "
    "there it needs bfloat16 instructions."
)
DEVICES = f"{terminal.DEVICE} Several, such as cuda:0,cuda:1: one process for each, which share the scans."
SEG = "Also write a DICOM segmentation (NAME.seg.dcm) of each DICOM series."


def predict(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... SCAN...",
            help="A run, or hippocampus, which comes with medseg (several runs, or a folder of folds, make an ensemble). "
            "Then scans: files, folders or DICOM series folders.",
            readable=False,  # one without permission is reported, and the others are done
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the masks.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write class probabilities.")] = False,
    tta: Annotated[bool, typer.Option("--tta", help=MIRROR)] = False,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help=AMP)] = None,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help=SEG)] = False,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Say how far to trust each mask.")] = True,
    review_below: Annotated[float | None, typer.Option(min=0, max=1, metavar="DICE", help=BELOW)] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help=PICTURES)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that exist.")] = False,
    device: Annotated[
        str | None, typer.Option(callback=terminal.warn_of_unused_gpu, metavar="NAME,...", help=DEVICES)
    ] = None,
    trust: terminal.TrustOption = False,
) -> None:
    """Write masks of new scans, each in the space of its scan. Exit code 3 if some scans failed, 2 if all failed."""
    from medseg_supcon.bundle import find_run, has_folds, is_planned
    from medseg_supcon.inference import Predictor
    from medseg_supcon.training import check_device, has_bfloat16

    for name in () if device is None else device.split(","):
        check_device(name)
    # the first is a run; of the others, a file or folder may have the name of a bundle that ships
    given = [path if number and os.path.lexists(path) else find_run(path) for number, path in enumerate(run)]
    runs = [path for path in given if is_planned(path) or has_folds(path)]
    scans = [path for path in given if path not in runs]
    if not runs:
        usage = "Usage: medseg predict RUN SCAN... --out DIR"
        raise RunError(f"{run[0]} is not a run: it has no configs/plan.json. {usage}")
    if not scans:
        raise ConfigError(f"No scan given. Usage: medseg predict {run[0]} SCAN... --out DIR")
    predictor = Predictor(
        runs, device=device, tta=tta, trust=trust, amp=amp, quality=quality, review_below=review_below
    )
    if tta and not any(model.plan["flip_axes"] for model in predictor.models):
        say("--tta has no effect: flip_axes in plan.json is empty, because class names say left or right.", "note")
    if amp and predictor.device.type == "cpu" and not has_bfloat16():
        say("--amp: this CPU has no bfloat16 instructions. It takes longer than without.", "note")
    counts = predict_into(out_dir, predictor, scans, probabilities, overwrite, dicom_seg, pictures)
    if counts["failed"]:
        some = counts["done"] + counts["skipped"]
        raise typer.Exit(terminal.EXIT_SOME_FAILED if some else terminal.EXIT_INPUT)


def predict_into(
    folder: Path,
    predictor: Any,
    scans: Sequence[Path],
    probabilities: bool = False,
    overwrite: bool = False,
    dicom_seg: bool = False,
    pictures: bool = False,
) -> dict[str, int]:
    """Predict scans into a folder with a progress display; a failed scan is a sentence on stderr.

    Returns how many scans are ``done``, ``skipped`` and ``failed``.
    """
    from medseg_supcon.quality import urgency

    for warning in predictor.warnings:
        say(warning)
    chosen = predictor.find_scans(scans)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("predicting", total=len(chosen))

        def progress(done: int, total: int, entry: dict[str, Any]) -> None:
            bar.update(task, completed=done)
            if entry["status"] == "failed":
                say(entry["error"], "failed", "red")
            for warning in entry.get("warnings", []):
                say(f"{entry['name']}: {warning}")

        manifest = predictor.run(chosen, folder, probabilities, overwrite, progress, dicom_seg, pictures)
    counts: dict[str, int] = manifest["summary"]
    parts = [f"{counted(counts['done'], 'scan')} predicted"]
    parts += [f"{counts['skipped']} already exist (replace them with --overwrite)"] if counts["skipped"] else []
    parts += [f"{counts['failed']} failed"] if counts["failed"] else []
    out.print(f"{printable(folder)}: {', '.join(parts)}; manifest.json lists every scan.")
    rated = [entry for entry in manifest["scans"] if entry["status"] != "failed" and entry.get("quality")]
    worst_first = sorted(rated, key=lambda entry: urgency(entry, entry["name"]))
    doubtful = [e["name"] for e in worst_first if e["quality"]["verdict"] in ("reject", "review")]
    if doubtful:
        names = ", ".join(doubtful[:5]) + (f" and {len(doubtful) - 5} more" if len(doubtful) > 5 else "")
        needs = "needs" if len(doubtful) == 1 else "need"
        share = f"{len(doubtful)} of {counted(len(rated), 'mask')} {needs} a look"
        out.print(f"{printable(folder)}: {share}: {printable(names)} (quality.csv says why).")
    if pictures:
        out.print(f"Open {printable(folder / 'review.html')} in a browser.")
    return counts
