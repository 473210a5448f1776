"""Arguments and options that several commands of ``medseg`` share."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.terminal import err, say

DRIVER = Path("/proc/driver/nvidia/version")  # there while NVIDIA's driver is loaded


def _with_its_gpu(device: str | None) -> str | None:
    """Nobody should find out after a night that torch could not use the GPU, and why."""
    if device is not None or not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return device
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        of_cpu = torch.version.cuda is None
        reason = (
            "it is a build for CPUs" if of_cpu else " ".join(str(w.message) for w in told) or "it finds none"
        )
        say(
            err,
            "warning",
            "yellow",
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it ({reason}): the CPU works. "
            "Install a torch build for the GPU's driver, or start the container with --gpus all (it sees the driver "
            "without it, too); --device cpu says that this is what you want.",
        )
    return device


DatasetArg = Annotated[
    Path, typer.Argument(help="Decathlon folder, nnU-Net v2 raw folder, or MONAI datalist JSON.")
]
RunArg = Annotated[Path, typer.Argument(help="A trained run (a MONAI bundle).")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        callback=_with_its_gpu, metavar="NAME", help="cpu, cuda or cuda:1; default: a GPU where there is one."
    ),
]
CasesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the names of the cases to use, one a line.")
]
MismatchOption = Annotated[
    bool,
    typer.Option(
        "--allow-affine-mismatch",
        help="Where a label map's affine differs from its scan's, trust the scan's.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of train.yaml, or plan::KEY. May be repeated."),
]
ValidationOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.9,
        metavar="SHARE",
        help="Share of the labelled scans that validates (default: 0.15); 0: all of them train.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run code that a run brings with it: only if you trust its author.")
]
