"""The command ``medseg evaluate``: scores of a run, or of masks, case by case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.options import CasesOption, DeviceOption
from medseg_supcon.cli.terminal import EXIT_SOME_FAILED, out, print_metrics
from medseg_supcon.cli.train import read_selected
from medseg_supcon.errors import ConfigError, DataError, MedsegError, RunError

ONLY_OF_TRAINING = ("duplicate_image", "no_structure")  # faults that do not keep a case from being scored


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A trained run.")] = None,
    dataset: Annotated[
        Path | None, typer.Argument(help="A data set, whose labelled cases are scored.")
    ] = None,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for metrics.csv and metrics.json.")
    ] = Path("evaluation"),
    cases: CasesOption = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Masks to score, instead of RUN and DATASET.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Label maps to compare --predictions with.")
    ] = None,
    ignore_label: Annotated[
        float | None,
        typer.Option(metavar="VALUE", help="With --references: their value that means 'not annotated'."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Dice, HD95 (mm), surface Dice and volumes (ml) per case and class, as CSV and JSON.

    Of a run on a data set (with --cases, choose cases that it was not trained on), or of masks that are there
    (--predictions and --references). Exit code 3 where some cases could not be scored.
    """
    if (predictions is None) != (references is None):
        raise ConfigError("--predictions and --references belong together: give both folders.")
    if predictions is not None and references is not None:
        from medseg_supcon.evaluation import evaluate_folders

        evaluate_folders(predictions, references, out=out_dir, ignore_label=ignore_label)
    elif ignore_label is not None:
        raise ConfigError("--ignore-label belongs to --predictions and --references: a run has its own.")
    elif run is not None and dataset is not None:
        _evaluate_run(run, dataset, out_dir, cases, device)
    else:
        raise ConfigError("Give RUN and DATASET, or --predictions DIR and --references DIR.")
    report = print_metrics(out_dir / "metrics.json")
    out.print(f"Every case: {out_dir / 'metrics.csv'}")
    if report["problems"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def _evaluate_run(run: Path, path: Path, out_dir: Path, cases: Path | None, device: str | None) -> None:
    """Score the labelled cases that can be; the others become problems of the report."""
    from medseg_supcon.bundle import is_planned
    from medseg_supcon.datasets import check_dataset, items
    from medseg_supcon.evaluation import add_problems
    from medseg_supcon.plan import read_plan
    from medseg_supcon.training import check_device, run_config

    check_device(device)
    if not is_planned(run) or not (run / "models" / "model.pt").is_file():
        raise RunError(
            f"{run} is not a trained run: configs/plan.json and models/model.pt are needed. Train it first."
        )
    found = read_selected(path, cases)
    if not found.labelled:
        raise MedsegError(f"{path} has no labelled case to evaluate on.")
    plan = read_plan(run / "configs" / "plan.json")
    if len(plan["channels"]) != len(found.channels):
        raise DataError(
            f"{path} has {len(found.channels)} channels a scan ({', '.join(found.channels)}), and {run} was trained on "
            f"{len(plan['channels'])} ({', '.join(plan['channels'])}). Evaluate on a data set with the same channels."
        )
    expected = replace(
        found, cases=found.labelled, labels=plan["labels"], ignore_label=plan.get("ignore_label")
    )
    report = check_dataset(expected, allow_affine_mismatch=plan.get("trust_scan_affine", False))
    problems = {f.case: f.message for f in reversed(report.errors) if f.code not in ONLY_OF_TRAINING}
    good = [case for case in found.labelled if case.name not in problems]
    if not good:
        raise DataError(f"No case of {path} can be evaluated. {next(iter(problems.values()))}")
    run_config(
        run,
        "evaluate",
        "infer",
        device=device,
        datalist=items(good, found.root),
        dataset_dir=str(found.root.resolve()),
        output_dir=str(out_dir.resolve()),
    )
    add_problems(out_dir, problems)
