"""The folders of a comparison: one plan for each label budget, the runs that share it, and their jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import check_configs_trusted, check_network_trusted, is_planned, read_recipe
from medseg_supcon.comparison.cell import CLEAN, TRAINING, scores_folder
from medseg_supcon.comparison.corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison.design import Cell, Design, case_names
from medseg_supcon.datasets import items
from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.plan import plan_warnings, read_plan, write_plan
from medseg_supcon.training import is_of_plan, prepare_run

Row = dict[str, Any]
Say = Callable[[str], None]
Settings = Sequence[tuple[str, Any]]
LENGTH = "epochs"  # the comparison's, whatever a recipe says
EQUAL = ("steps_per_epoch", "batch_size")  # a recipe that sets one of these has another budget


def refuse_untrusted(out: Path, trust: bool) -> None:
    """A `RunError` if a plan or run that the folder already holds has code that is not trusted."""
    for path in sorted((out / "plans").glob("*.json")):
        check_network_trusted(path, read_plan(path), trust)
    for run in sorted((out / "runs").glob("*")):
        if is_planned(run):
            check_configs_trusted(run, trust)


def make_plans(
    design: Design, out: Path, settings: Settings, epochs: int | None, device: str | None, trust_affine: bool, say: Say
) -> dict[int, Row]:
    """The plan of each budget, kept in ``plans/``, all of one length; a `RunError` if a kept one was made otherwise."""
    plans: dict[int, Row] = {}
    baseline = design.files[design.recipes[0]]
    mine = [(_bare(key), value) for key, value in (*read_recipe(baseline).items(), *settings) if is_of_plan(key)]
    for labels, split in design.splits.items():
        path, record = (out / folder / f"labels{labels}.json" for folder in ("plans", "jobs/plans"))
        definition = {
            "settings": {key: value for key, value in mine if key != LENGTH},
            "cases": [case.name for case in (*split.training, *split.unlabelled)],
            "trust in the scans' affines": trust_affine,
        }
        if path.exists():
            _check_same(path, record, definition)
        else:
            say(f"Planning for {labels} labelled scans")
            draft = out / ".planning"
            shutil.rmtree(draft, ignore_errors=True)
            plan = prepare_run(
                design.dataset, split, draft, recipe=baseline, settings=settings, epochs=epochs, device=device,
                trust_scan_affine=trust_affine,
            )  # fmt: skip
            for warning in plan_warnings(plan):
                say(f"Warning: {warning}")
            shutil.rmtree(draft)
            write_text(record, json.dumps({"definition": definition}, indent=1, default=str) + "\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_plan(plan, path)
        plans[labels] = read_plan(path)
        made = plans[labels]["epochs"]
        epochs = epochs or made
        if made != epochs:
            raise RunError(
                f"{path} was made for {made} epochs, not {epochs}. Leave --epochs as it was, or choose another --out."
            )
    return plans


def prepare_cells(
    design: Design, out: Path, plans: dict[int, Row], settings: Settings, robustness: bool, training_score: bool
) -> dict[Path, Cell]:
    """A planned run and a job file for every cell; a `RunError` if an existing run was prepared otherwise."""
    root = design.dataset.root
    tests = {CLEAN: items(design.test, root)}
    for condition in CORRUPTIONS if robustness else ():
        folder = scores_folder(out / "corrupted", condition)
        tests[condition] = items(corrupt_cases(design.test, condition, folder), root)
    jobs = {}
    for cell in design.cells:
        run, path = out / "runs" / cell.name, out / "jobs" / f"{cell.name}.json"
        split, own, plan = design.splits[cell.labels], _own_settings(design, cell), plans[cell.labels]
        definition = {"recipe": read_recipe(design.files[cell.recipe]), "settings": settings, "epochs": plan["epochs"]}
        definition |= {f"{part} cases": names for part, names in case_names(split).items()}
        definition |= {"own settings": own} if own else {}
        planned = is_planned(run)
        if planned:
            _check_same(run, path, definition)
        job = {
            "run": str(run.resolve()),
            "tests": str((out / "tests" / cell.name).resolve()),
            "dataset_dir": str(root.resolve()),
            "classes": list(design.dataset.labels)[1:],
            "conditions": tests | ({TRAINING: items(split.training, root)} if training_score else {}),
            "definition": definition,
        }
        write_text(path, json.dumps(job, indent=1, default=str) + "\n")
        if not planned:
            options: Row = {"settings": [*settings, *own], "plan_settings": _own_plan(design, cell, settings)}
            options |= {"recipe": design.files[cell.recipe], "seed": cell.seed, "plan": plan}
            prepare_run(design.dataset, split, run, **options)
        jobs[path] = cell
    return jobs


def _own_settings(design: Design, cell: Cell) -> list[tuple[str, Any]]:
    """A cell's settings beyond those of all runs: its recipe's, and over them its variant's."""
    return [*design.own.get(cell.recipe, {}).items(), *cell.variant.settings]


def _own_plan(design: Design, cell: Cell, settings: Settings) -> list[tuple[str, Any]]:
    """What a cell changes in its budget's plan, which was made under the baseline's recipe."""
    for_all = {_bare(key) for key, _ in settings}
    overlay = {} if cell.recipe == design.recipes[0] else read_recipe(design.files[cell.recipe])
    mine = [(k, v) for k, v in overlay.items() if _bare(k) not in for_all] + _own_settings(design, cell)
    return [(_bare(key), value) for key, value in mine if is_of_plan(key) and _bare(key) != LENGTH]


def unequal_recipes(design: Design) -> list[str]:
    """Sentences about recipes and variants that set their own batch or steps, or their own network."""
    sentences = []
    for cell in design.cells:
        mine = dict(_own_plan(design, cell, ()))
        own = ", ".join(key for key in EQUAL if key in mine)
        who = f"{cell.recipe} ({cell.variant.name})" if cell.variant.levels else cell.recipe
        if own:
            sentences.append(f"{who} sets its own {own}: its budget is not the baseline's.")
        if "network_def" in mine:
            sentences.append(f"{who} has its own network.")
    return list(dict.fromkeys(sentences))


def _bare(key: str) -> str:
    return key.removeprefix("plan::")


def _check_same(made: Path, record: Path, definition: Row) -> None:
    """A plan or run was made of what is asked for now, as its record says."""
    now = json.loads(json.dumps(definition, default=str))  # lists for tuples, text for keys
    try:
        earlier = read_json(record)["definition"]
        changed = [key for key in {**earlier, **now} if now.get(key) != earlier.get(key)]
    except (RunError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{record} is missing or damaged: it says what {made} was made with. Delete {made} to make it again, or choose "
            "another --out."
        ) from None
    if changed:
        cases = any(key.endswith("cases") for key in changed)
        options = " (--cases, --test-cases, --labels, --validation, --split-seed)" if cases else ""
        raise RunError(
            f"{made} was prepared with other {' and '.join(changed)}. Give what it was made with{options}, or choose "
            "another --out."
        )
