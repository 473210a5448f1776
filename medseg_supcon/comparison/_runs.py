"""The folders of a comparison: one plan for each label budget, the runs that share it, and their jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.comparison._cell import CLEAN
from medseg_supcon.comparison._corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison._design import Cell, Design
from medseg_supcon.data import items, write_plan
from medseg_supcon.errors import RunError
from medseg_supcon.training import is_planned, prepare_run, read_recipe

Settings = Sequence[tuple[str, Any]]
EQUAL = ("epochs", "steps_per_epoch", "batch_size")  # a recipe that sets one of these is given another budget


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
        RunError: a kept plan has another length than ``epochs``.
    """
    plans: dict[int, dict[str, Any]] = {}
    for labels, split in design.splits.items():
        path = out / "plans" / f"labels{labels}.json"
        if not path.exists():
            say(f"Planning for {labels} labelled scans")
            draft = out / ".planning"
            shutil.rmtree(draft, ignore_errors=True)
            plan = prepare_run(
                design.dataset, split, draft, recipe=design.files[design.recipes[0]], settings=settings,
                epochs=epochs, device=device, trust_scan_affine=trust_scan_affine,
            )  # fmt: skip
            shutil.rmtree(draft)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_plan(plan, path)
        plans[labels] = json.loads(path.read_text())
        epochs = epochs or plans[labels]["epochs"]
        if plans[labels]["epochs"] != epochs:
            raise RunError(
                f"{path} was made for {plans[labels]['epochs']} epochs, not {epochs}. Leave --epochs as it "
                "was, or choose another --out."
            )
    return plans


def prepare_cells(
    design: Design, out: Path, plans: dict[int, dict[str, Any]], settings: Settings, conditions: Sequence[str]
) -> dict[Path, Cell]:
    """A planned run and a job file for every cell.

    Raises:
        RunError: a run that is there was prepared with other cases, settings, length, or another recipe.
    """
    tests: dict[str, list[dict[str, Any]]] = {}
    for condition in conditions:
        cases = list(design.test)
        if condition != CLEAN:
            cases = corrupt_cases(cases, condition, out / "corrupted" / condition.replace(" ", "_"))
        tests[condition] = items(cases, design.dataset.root)
    jobs = {}
    for cell in design.cells:
        run, path = out / "runs" / cell.name, out / "jobs" / f"{cell.name}.json"
        definition = _definition(design, cell, plans[cell.labels], settings)
        if is_planned(run):
            _check_same(run, path, definition)
        else:
            draft = out / ".planning"
            shutil.rmtree(draft, ignore_errors=True)
            prepare_run(
                design.dataset, design.splits[cell.labels], draft, recipe=design.files[cell.recipe],
                settings=settings, seed=cell.seed, plan=plans[cell.labels],
            )  # fmt: skip
            run.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(run, ignore_errors=True)
            draft.rename(run)
        job = {
            "run": str(run.resolve()),
            "tests": str((out / "tests" / cell.name).resolve()),
            "dataset_dir": str(design.dataset.root.resolve()),
            "conditions": tests,
            "definition": definition,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(job, indent=1) + "\n")
        jobs[path] = cell
    return jobs


def conditions_of(robustness: bool) -> list[str]:
    """``clean``, and the corruptions where they are wanted."""
    return [CLEAN, *(CORRUPTIONS if robustness else ())]


def unequal_recipes(design: Design) -> list[str]:
    """Sentences about recipes that set their own length or batch, and so get another budget."""
    found = []
    for name, file in design.files.items():
        own = [key for key in EQUAL if key in read_recipe(file)]
        if own:
            found.append(
                f"The recipe {name} sets {', '.join(own)} of its own: its budget is not the others'."
            )
    return found


def _definition(design: Design, cell: Cell, plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    split = design.splits[cell.labels]
    definition = {
        "recipe": read_recipe(design.files[cell.recipe]),
        "settings": [list(setting) for setting in settings],
        "epochs": plan["epochs"],
        "training cases": [case.name for case in split.training],
        "validation cases": [case.name for case in split.validation],
        "unlabelled cases": [case.name for case in split.unlabelled],
    }
    same: dict[str, Any] = json.loads(json.dumps(definition))
    return same


def _check_same(run: Path, job: Path, definition: dict[str, Any]) -> None:
    earlier = json.loads(job.read_text())["definition"] if job.exists() else definition
    changed = [key for key in definition if definition[key] != earlier.get(key)]
    if changed:
        raise RunError(
            f"{run} was prepared with other {' and '.join(changed)}. Give what it was made with, or choose "
            "another --out."
        )
