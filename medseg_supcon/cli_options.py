"""Arguments and options that several commands of ``medseg`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DatasetArg = Annotated[
    Path, typer.Argument(help="Decathlon folder, nnU-Net v2 raw folder, or MONAI datalist JSON.")
]
RunArg = Annotated[Path, typer.Argument(help="A trained run (a MONAI bundle).")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")
]
CasesOption = Annotated[Path | None, typer.Option(help="File with the case names to use, one a line.")]
MismatchOption = Annotated[
    bool,
    typer.Option("--allow-affine-mismatch", help="Where a label map's affine differs, trust the scan's."),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of train.yaml, or plan::KEY."),
]
ValidationOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.9,
        help="Share of the labelled scans that validates (default: 0.15). 0: all of them train.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run a bundle's own code: only for bundles you trust.")
]
