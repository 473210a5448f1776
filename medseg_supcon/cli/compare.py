"""The command ``medseg compare``: recipes against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg_supcon.cli import terminal
from medseg_supcon.cli.terminal import err, out, print_report, printable
from medseg_supcon.errors import ConfigError
from medseg_supcon.text import counted

RECIPES = "Names or .yaml files, separated by commas; the first is the baseline."
BUDGETS = "Budgets of labelled scans, validation included, separated by commas; default: all."
CONFIG = "A .yaml file that describes the comparison, or 'article' for the experiments of the source article."
TEST_CASES = "File with the names of the cases to test on; default: cases that no run is trained on."
NOT_DEGRADED = "Do not also test on degraded scans (noise, bias field, ...)."
ALSO_DEGRADED = "Test on degraded scans even if the --config file says not to."
WORKERS = "Number of runs at the same time (default: one per GPU, or one on a CPU). They share the CPU's threads."


def compare(
    dataset: terminal.DatasetArg,
    out_dir: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the comparison.")],
    recipes: Annotated[str | None, typer.Option(metavar="A,B", help=RECIPES)] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Training seeds, such as 0,1,2; default: 0.")] = None,
    labels: Annotated[str | None, typer.Option(metavar="N,N", help=BUDGETS)] = None,
    validation: terminal.ValidationOption = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help=CONFIG)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Default: the planned length.")] = None,
    cases: terminal.CasesOption = None,
    test_cases: Annotated[Path | None, typer.Option(metavar="FILE", help=TEST_CASES)] = None,
    split_seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the split, which all runs share.")] = 0,
    no_robustness: Annotated[bool, typer.Option("--no-robustness", help=NOT_DEGRADED)] = False,
    robustness: Annotated[bool, typer.Option("--robustness", help=ALSO_DEGRADED)] = False,
    device: terminal.DeviceOption = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help=WORKERS)] = None,
    slurm: terminal.SlurmOption = None,
    settings: terminal.SettingsOption = None,
    mismatch: terminal.MismatchOption = False,
    trust: terminal.TrustOption = False,
) -> None:
    """Compare recipes on your data: which is better, by how much, how sure that is, and at what cost.

    Every recipe is trained with every seed and label budget, and all runs are tested on the same scans.

    Name the recipes with --recipes, or give a file with --config; options override the file.

    To continue after an interruption, run the same command again: finished runs are kept.
    Without --device, all GPUs are used.
    """
    from medseg_supcon.bundle import parse_setting
    from medseg_supcon.comparison import compare as run_comparison
    from medseg_supcon.comparison import design_comparison, read_comparison
    from medseg_supcon.datasets import read_case_names, read_dataset
    from medseg_supcon.slurm import read_cluster
    from medseg_supcon.training import check_device, refuse_errors

    cluster = None if slurm is None else read_cluster(slurm)
    if cluster is None:
        check_device(device)  # the devices of a cluster's nodes are not here
    if robustness and no_robustness:
        raise ConfigError("--robustness and --no-robustness contradict each other. Give one of them.")
    asked = read_comparison(
        config, recipes=recipes, seeds=seeds, labels=labels, validation=validation, epochs=epochs,
        robustness=robustness if robustness or no_robustness else None, settings=dict(map(parse_setting, settings or ())),
    )  # fmt: skip
    data = read_dataset(dataset)
    named, tested = (None if file is None else read_case_names(file) for file in (cases, test_cases))
    design = design_comparison(data, asked, cases=named, test_cases=tested, split_seed=split_seed)
    used = {c.name: c for s in design.splits.values() for c in (*s.unlabelled, *s.validation, *s.training)}
    trained = [case for split in design.splits.values() for case in split.training]
    refuse_errors(data, [*used.values(), *design.test], trained, dataset, print_report, mismatch)
    err.print(f"Testing on {counted(len(design.test), 'scan')}: {printable(design.tested_on)}.")
    comparison = run_comparison(
        design,
        out_dir,
        device=device,
        workers=workers,
        cluster=cluster,
        trust_scan_affine=mismatch,
        trust=trust,
        say=err.print,
    )
    for sentence in [*comparison["answers"], *(f"Note: {text}" for text in comparison["caveats"])]:
        out.print(printable(sentence))
    out.print(f"\nThe report is {printable(out_dir / 'report.html')}; its tables are also in summary.md there.")
