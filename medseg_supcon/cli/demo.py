"""The command ``medseg demo``: the whole workflow on phantoms, from label maps to masks of scans not used in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_supcon.cli.predict import predict_into
from medseg_supcon.cli.terminal import DeviceOption, out, print_report, printable
from medseg_supcon.errors import RunError
from medseg_supcon.text import counted

CASES, TEST_CASES = 12, 4
EPOCHS = 5  # of 50 steps: about two minutes on two cores, all in all
MARKER = "medseg_demo.json"


def demo(
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")] = Path("medseg_demo"),
    device: DeviceOption = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the training.")] = EPOCHS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Run the whole workflow on generated phantoms: train, predict unseen scans, evaluate, draw."""
    from medseg_supcon.datasets import make_phantoms, read_dataset
    from medseg_supcon.evaluation import evaluate_folders, overlay_figure
    from medseg_supcon.inference import Predictor, find_scans
    from medseg_supcon.quality import folder_entries, write_page
    from medseg_supcon.training import Request, check_device, prepare_dataset, train_run

    check_device(device)
    _clear(folder, overwrite)
    data, run, masks, pictures = (folder / name for name in ("data", "run", "masks", "pictures"))
    out.print(f"1/4  Making {CASES} labelled phantoms and {TEST_CASES} for testing: {printable(data)}")
    make_phantoms(data, cases=CASES, unseen=TEST_CASES)
    (folder / MARKER).write_text('{"made by": "medseg demo"}\n')
    out.print(f"2/4  Training the joint recipe (Dice + contrast) for {counted(epochs, 'epoch')}: {printable(run)}")
    prepare_dataset(data, run, Request(epochs=epochs), show=print_report, device=device)
    train_run(run, device=device)
    out.print(f"3/4  Predicting the test scans: {printable(masks)}")
    scans = sorted((data / "imagesTs").glob("*.nii.gz"))
    predict_into(masks, Predictor(run, device=device), scans)
    out.print("4/4  Evaluating and drawing")
    labels = read_dataset(data).labels
    evaluate_folders(masks, data / "labelsTs", labels=labels, out=folder / "metrics")
    for scan in scans:
        picture = pictures / f"{scan.name.removesuffix('.nii.gz')}.png"
        overlay_figure(scan, data / "labelsTs" / scan.name, masks / scan.name, picture, labels)
    shutil.copyfile(run / "docs" / "curves.png", pictures / "curves.png")
    entries, _, notes = folder_entries(masks, find_scans([data / "imagesTs"]), data / "labelsTs")
    write_page(folder / "review.html", entries, labels, "Phantoms", notes)
    summary = json.loads((folder / "metrics" / "metrics.json").read_text())["summary"]
    out.print(_closing(folder, summary))


def _clear(folder: Path, overwrite: bool) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise RunError(f"{folder} contains files that no demo wrote. Choose another folder: medseg demo --out DIR")
        if not overwrite:
            raise RunError(f"{folder} contains an earlier demo. Replace it with --overwrite, or choose another --out.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _closing(folder: Path, summary: dict[str, Any]) -> str:
    dice = "\n".join(f"    {row['dice'] or 0:.3f}  {name}" for name, row in summary["classes"].items())
    root = printable(folder)
    return f"""
Dice on {TEST_CASES} phantoms that were not used in training:
{dice}
    {summary["mean"]["dice"] or 0:.3f}  mean

Results:
    {root}/pictures             scans with reference and prediction; training curves
    {root}/masks                the masks, each in the space of its scan; quality.csv says how far to trust each
    {root}/metrics/metrics.csv  scores per case and class
    {root}/run                  the run: a MONAI bundle (docs/README.md in it describes it)

With your own scans (NIfTI, with label maps for some):
    medseg check  DATASET                    report problems in them
    medseg train  DATASET --out RUN          train a network
    medseg predict RUN SCANS --out MASKS     write masks of new scans, and how far to trust each
    medseg review MASKS --scans SCANS --out review.html
    tensorboard --logdir {root}/run/logs

Without labels of your own: the network for hippocampi that comes with medseg. A phantom is not one, and medseg says so:
    medseg predict hippocampus {root}/data/imagesTs --out MASKS

The masks over their scans, worst first. Open this page in a browser:
    {(folder / "review.html").resolve().as_uri()}"""
