"""The commands that make a run: ``medseg plan`` and ``medseg train``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from medseg_supcon.cli import terminal
from medseg_supcon.cli.terminal import err, out, print_metrics, print_plan, print_report, printable, say
from medseg_supcon.errors import ConfigError, RunError

if TYPE_CHECKING:
    from medseg_supcon.slurm import Cluster
    from medseg_supcon.training import Request

LENGTH = "Length of the training; default: 80 epochs of 50 steps on a CPU, 60 of 250 on a GPU."
MINUTES = "Train for about M minutes on this machine. A few steps are timed first."
BUDGET = "Number of labelled scans to use, validation included (default: all). The others are treated as unlabelled."
RECIPE = "joint (the default), dice_ce, two_stage, semi, or your own .yaml file."
UNLABELLED = "Folder of more scans without labels, for recipes that use them."
TRACK = "mlflow: the curves of TensorBoard go to MLflow, too."
SEED = "Seed of the split, the weights and all random draws (default: 0)."
FOLDS = (
    "Train K runs in the folder (fold_0, fold_1, ...), each with other patients held out. 'medseg predict' uses them "
    "together. A fold key in the data list or nnU-Net's splits_final.json says which cases belong together."
)
WORKERS = "With --folds: number of folds at the same time (default: 1), each on a GPU of its own if there are several."
RunOption = Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run; it becomes a MONAI bundle.")]
RecipeOption = Annotated[str | None, typer.Option(metavar="NAME", help=RECIPE)]
EpochsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help=LENGTH)]
MinutesOption = Annotated[float | None, typer.Option(min=0.1, metavar="M", help=MINUTES)]
LabelsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help=BUDGET)]
UnlabelledOption = Annotated[Path | None, typer.Option(metavar="FOLDER", help=UNLABELLED)]
INIT = "Start from the weights of an earlier run, or of hippocampus, which comes with medseg."
InitOption = Annotated[Path | None, typer.Option(metavar="RUN", help=INIT)]
SeedOption = Annotated[int | None, typer.Option(min=0, metavar="N", help=SEED)]


def plan(
    dataset: terminal.DatasetArg,
    run: RunOption,
    recipe: RecipeOption = None,
    epochs: EpochsOption = None,
    minutes: MinutesOption = None,
    cases: terminal.CasesOption = None,
    labels: LabelsOption = None,
    validation: terminal.ValidationOption = None,
    unlabelled: UnlabelledOption = None,
    init: InitOption = None,
    seed: SeedOption = None,
    device: terminal.DeviceOption = None,
    settings: terminal.SettingsOption = None,
    mismatch: terminal.MismatchOption = False,
    trust: terminal.TrustOption = False,
) -> None:
    """Write the bundle that would be trained, with its expected time and memory. 'medseg train' continues from it."""
    from medseg_supcon.training import Request, check_device, prepare_dataset

    check_device(device)
    request = Request(recipe, epochs, minutes, cases, labels, validation, unlabelled, init, seed, settings, mismatch)
    made, split = prepare_dataset(dataset, run, request, show=print_report, device=device, trust=trust)
    print_plan(made, split, run)
    command = f"medseg train {quote(str(dataset))} --out {quote(str(run))}"
    out.print(f"\nEdit {printable(run / 'configs' / 'plan.json')} if you want to, then run: {printable(command)}")


def train(
    dataset: terminal.DatasetArg,
    run: RunOption,
    recipe: RecipeOption = None,
    epochs: EpochsOption = None,
    minutes: MinutesOption = None,
    cases: terminal.CasesOption = None,
    labels: LabelsOption = None,
    validation: terminal.ValidationOption = None,
    folds: Annotated[int | None, typer.Option(min=2, max=1000, metavar="K", help=FOLDS)] = None,
    unlabelled: UnlabelledOption = None,
    init: InitOption = None,
    seed: SeedOption = None,
    device: terminal.DeviceOption = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help=WORKERS)] = None,
    slurm: terminal.SlurmOption = None,
    settings: terminal.SettingsOption = None,
    track: Annotated[str | None, typer.Option(metavar="NAME", help=TRACK)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    mismatch: terminal.MismatchOption = False,
    trust: terminal.TrustOption = False,
) -> None:
    """Train a segmentation network on a data set; the run is a MONAI bundle."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MONAI imports MLflow, which reports its use
    from medseg_supcon.bundle import has_folds, is_planned, is_started
    from medseg_supcon.slurm import read_cluster
    from medseg_supcon.training import (
        Request,
        check_device,
        check_planned,
        check_tracker,
        extend_training,
        is_complete,
        prepare_dataset,
        train_run,
    )

    cluster = None if slurm is None else read_cluster(slurm)
    if cluster is None:
        check_device(device)  # the devices of a cluster's nodes are not here
    check_tracker(track)
    settings = [*(settings or []), *([f"track={track}"] if track else [])] or None
    request = Request(recipe, epochs, minutes, cases, labels, validation, unlabelled, init, seed, settings, mismatch)
    if has_folds(run) or (folds is not None and not is_planned(run)):
        _train_folds(dataset, run, folds, request, resume, device, workers, cluster, trust)
        return
    if folds is not None:
        raise RunError(f"{run} already contains a single run, not folds. Choose another --out, or leave --folds out.")
    if workers is not None:
        raise ConfigError("--workers is for --folds; a single run is trained by one process.")
    if cluster is not None:
        raise ConfigError("--slurm is for --folds; docs/workstation.md shows how a single run is a job.")
    if is_started(run) and not resume:
        raise RunError(f"{run} already contains a trained run. Choose another --out, or continue it with --resume.")
    if resume and epochs is not None and is_planned(run):
        extend_training(run, epochs)
        request = replace(request, epochs=None)
    if resume and is_complete(run):
        out.print(f"{printable(run)} is finished. There is nothing to resume.")
        return
    if is_planned(run):
        check_planned(dataset, run, request, resume=resume, show=print_report, trust=trust)
        err.print(printable(f"{'Resuming' if resume else 'Training'} the run planned in {run}."))
        if request.options():
            say(f"{', '.join(request.options())}: the values in plan.json and train.yaml are used", "note")
    else:
        made, split = prepare_dataset(dataset, run, request, show=print_report, device=device, trust=trust)
        print_plan(made, split, run)
    train_run(run, device=device, resume=resume, trust=trust)
    print_metrics(run / "eval" / "metrics.json")
    card, command = run / "docs" / "README.md", f"medseg predict {quote(str(run))} SCANS --out MASKS"
    out.print(f"\nThe run is in {printable(run)} (a MONAI bundle; {printable(card)} describes it).")
    out.print(f"Masks of new scans: {printable(command)}")


def _train_folds(
    dataset: Path, out_dir: Path, folds: int | None, request: Request, resume: bool, device: str | None, workers: int | None,
    cluster: Cluster | None, trust: bool,
) -> None:  # fmt: skip
    """Train a set of folds, or continue one."""
    from medseg_supcon.comparison import train_folds

    def tell(text: str) -> None:
        err.print(printable(text))

    report = train_folds(
        dataset, out_dir, folds, request, resume=resume, device=device, workers=workers, cluster=cluster, trust=trust,
        show=print_report, planned=print_plan, say=tell,
    )  # fmt: skip
    print_metrics(out_dir / "eval" / "metrics.json")
    for sentence in report["notes"]:
        out.print(printable(sentence))
    page, command = out_dir / "eval" / "review.html", f"medseg predict {quote(str(out_dir))} SCANS --out MASKS"
    out.print(f"\nThese are the scores of all cases, each by the fold that was not trained on it: {printable(page)}")
    out.print(f"Masks of new scans, by all folds together: {printable(command)}")
