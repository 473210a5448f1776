"""The shorter commands of ``medseg``, and the exit codes and error messages of all commands."""

from __future__ import annotations

import getpass
import io
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from medseg_supcon import __version__
from medseg_supcon.cli import terminal
from medseg_supcon.cli.compare import compare
from medseg_supcon.cli.demo import demo
from medseg_supcon.cli.predict import predict
from medseg_supcon.cli.review import review
from medseg_supcon.cli.terminal import err, out, print_metrics, print_report, printable, read_selected
from medseg_supcon.cli.train import plan, train
from medseg_supcon.errors import ConfigError, MedsegError

INTERRUPTED, CLOSED_PIPE, TERMINATED = 130, 141, 143  # 128 + the signal's number, as in shells
OUT_OF_MEMORY = "out of memory. Close other programs, or use a machine with more memory."
OUT_OF_GPU_MEMORY = (
    "out of GPU memory. Plan with fewer scans per step (--set plan::batch_size=2) or smaller patches (--set "
    "'plan::patch_size=[96,96,96]'), close other programs that use the GPU, or use --device cpu."
)
_terminated: list[bool] = []

app = typer.Typer(
    name="medseg",
    help="3-D medical image segmentation from few labels: train a MONAI bundle, turn new scans into masks.",
    epilog="Start with 'medseg demo'. For your own scans: 'medseg check DATASET', 'medseg train DATASET --out RUN', "
    "'medseg predict RUN SCANS --out MASKS'. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(value: bool) -> None:
    if value:
        out.print(f"medseg_supcon {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _options(version: Version = False) -> None:
    pass


def check(
    dataset: terminal.DatasetArg,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")] = None,
    cases: terminal.CasesOption = None,
    mismatch: terminal.MismatchOption = False,
) -> None:
    """Report problems in a data set, case by case. Exit code 2 if there are errors, 0 if there are only warnings."""
    from medseg_supcon.datasets import check_dataset
    from medseg_supcon.files import write_text

    report = check_dataset(read_selected(dataset, cases), allow_affine_mismatch=mismatch)
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    print_report(report, out)
    if report.has_errors:
        raise typer.Exit(2)


METRICS = "Folder for metrics.csv and metrics.json."
PREDICTIONS = "Masks to score, instead of RUN and DATASET."
REFERENCES = "Label maps to compare --predictions with."
EVALUATE_PICTURES = "With a run: also write review.html, which shows scans, masks and label maps, worst first."
NOT_ANNOTATED = "With --references: the value in the label maps that means 'not annotated'."
DATASET_JSON = "With --references: a dataset.json whose class names, regions and ignore label are used."


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help=terminal.TRAINED)] = None,
    dataset: Annotated[
        Path | None, typer.Argument(metavar="DATASET", help="A data set; its labelled cases are evaluated.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help=METRICS)] = Path("evaluation"),
    cases: terminal.CasesOption = None,
    predictions: Annotated[Path | None, typer.Option(metavar="FOLDER", help=PREDICTIONS)] = None,
    references: Annotated[Path | None, typer.Option(metavar="FOLDER", help=REFERENCES)] = None,
    ignore_label: Annotated[float | None, typer.Option(metavar="VALUE", help=NOT_ANNOTATED)] = None,
    dataset_json: Annotated[Path | None, typer.Option(metavar="FILE", help=DATASET_JSON)] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help=EVALUATE_PICTURES)] = False,
    device: terminal.DeviceOption = None,
    trust: terminal.TrustOption = False,
) -> None:
    """Write Dice, HD95 (mm), surface Dice and volumes (ml) per case and class, as CSV and JSON.

    Pass RUN and DATASET, or --predictions and --references for masks that exist.
    Use --cases to choose cases that the run was not trained on. Exit code 3 if some cases could not be scored.
    """
    if (predictions is None) != (references is None):
        raise ConfigError("--predictions and --references must be used together: pass both folders.")
    if predictions is not None and references is not None:
        from medseg_supcon.datasets import mask_labels, read_label_plan
        from medseg_supcon.evaluation import evaluate_folders

        meaning = None if dataset_json is None else read_label_plan(dataset_json)
        if meaning is not None and ignore_label is None:
            ignore_label = meaning["ignore_label"]
        labels = None if meaning is None else mask_labels(meaning)
        evaluate_folders(predictions, references, labels, out_dir, ignore_label=ignore_label)
    elif ignore_label is not None or dataset_json is not None:
        option = "--dataset-json" if ignore_label is None else "--ignore-label"
        raise ConfigError(f"{option} needs --predictions and --references; a run has its own in plan.json.")
    elif run is not None and dataset is not None:
        from medseg_supcon.inference import evaluate_dataset
        from medseg_supcon.training import check_device

        check_device(device)
        evaluate_dataset(run, read_selected(dataset, cases), out_dir, device=device, trust=trust, pictures=pictures)
    else:
        raise ConfigError("Pass RUN and DATASET, or --predictions DIR and --references DIR.")
    report = print_metrics(out_dir / "metrics.json")
    out.print(f"Scores of every case: {printable(out_dir / 'metrics.csv')}")
    if report["problems"]:
        raise typer.Exit(terminal.EXIT_SOME_FAILED)


def embed(
    run: terminal.RunArg,
    dataset: terminal.DatasetArg,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for plots and tables.")],
    cases: terminal.CasesOption = None,
    voxels: Annotated[int, typer.Option(min=20, metavar="N", help="Number of voxels to sample over all cases.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sample and of t-SNE.")] = 0,
    device: terminal.DeviceOption = None,
    overwrite: terminal.OverwriteOption = False,
    trust: terminal.TrustOption = False,
) -> None:
    """Plot the features of the network before and after training, and measure how well they separate the classes."""
    from medseg_supcon.datasets import read_case_names, read_dataset
    from medseg_supcon.embedding import embed_run
    from medseg_supcon.training import check_device

    check_device(device)
    terminal.refuse_to_overwrite(out_dir / "separation.json", overwrite)
    names = None if cases is None else read_case_names(cases)
    data = read_dataset(dataset)
    result = embed_run(run, data, out_dir, cases=names, voxels=voxels, seed=seed, device=device, trust=trust)
    for sentence in result["sentences"]:
        out.print(printable(sentence))
    folder = printable(out_dir)
    out.print(f"\nPlots: {folder}/pca.png, {folder}/tsne.png; scores: {folder}/separation.csv")
    out.print(f"To rotate the points: tensorboard --logdir {folder}/projector")


def export(
    run: terminal.RunArg,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.")],
    format: Annotated[Literal["torchscript", "onnx"], typer.Option(help="Format of the file.")] = "torchscript",
    overwrite: terminal.OverwriteOption = False,
    trust: terminal.TrustOption = False,
) -> None:
    """Write the trained network alone, for programs without MONAI and without this package."""
    from medseg_supcon.bundle import export_model

    terminal.refuse_to_overwrite(file, overwrite)
    difference = export_model(run, format, file, trust)["max_abs_difference"]
    out.print(f"Wrote {printable(file)} ({format}). Largest difference from the network's output: {difference:.1e}")


for _command in (demo, check, plan, train, predict, review, evaluate, compare, embed, export):
    app.command()(_command)


def main() -> None:
    """Run ``medseg``; every expected error is a sentence on stderr and an exit code."""
    _quieten()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="medseg", standalone_mode=False)
        if code == INTERRUPTED:  # typer's way to say that it saw a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except MedsegError as error:
        _stop(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _stop("stopped. Finished work is kept.", TERMINATED if _terminated else INTERRUPTED)
    except BrokenPipeError:
        _end_at_closed_pipe()
    except Exception as error:
        _end(error)


def _terminate(*_: object) -> None:
    """SIGTERM, which batch systems and containers send: handled like Ctrl-C."""
    _terminated.append(True)
    raise KeyboardInterrupt


def _end(error: Exception) -> NoReturn:
    """Usage errors, a full disk and missing permissions exit with 2; anything else is a bug and exits with 1."""
    from medseg_supcon.inference import is_out_of_memory

    if hasattr(error, "format_message"):  # a usage error of the command line parser
        command = getattr(getattr(error, "ctx", None), "command_path", "medseg")
        text = str(error.format_message())
        _stop(f"{text}{'' if text.endswith(('.', '?')) else '.'} See: {command} --help", 2)
    if is_out_of_memory(error):
        _stop(OUT_OF_GPU_MEMORY if type(error).__name__ == "OutOfMemoryError" else OUT_OF_MEMORY, 2)  # torch's name
    if isinstance(error, OSError):
        file = error.filename2 or error.filename or "no file named"
        _stop(f"{error.strerror or error}: {file}. Check the disk space and the permissions.", 2)
    traceback.print_exc()
    _stop("this is a bug in the program, not a problem with your data. Please report it with the lines above.", 1)


def _stop(message: str, code: int) -> NoReturn:
    err.print(printable(f"medseg: {message}"))
    sys.exit(code)


def _end_at_closed_pipe(*_: object) -> NoReturn:
    """End quietly if nobody reads the output any more, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(CLOSED_PIPE)


def _quieten() -> None:
    """Hide third-party warnings, since users cannot act on them, and let MONAI and rich start in any environment."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's --user without a passwd entry: importing MONAI would fail
        os.environ["USER"] = str(os.getuid())
    for stream in (sys.stdout, sys.stderr):  # a file name may contain bytes that are not valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    Console.on_broken_pipe = _end_at_closed_pipe  # type: ignore  # of typer's help, too
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
