"""The command line ``medseg``: names, overrides, messages. The work is in the rooms."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon import __version__
from medseg_supcon.cli.evaluate import evaluate
from medseg_supcon.cli.evidence import compare, embed
from medseg_supcon.cli.options import (
    CasesOption,
    DatasetArg,
    DeviceOption,
    MismatchOption,
    RunArg,
    TrustOption,
)
from medseg_supcon.cli.terminal import err, memory_ran_out, out, predict_paths, print_report
from medseg_supcon.cli.train import plan, read_selected, train
from medseg_supcon.errors import ConfigError, MedsegError, RunError

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


class ExportFormat(str, Enum):
    """What `medseg export` writes."""

    torchscript = "torchscript"
    onnx = "onnx"


def _show_version(value: bool) -> None:
    if value:
        out.print(f"medseg_supcon {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")] = Path(
        "medseg_demo"
    ),
    device: DeviceOption = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Shorten the training.", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """The whole job on phantoms made on the spot: train, predict unseen scans, measure, draw."""
    from medseg_supcon.cli.demo import run_demo

    run_demo(out_dir, out, device=device, epochs=epochs, overwrite=overwrite)


@app.command()
def check(
    dataset: DatasetArg,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings to a JSON file, too.")
    ] = None,
    cases: CasesOption = None,
    allow_affine_mismatch: MismatchOption = False,
) -> None:
    """What is wrong with this data set, case by case. Exit code 2 on errors, 0 on warnings alone."""
    from medseg_supcon.datasets import check_dataset

    report = check_dataset(read_selected(dataset, cases), allow_affine_mismatch=allow_affine_mismatch)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    print_report(report, out)
    if report.has_errors:
        raise typer.Exit(2)


app.command()(plan)
app.command()(train)


@app.command()
def predict(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... SCAN...",
            help="A run (several are an ensemble), then scans: files, folders, DICOM series folders.",
            readable=False,  # one that may not be read is reported, and the others are done
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the masks.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write each class's probability.")
    ] = False,
    tta: Annotated[
        bool,
        typer.Option(
            "--tta", help="Average over mirrored scans (slower), where no class tells left from right."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo masks that exist.")] = False,
    device: DeviceOption = None,
    trust: TrustOption = False,
) -> None:
    """Masks of new scans, each in its scan's own space. Exit code 3 where some scans failed, 2 where all did."""
    from medseg_supcon.bundle import is_planned
    from medseg_supcon.training import check_device

    check_device(device)
    runs = [p for p in run if is_planned(p)]
    scans = [p for p in run if p not in runs]
    if not runs:
        raise RunError(
            f"{run[0]} is not a run: it has no configs/plan.json. Usage: medseg predict RUN SCAN... --out DIR"
        )
    if not scans:
        raise ConfigError(f"No scan given. Usage: medseg predict {runs[0]} SCAN... --out DIR")
    code = predict_paths(
        runs,
        scans,
        out_dir,
        probabilities=probabilities,
        tta=tta,
        overwrite=overwrite,
        device=device,
        trust=trust,
    )
    if code:
        raise typer.Exit(code)


app.command()(evaluate)
app.command()(compare)
app.command()(embed)


@app.command()
def export(
    run: RunArg,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.")],
    format: Annotated[ExportFormat, typer.Option(help="Format of the file.")] = ExportFormat.torchscript,
    trust: TrustOption = False,
) -> None:
    """The trained network alone, for programs that have neither MONAI nor this package."""
    from medseg_supcon.bundle import export_model

    result = export_model(run, format.value, file, trust)
    out.print(
        f"Wrote {file} ({format.value}); largest difference from the network: {result['max_abs_difference']:.1e}"
    )


def _terminate(*_: object) -> None:
    """SIGTERM, by which batch systems and containers end a process: handled as Ctrl-C is."""
    _terminated.append(True)
    raise KeyboardInterrupt


_terminated: list[bool] = []
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells say it


def main() -> None:
    """Run ``medseg``; every expected fault is a sentence on stderr and an exit code."""
    _quieten()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="medseg", standalone_mode=False)
        if code == INTERRUPTED:  # typer's way to say that it saw a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except MedsegError as error:
        _stop(f"medseg: {error}", 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _stop("medseg: stopped. What was finished is kept.", TERMINATED if _terminated else INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        _fault(error)


def _fault(error: Exception) -> None:
    """Usage faults are the person's (2), a full disk or a missing permission too; anything else is ours (1)."""
    show: Callable[[], None] | None = getattr(error, "show", None)
    if show is not None:  # a usage error of the command line parser
        show()
        sys.exit(2)
    from medseg_supcon.inference import is_out_of_memory

    if is_out_of_memory(error):
        _stop(f"medseg: {memory_ran_out(error)}", 2)
    if isinstance(error, OSError):
        _stop(
            f"medseg: {error.strerror or error}: {error.filename2 or error.filename or 'no file named'}. "
            "Check the disk and permissions.",
            2,
        )
    import traceback

    traceback.print_exc()
    _stop(
        "medseg: this is a fault of the program, not of your data. Please report it with the lines above.", 1
    )


def _stop(message: str, code: int) -> None:
    err.print(message)
    sys.exit(code)


def _quieten() -> None:
    """Third parties' warnings are for us, not for a person at a terminal."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
