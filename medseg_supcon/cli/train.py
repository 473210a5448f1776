"""The commands that make a run: ``medseg plan`` and ``medseg train``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

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
from medseg_supcon.cli.terminal import err, out, print_metrics, print_plan, print_report, say
from medseg_supcon.errors import MedsegError, RunError

LENGTH = "Length of the training; default: what fits into 22 minutes on a CPU, 60 on a GPU."
BUDGET = "Labelled scans to use, validation included (default: all); the others count as unlabelled."
RunOption = Annotated[
    Path,
    typer.Option("--out", metavar="RUN", help="The run to write: a folder, which becomes a MONAI bundle."),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="joint (the default), dice_ce, two_stage, semi, or a .yaml file of your own."
    ),
]
EpochsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help=LENGTH)]
LabelsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help=BUDGET)]
UnlabelledOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Further scans without labels, for recipes that learn from such."),
]
InitOption = Annotated[
    Path | None, typer.Option(metavar="RUN", help="An earlier run whose weights to start from (fine-tuning).")
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Seed of the split, the weights and all random draws (default: 0)."
    ),
]


@dataclass(frozen=True)
class Request:
    """What a person asked to be planned; ``None`` where nothing was said."""

    recipe: str | None
    epochs: int | None
    cases: Path | None
    labels: int | None
    validation: float | None
    unlabelled: Path | None
    init: Path | None
    seed: int | None
    settings: list[str] | None
    allow_affine_mismatch: bool

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        names = {"settings": "--set"}
        said = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        return [names.get(name, "--" + name.replace("_", "-")) for name, value in said.items() if value != []]


def plan(
    dataset: DatasetArg,
    run: RunOption,
    recipe: RecipeOption = None,
    epochs: EpochsOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    validation: ValidationOption = None,
    unlabelled: UnlabelledOption = None,
    init: InitOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    settings: SettingsOption = None,
    allow_affine_mismatch: MismatchOption = False,
    trust: TrustOption = False,
) -> None:
    """The bundle that would be trained, with its expected time and memory. 'medseg train' goes on from it."""
    request = Request(
        recipe, epochs, cases, labels, validation, unlabelled, init, seed, settings, allow_affine_mismatch
    )
    _prepare(dataset, run, request, device, trust)
    out.print(
        f"\nEdit {run / 'configs' / 'plan.json'} if you like, then: "
        f"medseg train {quote(str(dataset))} --out {quote(str(run))}"
    )


def train(
    dataset: DatasetArg,
    run: RunOption,
    recipe: RecipeOption = None,
    epochs: EpochsOption = None,
    cases: CasesOption = None,
    labels: LabelsOption = None,
    validation: ValidationOption = None,
    unlabelled: UnlabelledOption = None,
    init: InitOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    settings: SettingsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    allow_affine_mismatch: MismatchOption = False,
    trust: TrustOption = False,
) -> None:
    """Train a segmentation network on a data set; the run is a MONAI bundle."""
    from medseg_supcon.bundle import is_planned, is_started
    from medseg_supcon.training import check_device, is_complete, train_run

    check_device(device)
    request = Request(
        recipe, epochs, cases, labels, validation, unlabelled, init, seed, settings, allow_affine_mismatch
    )
    if is_started(run) and not resume:
        raise RunError(
            f"{run} already holds a trained run. Choose another --out, or go on with it: --resume."
        )
    if resume and is_complete(run):
        out.print(f"{run} is finished: nothing to resume.")
        return
    if is_planned(run):
        _go_on(dataset, run, request, resume, trust)
    else:
        _prepare(dataset, run, request, device, trust)
    train_run(run, device=device, resume=resume, trust=trust)
    print_metrics(run / "eval" / "metrics.json")
    out.print(
        f"\nThe run is in {run} (a MONAI bundle; {run / 'docs' / 'README.md'} describes it).\n"
        f"Masks of new scans: medseg predict {quote(str(run))} SCANS --out MASKS"
    )


def read_selected(path: Path, cases: Path | None) -> Any:
    """A data set, or the cases of it that a file names."""
    from medseg_supcon.datasets import read_case_names, read_dataset

    dataset = read_dataset(path)
    return dataset if cases is None else dataset.select(read_case_names(cases))


def _go_on(dataset: Path, run: Path, request: Request, resume: bool, trust: bool) -> None:
    """A planned folder is trained as it is: say so where something else was asked for."""
    from medseg_supcon.bundle import check_configs_trusted, plain_text, read_config

    check_configs_trusted(run, trust)
    folder = plain_text(read_config(run / "configs" / "train.yaml").get("dataset_dir"))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'train.yaml'}: dataset_dir must be the path of a folder.")
    planned = Path(folder)
    data = read_selected(dataset, None)
    root = data.root.resolve()
    if root != planned.resolve():
        raise RunError(
            f"{run} is planned for {planned}, not for {root}. Choose another --out, or that data set."
        )
    given = request.given()
    if given and not resume:
        raise RunError(
            f"{run} is planned already; {', '.join(given)} would be ignored. Leave {'it' if len(given) == 1 else 'them'} "
            "out, edit the run's configs, or choose another --out."
        )
    _refuse_errors(_planned_cases(run, data), dataset, _trusts_scan_affine(run), None)
    err.print(f"{'Resuming' if resume else 'Training'} what is planned in {run}.")
    if given:
        say(err, "note", "yellow", f"the plan's own values hold for {', '.join(given)}")


def _trusts_scan_affine(run: Path) -> bool:
    from medseg_supcon.plan import read_plan

    return bool(read_plan(run / "configs" / "plan.json").get("trust_scan_affine", False))


def _prepare(path: Path, run: Path, request: Request, device: str | None, trust: bool) -> None:
    from medseg_supcon.bundle import is_planned, parse_setting, read_recipe
    from medseg_supcon.datasets import VALIDATION, read_unlabelled, split_cases
    from medseg_supcon.training import check_device, prepare_run

    check_device(device)
    recipe, seed = request.recipe or "joint", request.seed or 0
    read_recipe(recipe)
    if is_planned(run):
        raise RunError(
            f"{run} already holds a run. Choose another --out, or go on with it: medseg train ... --resume."
        )
    parsed = [parse_setting(s) for s in request.settings or ()]
    dataset = read_selected(path, request.cases)
    share = VALIDATION if request.validation is None else request.validation
    split = split_cases(dataset, labels=request.labels, seed=seed, validation_fraction=share)
    if request.unlabelled is not None:
        more = read_unlabelled(request.unlabelled, dataset)
        split = replace(split, unlabelled=(*split.unlabelled, *more))
    # a scan that trains and validates is looked at once
    chosen = tuple(dict.fromkeys((*split.training, *split.validation, *split.unlabelled)))
    _refuse_errors(replace(dataset, cases=chosen), path, request.allow_affine_mismatch, request.unlabelled)
    result = prepare_run(
        dataset,
        split,
        run,
        recipe=recipe,
        settings=parsed,
        epochs=request.epochs,
        seed=seed,
        init=request.init,
        device=device,
        trust_scan_affine=request.allow_affine_mismatch,
        trust=trust,
    )
    print_plan(result, split, run)


def _refuse_errors(dataset: Any, path: Path, allow_affine_mismatch: bool, unlabelled: Path | None) -> None:
    """Show what a check finds; errors end the command."""
    from medseg_supcon.datasets import check_dataset

    report = check_dataset(dataset, allow_affine_mismatch=allow_affine_mismatch)
    if report.findings:
        print_report(report, err)
    if report.has_errors:
        also = f" (this command alone looks at {unlabelled})" if unlabelled is not None else ""
        raise MedsegError(
            f"The data set has errors (above): mend them and run 'medseg check {path}' until it is content{also}."
        )


def _planned_cases(run: Path, dataset: Any) -> Any:
    """The data set with the cases that a run's data list names, wherever they lie."""
    from medseg_supcon.bundle import read_config
    from medseg_supcon.datasets import Case, load_items

    lists = read_config(run / "configs" / "datalist.json")
    found = []
    for entries in filter(None, lists.values()):
        for item in load_items(entries, dataset.root):
            images = [item["image"]] if isinstance(item["image"], str) else item["image"]
            label = Path(item["label"]) if item.get("label") else None
            found.append(Case(str(item.get("name", images[0])), tuple(map(Path, images)), label))
    return replace(dataset, cases=tuple(dict.fromkeys(found)))
