"""The commands that measure: ``medseg compare`` and ``medseg embed``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.options import (
    CasesOption,
    DatasetArg,
    DeviceOption,
    MismatchOption,
    RunArg,
    SettingsOption,
    TrustOption,
    ValidationOption,
)
from medseg_supcon.cli.terminal import err, out, print_report
from medseg_supcon.errors import ConfigError, MedsegError


def compare(
    dataset: DatasetArg,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the comparison.")],
    recipes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Names or .yaml files, separated by commas; the first is the baseline."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Seeds of training, separated by commas; default: 0.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Budgets of labelled scans (validation included), separated by commas; default: 'all'.",
        ),
    ] = None,
    validation: ValidationOption = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The comparison as a .yaml file (recipes, a grid of variants, ...), or 'article'.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Length of every run; default: what fits into 22 minutes on a CPU, 60 on a GPU.",
        ),
    ] = None,
    cases: CasesOption = None,
    test_cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the names of the cases to test on; default: cases that no run learns from.",
        ),
    ] = None,
    split_seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the split, which all runs share.")
    ] = 0,
    no_robustness: Annotated[
        bool,
        typer.Option(
            "--no-robustness", help="Do not test on scans made worse (noise, bias field, ...), too."
        ),
    ] = False,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Do so even where the file of --config says not to.")
    ] = False,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Runs at once; default: one on each GPU, or one. They share the CPU's threads.",
        ),
    ] = None,
    settings: SettingsOption = None,
    allow_affine_mismatch: MismatchOption = False,
    trust: TrustOption = False,
) -> None:
    """Which recipe is better on your data, by how much, how sure: recipes x seeds x budgets of labels, tested alike.

    Name recipes with --recipes, or give a file that says it all with --config; an option overrides the file.

    Give the command again to go on after an interruption: finished runs are kept. Without --device, all GPUs are used.
    """
    from medseg_supcon.bundle import parse_setting
    from medseg_supcon.comparison import ComparisonConfig, design_comparison, make_variants, read_comparison
    from medseg_supcon.comparison import compare as run_comparison
    from medseg_supcon.datasets import VALIDATION, check_dataset, read_case_names, read_dataset
    from medseg_supcon.training import check_device

    check_device(device)
    if robustness and no_robustness:
        raise ConfigError("--robustness and --no-robustness: give one of them.")
    said = ComparisonConfig() if config is None else read_comparison(config)
    parsed = [*said.settings.items(), *(parse_setting(text) for text in settings or ())]
    data = read_dataset(dataset)
    design = design_comparison(
        data,
        said.recipes if recipes is None else _separated(recipes, "--recipes"),
        said.seeds or (0,)
        if seeds is None
        else [_whole(text, "--seeds") for text in _separated(seeds, "--seeds")],
        said.labels or (None,)
        if labels is None
        else [None if text == "all" else _whole(text, "--labels") for text in _separated(labels, "--labels")],
        cases=None if cases is None else read_case_names(cases),
        test_cases=None if test_cases is None else read_case_names(test_cases),
        split_seed=split_seed,
        validation=next((share for share in (validation, said.validation) if share is not None), VALIDATION),
        own=said.own,
        variants=make_variants(said.variants),
    )
    used = {c.name: c for s in design.splits.values() for c in (*s.unlabelled, *s.validation, *s.training)}
    report = check_dataset(
        replace(data, cases=(*used.values(), *design.test)), allow_affine_mismatch=allow_affine_mismatch
    )
    if report.has_errors:
        print_report(report, err)
        raise MedsegError(
            f"The data set has errors (above): mend them and run 'medseg check {dataset}' until it is content."
        )
    err.print(f"Testing on {len(design.test)} scans: {design.tested_on}.")
    found = run_comparison(
        design,
        out_dir,
        epochs=epochs or said.epochs,
        settings=parsed,
        device=device,
        workers=workers,
        robustness=robustness or (said.robustness is not False and not no_robustness),
        training_score=said.training_score,
        trust_scan_affine=allow_affine_mismatch,
        trust=trust,
        say=err.print,
    )
    for sentence in [*found["answers"], *(f"Note: {text}" for text in found["caveats"])]:
        out.print(sentence)
    out.print(f"\nThe report: {out_dir / 'report.html'}; tables: {out_dir / 'summary.md'}")


def embed(
    run: RunArg,
    dataset: DatasetArg,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for pictures and figures.")
    ],
    cases: CasesOption = None,
    voxels: Annotated[
        int, typer.Option(min=20, metavar="N", help="Voxels to sample, over all cases.")
    ] = 1500,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sample and of t-SNE.")] = 0,
    device: DeviceOption = None,
    trust: TrustOption = False,
) -> None:
    """What the network's features look like, before and after training: pictures, class separation."""
    from medseg_supcon.datasets import read_case_names, read_dataset
    from medseg_supcon.embedding import embed_run
    from medseg_supcon.training import check_device

    check_device(device)
    names = None if cases is None else read_case_names(cases)
    found = embed_run(
        run,
        read_dataset(dataset),
        out_dir,
        cases=names,
        voxels=voxels,
        seed=seed,
        device=device,
        trust=trust,
    )
    for sentence in found["sentences"]:
        out.print(sentence)
    out.print(
        f"\nPictures: {out_dir / 'pca.png'}, {out_dir / 'tsne.png'}; figures: {out_dir / 'separation.csv'}\n"
        f"To turn the points: tensorboard --logdir {out_dir / 'projector'}",
    )


def _separated(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {text!r}: expected values separated by commas.")
    return parts


def _whole(text: str, option: str) -> int:
    if not text.isdecimal():
        what = "a whole number" + (" or 'all'" if option == "--labels" else "")
        raise ConfigError(f"{option}: {text!r} is not {what}.")
    return int(text)
