"""``medseg demo``: the whole job on phantoms, from label maps to masks of scans that training never saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg_supcon.cli.terminal import predict_paths
from medseg_supcon.datasets import make_phantoms, read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.evaluation import evaluate_folders, overlay_figure
from medseg_supcon.training import check_device, prepare_run, train_run

EPOCHS = 10  # of 50 steps: about two minutes on two cores
MARKER = "medseg_demo.json"


def run_demo(
    out: Path,
    console: Console,
    *,
    device: str | None = None,
    epochs: int | None = None,
    cases: int = 12,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make phantoms, train the joint recipe, predict unseen scans, measure and draw.

    Args:
        out: folder to write; an earlier demo there is replaced only if ``overwrite``.
        console: where the story is told.
        device: ``"cpu"``, ``"cuda"``, ...; by default a GPU where there is one.
        epochs: shortens the training.
        cases: training scans to make.
        overwrite: replace an earlier demo.

    Returns:
        the summary of the unseen scans' metrics.

    Raises:
        RunError: the folder holds something else.
    """
    check_device(device)
    _clear(out, overwrite)
    data, run, masks = out / "data", out / "run", out / "masks"
    console.print(f"1/4  Making {cases} labelled phantoms and 4 unseen ones: {data}")
    make_phantoms(data, cases=cases, unseen=4)
    (out / MARKER).write_text('{"made by": "medseg demo"}\n')
    dataset = read_dataset(data)
    split = split_cases(dataset)
    length = epochs or EPOCHS
    console.print(f"2/4  Training the joint recipe (Dice + contrast) for {length} epochs: {run}")
    prepare_run(dataset, split, run, recipe="joint", epochs=length, device=device)
    train_run(run, device=device)
    console.print(f"3/4  Predicting the unseen scans: {masks}")
    scans = sorted((data / "imagesTs").glob("*.nii.gz"))
    predict_paths([run], scans, masks, device=device, overwrite=True)
    console.print("4/4  Measuring and drawing")
    evaluate_folders(masks, data / "labelsTs", labels=dataset.labels, out=out / "metrics")
    for scan in scans:
        overlay_figure(
            scan,
            data / "labelsTs" / scan.name,
            masks / scan.name,
            out / "pictures" / f"{scan.name.removesuffix('.nii.gz')}.png",
            dataset.labels,
        )
    shutil.copyfile(run / "docs" / "curves.png", out / "pictures" / "curves.png")
    summary: dict[str, Any] = json.loads((out / "metrics" / "metrics.json").read_text())["summary"]
    console.print(_closing(out, run, summary))
    return summary


def _clear(out: Path, overwrite: bool) -> None:
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        return
    if not (out / MARKER).exists():
        raise RunError(
            f"{out} is not empty and no earlier demo. Choose another folder: medseg demo --out DIR"
        )
    if not overwrite:
        raise RunError(f"{out} holds an earlier demo. Replace it with --overwrite, or choose another --out.")
    shutil.rmtree(out)
    out.mkdir(parents=True)


def _closing(out: Path, run: Path, summary: dict[str, Any]) -> str:
    dice = "\n".join(f"    {row['dice'] or 0:.3f}  {name}" for name, row in summary["classes"].items())
    return f"""
Dice on 4 phantoms that training never saw:
{dice}
    {summary["mean"]["dice"] or 0:.3f}  mean

What there is to look at:
    {out / "pictures"}           scans with reference and prediction; training curves
    {out / "masks"}              the masks, in their scans' own space
    {out / "metrics" / "metrics.csv"}  every case and class
    {run}                the run: a MONAI bundle ({run / "docs" / "README.md"} describes it)

With your own scans (NIfTI, with label maps for some):
    medseg check  DATASET                    what is wrong with them, if anything
    medseg train  DATASET --out RUN          a network for them
    medseg predict RUN SCANS --out MASKS     masks of new scans
    tensorboard --logdir {run / "logs"}"""
