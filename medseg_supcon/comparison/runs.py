"""The folders of a comparison: one plan for each label budget, the runs that share it, and their jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import (
    check_configs_trusted,
    check_network_trusted,
    is_planned,
    read_config,
    read_recipe,
    shared_folder,
)
from medseg_supcon.comparison.cell import CLEAN, TRAINING
from medseg_supcon.comparison.corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison.design import Cell, Design
from medseg_supcon.datasets import items
from medseg_supcon.errors import RunError
from medseg_supcon.files import write_text
from medseg_supcon.plan import read_plan, write_plan
from medseg_supcon.training import is_of_plan, prepare_run

Settings = Sequence[tuple[str, Any]]
LENGTH = "epochs"  # the comparison's, whatever a recipe says
EQUAL = ("steps_per_epoch", "batch_size")  # who sets one of these is given another budget


def refuse_untrusted(out: Path, trust: bool) -> None:
    """Passes where the plans and runs that a comparison's folder already holds may be evaluated.

    Raises:
        RunError: one holds code that medseg did not write on this computer, and they are not trusted.
    """
    for path in sorted((out / "plans").glob("*.json")):
        check_network_trusted(path, read_plan(path), trust)
    for run in sorted((out / "runs").glob("*")):
        if is_planned(run):
            check_configs_trusted(run, trust)


def make_plans(
    design: Design,
    out: Path,
    *,
    settings: Settings,
    epochs: int | None,
    device: str | None,
    trust_scan_affine: bool,
    say: Callable[[str], None],
) -> dict[int, dict[str, Any]]:
    """The plan of each budget, made once and kept in ``plans/``; all have the first one's length.

    Raises:
        RunError: a kept plan was made of other cases or settings, or has another length than ``epochs``.
    """
    plans: dict[int, dict[str, Any]] = {}
    for labels, split in design.splits.items():
        path, made_of = (out / folder / f"labels{labels}.json" for folder in ("plans", "jobs/plans"))
        definition = _plan_definition(design, labels, settings, trust_scan_affine)
        if path.exists():
            _check_same(path, made_of, definition)
        else:
            say(f"Planning for {labels} labelled scans")
            draft = out / ".planning"
            shutil.rmtree(draft, ignore_errors=True)
            plan = prepare_run(
                design.dataset, split, draft, recipe=design.files[design.recipes[0]], settings=settings,
                epochs=epochs, device=device, trust_scan_affine=trust_scan_affine,
            )  # fmt: skip
            shutil.rmtree(draft)
            write_text(made_of, json.dumps({"definition": definition}, indent=1) + "\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_plan(plan, path)
        plans[labels] = read_plan(path)
        epochs = epochs or plans[labels]["epochs"]
        if plans[labels]["epochs"] != epochs:
            raise RunError(
                f"{path} was made for {plans[labels]['epochs']} epochs, not {epochs}. Leave --epochs as it "
                "was, or choose another --out."
            )
    return plans


def prepare_cells(
    design: Design,
    out: Path,
    plans: dict[int, dict[str, Any]],
    settings: Settings,
    conditions: Sequence[str],
    training_score: bool = False,
) -> dict[Path, Cell]:
    """A planned run and a job file for every cell; with ``training_score`` it is tested on its training scans, too.

    Raises:
        RunError: a run that is there was prepared with other cases, settings, length, or another recipe; or by an
            earlier version, while others are still to be prepared.
    """
    if not all(is_planned(out / "runs" / cell.name) for cell in design.cells):
        _refuse_earlier_version(out)
    tests: dict[str, list[dict[str, Any]]] = {}
    for condition in conditions:
        cases = list(design.test)
        if condition != CLEAN:
            cases = corrupt_cases(cases, condition, out / "corrupted" / condition.replace(" ", "_"))
        tests[condition] = items(cases, design.dataset.root)
    jobs = {}
    for cell in design.cells:
        run, path = out / "runs" / cell.name, out / "jobs" / f"{cell.name}.json"
        learnt = (
            {TRAINING: items(design.splits[cell.labels].training, design.dataset.root)}
            if training_score
            else {}
        )
        definition = _definition(design, cell, plans[cell.labels], settings)
        if is_planned(run):
            _check_same(run, path, definition)
        job = {
            "run": str(run.resolve()),
            "tests": str((out / "tests" / cell.name).resolve()),
            "dataset_dir": str(design.dataset.root.resolve()),
            "conditions": tests | learnt,
            "definition": definition,
        }
        write_text(path, json.dumps(job, indent=1) + "\n")
        if not is_planned(run):
            prepare_run(
                design.dataset, design.splits[cell.labels], run, recipe=design.files[cell.recipe],
                settings=[*settings, *own_settings(design, cell)], seed=cell.seed, plan=plans[cell.labels],
                plan_settings=_own_plan(design, cell, settings),
            )  # fmt: skip
        jobs[path] = cell
    return jobs


def conditions_of(robustness: bool) -> list[str]:
    """``clean``, and the corruptions where they are wanted."""
    return [CLEAN, *(CORRUPTIONS if robustness else ())]


def own_settings(design: Design, cell: Cell) -> list[tuple[str, Any]]:
    """What a cell's settings have beyond those of all runs: its recipe's, and over them its variant's."""
    return [*design.own.get(cell.recipe, {}).items(), *cell.variant.settings]


def _own_plan(design: Design, cell: Cell, settings: Settings) -> list[tuple[str, Any]]:
    """What a cell changes of its budget's plan, which was made under the baseline's recipe."""
    file, for_all = design.files[cell.recipe], {_bare(key) for key, _ in settings}
    overlay = {} if cell.recipe == design.recipes[0] else read_recipe(file)
    mine = [(k, v) for k, v in overlay.items() if _bare(k) not in for_all] + own_settings(design, cell)
    return [(_bare(key), value) for key, value in mine if is_of_plan(key) and _bare(key) != LENGTH]


def unequal_recipes(design: Design) -> list[str]:
    """Sentences about recipes and variants that set their own batch or steps, or their own network."""
    found: dict[str, None] = {}
    for cell in design.cells:
        mine = dict(_own_plan(design, cell, ()))
        own = [key for key in EQUAL if key in mine]
        who = f"{cell.recipe} ({cell.variant.name})" if cell.variant.levels else cell.recipe
        if own:
            found[f"{who} sets {', '.join(own)} of its own: its budget is not the baseline's."] = None
        if "network_def" in mine:
            found[f"{who} has a network of its own."] = None
    return list(found)


def _bare(key: str) -> str:
    return key.removeprefix("plan::")


def _plan_definition(design: Design, labels: int, settings: Settings, trust: bool) -> dict[str, Any]:
    """What the plan of a budget is made of."""
    split, baseline = design.splits[labels], read_recipe(design.files[design.recipes[0]])
    mine = [(_bare(key), value) for key, value in (*baseline.items(), *settings) if is_of_plan(key)]
    definition = {
        "settings": {key: value for key, value in mine if key != LENGTH},
        "cases": [case.name for case in (*split.training, *split.unlabelled)],
        "trust in the scans' affines": trust,
    }
    same: dict[str, Any] = json.loads(json.dumps(definition))
    return same


def _definition(design: Design, cell: Cell, plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    split, own = design.splits[cell.labels], own_settings(design, cell)
    definition = {
        "recipe": read_recipe(design.files[cell.recipe]),
        "settings": [list(setting) for setting in settings],
        "epochs": plan["epochs"],
        "training cases": [case.name for case in split.training],
        "validation cases": [case.name for case in split.validation],
        "unlabelled cases": [case.name for case in split.unlabelled],
    }
    if own:
        definition["own settings"] = own
    same: dict[str, Any] = json.loads(json.dumps(definition))
    return same


def _check_same(run: Path, job: Path, definition: dict[str, Any]) -> None:
    earlier = json.loads(job.read_text())["definition"] if job.exists() else definition
    changed = [key for key in {**earlier, **definition} if definition.get(key) != earlier.get(key)]
    if changed:
        cases = any(key.endswith("cases") for key in changed)
        options = " (--cases, --test-cases, --labels, --validation, --split-seed)" if cases else ""
        raise RunError(
            f"{run} was prepared with other {' and '.join(changed)}. Give what it was made with{options}, or choose "
            "another --out."
        )


def _refuse_earlier_version(out: Path) -> None:
    """Runs of today's train.yaml beside those of one with fewer keys would differ in more than their recipes."""
    today = read_config(shared_folder("bundles") / "segmentation" / "configs" / "train.yaml")
    for run in sorted((out / "runs").glob("*")):
        lacks = set(today) - set(read_config(run / "configs" / "train.yaml")) if is_planned(run) else set()
        if lacks:
            raise RunError(
                f"{run} was prepared by an earlier version of medseg: its train.yaml has no {', '.join(sorted(lacks))}. "
                "New runs would train otherwise than those that are there: choose another --out."
            )
