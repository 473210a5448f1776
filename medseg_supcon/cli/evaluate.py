"""The command ``medseg evaluate``: scores of a run, or of masks, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.options import CasesOption, DeviceOption, TrustOption, read_selected
from medseg_supcon.cli.terminal import EXIT_SOME_FAILED, out, print_metrics, printable
from medseg_supcon.errors import ConfigError


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A trained run.")] = None,
    dataset: Annotated[Path | None, typer.Argument(help="A data set; its labelled cases are evaluated.")] = None,
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
        typer.Option(
            metavar="VALUE", help="With --references: the value in the label maps that means 'not annotated'."
        ),
    ] = None,
    device: DeviceOption = None,
    trust: TrustOption = False,
) -> None:
    """Write Dice, HD95 (mm), surface Dice and volumes (ml) per case and class, as CSV and JSON.

    Pass a run and a data set (choose cases that it was not trained on with --cases), or --predictions and
    --references for masks that exist. Exit code 3 if some cases could not be scored.
    """
    if (predictions is None) != (references is None):
        raise ConfigError("--predictions and --references must be used together: pass both folders.")
    if predictions is not None and references is not None:
        from medseg_supcon.evaluation import evaluate_folders

        evaluate_folders(predictions, references, out=out_dir, ignore_label=ignore_label)
    elif ignore_label is not None:
        raise ConfigError(
            "--ignore-label needs --predictions and --references; a run has its own ignore label in plan.json."
        )
    elif run is not None and dataset is not None:
        from medseg_supcon.inference import evaluate_dataset
        from medseg_supcon.training import check_device

        check_device(device)
        evaluate_dataset(run, read_selected(dataset, cases), out_dir, device=device, trust=trust)
    else:
        raise ConfigError("Pass RUN and DATASET, or --predictions DIR and --references DIR.")
    report = print_metrics(out_dir / "metrics.json")
    out.print(f"Scores of every case: {printable(out_dir / 'metrics.csv')}")
    if report["problems"]:
        raise typer.Exit(EXIT_SOME_FAILED)
