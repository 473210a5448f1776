"""The command line ``medseg``: its commands, and how they end."""

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
from medseg_supcon.cli.compare import compare
from medseg_supcon.cli.demo import demo
from medseg_supcon.cli.embed import embed
from medseg_supcon.cli.evaluate import evaluate
from medseg_supcon.cli.options import (
    CasesOption,
    DatasetArg,
    MismatchOption,
    OverwriteOption,
    RunArg,
    TrustOption,
    read_selected,
    refuse_to_overwrite,
)
from medseg_supcon.cli.predict import predict
from medseg_supcon.cli.review import review
from medseg_supcon.cli.terminal import (
    end_at_closed_pipe,
    err,
    out,
    out_of_memory,
    print_report,
    printable,
)
from medseg_supcon.cli.train import plan, train
from medseg_supcon.errors import MedsegError

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as in shells
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


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def check(
    dataset: DatasetArg,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the findings to a JSON file.")
    ] = None,
    cases: CasesOption = None,
    allow_affine_mismatch: MismatchOption = False,
) -> None:
    """Report problems in a data set, case by case. Exit code 2 if there are errors, 0 if there are only warnings."""
    from medseg_supcon.datasets import check_dataset
    from medseg_supcon.files import write_text

    report = check_dataset(read_selected(dataset, cases), allow_affine_mismatch=allow_affine_mismatch)
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    print_report(report, out)
    if report.has_errors:
        raise typer.Exit(2)


def export(
    run: RunArg,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.")],
    format: Annotated[Literal["torchscript", "onnx"], typer.Option(help="Format of the file.")] = "torchscript",
    overwrite: OverwriteOption = False,
    trust: TrustOption = False,
) -> None:
    """Write the trained network alone, for programs without MONAI and without this package."""
    from medseg_supcon.bundle import export_model

    refuse_to_overwrite(file, overwrite)
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
        end_at_closed_pipe()
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
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", "medseg")
        text = str(error.format_message())
        _stop(f"{text}{'' if text.endswith(('.', '?')) else '.'} See: {command} --help", 2)
    if is_out_of_memory(error):
        _stop(out_of_memory(error), 2)
    if isinstance(error, OSError):
        file = error.filename2 or error.filename or "no file named"
        _stop(f"{error.strerror or error}: {file}. Check the disk space and the permissions.", 2)
    traceback.print_exc()
    _stop(
        "this is a bug in the program, not a problem with your data. Please report it with the lines above.",
        1,
    )


def _stop(message: str, code: int) -> NoReturn:
    err.print(printable(f"medseg: {message}"))
    sys.exit(code)


def _quieten() -> None:
    """Hide third-party warnings, since users cannot act on them, and let MONAI and rich start in any environment."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's --user without a passwd entry: importing MONAI would fail
        os.environ["USER"] = str(os.getuid())
    for stream in (sys.stdout, sys.stderr):  # a file name may contain bytes that are not valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    Console.on_broken_pipe = end_at_closed_pipe  # type: ignore  # of typer's help, too
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
