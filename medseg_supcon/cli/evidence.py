"""The commands that measure: ``medseg compare`` and ``medseg embed``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
from medseg_supcon.text import counted


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
        str | None, typer.Option(metavar="N,N", help="Training seeds, separated by commas; default: 0.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Budgets of labelled scans, validation included, separated by commas; default: all.",
        ),
    ] = None,
    validation: ValidationOption = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The comparison as a .yaml file (recipes, a grid of variants, ...), or article.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Length of every run; default: the planned length.",
        ),
    ] = None,
    cases: CasesOption = None,
    test_cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the names of the cases to test on; default: cases that no run is trained on.",
        ),
    ] = None,
    split_seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the split, which all runs share.")
    ] = 0,
    no_robustness: Annotated[
        bool,
        typer.Option("--no-robustness", help="Do not also test on degraded scans (noise, bias field, ...)."),
    ] = False,
    robustness: Annotated[
        bool,
        typer.Option("--robustness", help="Test on degraded scans even if the --config file says not to."),
    ] = False,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Runs at the same time; default: one per GPU, or one. They share the CPU's threads.",
        ),
    ] = None,
    settings: SettingsOption = None,
    allow_affine_mismatch: MismatchOption = False,
    trust: TrustOption = False,
) -> None:
    """Compare recipes on your data: which is better, by how much, how sure that is, and at what cost.

    Every recipe is trained with every seed and label budget, and all runs are tested on the same scans.

    Name the recipes with --recipes, or give a file with --config; options override the file.

    To go on after an interruption, give the command again: finished runs are kept. Without --device, all GPUs are used.
    """
    from medseg_supcon.bundle import parse_setting
    from medseg_supcon.comparison import ComparisonConfig, design_comparison, read_comparison
    from medseg_supcon.comparison import compare as run_comparison
    from medseg_supcon.datasets import VALIDATION, check_dataset, read_case_names, read_dataset
    from medseg_supcon.training import check_device

    check_device(device)
    if robustness and no_robustness:
        raise ConfigError("--robustness and --no-robustness contradict each other. Give one of them.")
    config_file = ComparisonConfig() if config is None else read_comparison(config)
    parsed = [*config_file.settings.items(), *(parse_setting(text) for text in settings or ())]
    data = read_dataset(dataset)
    budgets = _numbers(labels, "--labels") if labels is not None else config_file.labels or ["all"]
    design = design_comparison(
        data,
        _separated(recipes, "--recipes") if recipes is not None else config_file.named_recipes,
        _numbers(seeds, "--seeds") if seeds is not None else config_file.seeds or [0],
        [None if budget == "all" else budget for budget in budgets],
        cases=None if cases is None else read_case_names(cases),
        test_cases=None if test_cases is None else read_case_names(test_cases),
        split_seed=split_seed,
        validation=next((v for v in (validation, config_file.validation) if v is not None), VALIDATION),
        own={name: recipe.model_extra or {} for name, recipe in config_file.recipes.items()},
        axes=config_file.variants,
    )
    used = {c.name: c for s in design.splits.values() for c in (*s.unlabelled, *s.validation, *s.training)}
    trained = {case.name for split in design.splits.values() for case in split.training}
    cases_used = (*used.values(), *design.test)
    held_out = frozenset(case.name for case in cases_used) - trained
    checked = replace(data, cases=cases_used, validation=held_out)
    report = check_dataset(checked, allow_affine_mismatch=allow_affine_mismatch)
    if report.has_errors:
        print_report(report, err)
        raise MedsegError(
            f"The data set has errors (above). Fix them, then run 'medseg check {dataset}' again."
        )
    err.print(f"Testing on {counted(len(design.test), 'scan')}: {design.tested_on}.")
    comparison = run_comparison(
        design,
        out_dir,
        epochs=epochs or config_file.epochs,
        settings=parsed,
        device=device,
        workers=workers,
        robustness=robustness or (config_file.robustness is not False and not no_robustness),
        training_score=config_file.training_score,
        trust_scan_affine=allow_affine_mismatch,
        trust=trust,
        say=err.print,
    )
    for sentence in [*comparison["answers"], *(f"Note: {text}" for text in comparison["caveats"])]:
        out.print(sentence)
    out.print(f"\nThe report is {out_dir / 'report.html'}; its tables are in {out_dir / 'summary.md'}.")


def embed(
    run: RunArg,
    dataset: DatasetArg,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for pictures and tables.")],
    cases: CasesOption = None,
    voxels: Annotated[
        int, typer.Option(min=20, metavar="N", help="Voxels to sample from all cases together.")
    ] = 1500,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sample and of t-SNE.")] = 0,
    device: DeviceOption = None,
    trust: TrustOption = False,
) -> None:
    """Show a network's features before and after training: pictures, and how well they separate the classes."""
    from medseg_supcon.datasets import read_case_names, read_dataset
    from medseg_supcon.embedding import embed_run
    from medseg_supcon.training import check_device

    check_device(device)
    names = None if cases is None else read_case_names(cases)
    embedding = embed_run(
        run,
        read_dataset(dataset),
        out_dir,
        cases=names,
        voxels=voxels,
        seed=seed,
        device=device,
        trust=trust,
    )
    for sentence in embedding["sentences"]:
        out.print(sentence)
    out.print(
        f"\nPictures: {out_dir / 'pca.png'}, {out_dir / 'tsne.png'}; numbers: {out_dir / 'separation.csv'}\n"
        f"To rotate the points in 3-D: tensorboard --logdir {out_dir / 'projector'}",
    )


def _separated(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {text!r}: expected values separated by commas.")
    return parts


def _numbers(text: str, option: str) -> list[Any]:
    words = ("all",) if option == "--labels" else ()
    values = _separated(text, option)
    for value in values:
        if value not in words and not (value.isdecimal() and len(value) < 10):
            raise ConfigError(
                f"{option}: {value!r} is not a whole number of at most 9 digits{', nor all' if words else ''}."
            )
    return [value if value in words else int(value) for value in values]
