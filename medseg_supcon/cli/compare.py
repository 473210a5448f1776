"""The command ``medseg compare``: recipes against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli.options import (
    CasesOption,
    DatasetArg,
    DeviceOption,
    MismatchOption,
    SettingsOption,
    TrustOption,
    ValidationOption,
)
from medseg_supcon.cli.terminal import err, out, print_report, printable
from medseg_supcon.errors import ConfigError


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
    from medseg_supcon.datasets import VALIDATION, read_case_names, read_dataset
    from medseg_supcon.training import check_device, refuse_errors

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
    used = [c for s in design.splits.values() for c in (*s.unlabelled, *s.validation, *s.training)]
    by_name = {
        case.name: case for case in used
    }  # a case without its label map in one budget, with it in another
    refuse_errors(data, [*by_name.values(), *design.test], dataset, print_report, allow_affine_mismatch)
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
        out.print(printable(sentence))
    out.print(f"\nReport: {printable(out_dir / 'report.html')}. Tables: {printable(out_dir / 'summary.md')}.")


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
