"""The command ``medseg embed``: features of a run's voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.options import (
    CasesOption,
    DatasetArg,
    DeviceOption,
    OverwriteOption,
    RunArg,
    TrustOption,
    refuse_to_overwrite,
)
from medseg_supcon.cli.terminal import out, printable


def embed(
    run: RunArg,
    dataset: DatasetArg,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for plots and tables.")],
    cases: CasesOption = None,
    voxels: Annotated[int, typer.Option(min=20, metavar="N", help="Number of voxels to sample over all cases.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sample and of t-SNE.")] = 0,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    trust: TrustOption = False,
) -> None:
    """Plot the features of the network before and after training, and measure how well they separate the classes."""
    from medseg_supcon.datasets import read_case_names, read_dataset
    from medseg_supcon.embedding import embed_run
    from medseg_supcon.training import check_device

    check_device(device)
    refuse_to_overwrite(out_dir / "separation.json", overwrite)
    names = None if cases is None else read_case_names(cases)
    data = read_dataset(dataset)
    result = embed_run(run, data, out_dir, cases=names, voxels=voxels, seed=seed, device=device, trust=trust)
    for sentence in result["sentences"]:
        out.print(printable(sentence))
    folder = printable(out_dir)
    out.print(
        f"\nPlots: {folder}/pca.png, {folder}/tsne.png; scores: {folder}/separation.csv\n"
        f"To rotate the points: tensorboard --logdir {folder}/projector"
    )
