"""Arguments and options that several commands of ``medseg`` share."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_supcon.cli.terminal import err, say
from medseg_supcon.errors import RunError

DRIVER = Path("/proc/driver/nvidia/version")  # exists while NVIDIA's driver is loaded


def _warn_of_unused_gpu(device: str | None) -> str | None:
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
        text = (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it ({reason}), so the CPU is used. "
            "Install a torch build that matches the GPU's driver. In a container, add --gpus all. To use the CPU "
            "without this warning, pass --device cpu."
        )
        say(err, "warning", "yellow", text)
    return device


def read_selected(path: Path, cases: Path | None) -> Any:
    """A data set, or the cases of it that a file names."""
    from medseg_supcon.datasets import read_case_names, read_dataset

    dataset = read_dataset(path)
    return dataset if cases is None else dataset.select(read_case_names(cases))


def refuse_to_overwrite(file: Path, overwrite: bool) -> None:
    """Refuse if a file exists, unless the user passed --overwrite."""
    if file.exists() and not overwrite:
        raise RunError(f"{file} already exists. Replace it with --overwrite, or choose another --out.")


DatasetArg = Annotated[Path, typer.Argument(help="Decathlon folder, nnU-Net v2 raw folder, or MONAI datalist JSON.")]
RunArg = Annotated[Path, typer.Argument(help="A trained run (a MONAI bundle).")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        callback=_warn_of_unused_gpu,
        metavar="NAME",
        help="cpu, cuda or cuda:1; default: the first GPU, or the CPU.",
    ),
]
CasesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the names of the cases to use, one per line.")
]
MismatchOption = Annotated[
    bool,
    typer.Option(
        "--allow-affine-mismatch",
        help="If the affine of a label map differs from its scan's, use the scan's.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of train.yaml, or plan::KEY. Can be repeated."),
]
ValidationOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.9,
        metavar="SHARE",
        help="Share of the labelled scans used for validation (default: 0.15); with 0, all are used for training.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Allow the run's own code. Use it only for runs from people you trust."),
]
