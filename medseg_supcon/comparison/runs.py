"""``medseg compare``: prepare every run, train and test what is not done yet, read the results, write the report."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from medseg_supcon.bundle import check_configs_trusted, check_network_trusted, describe_recipe, is_planned, read_recipe
from medseg_supcon.comparison import jobs
from medseg_supcon.comparison.corruptions import CORRUPTIONS, corrupt_cases
from medseg_supcon.comparison.design import Cell, Design, case_names
from medseg_supcon.comparison.jobs import CLUSTER_FILES, Workers
from medseg_supcon.comparison.report import Results, write_comparison
from medseg_supcon.datasets import Dataset, Split, items, target_names
from medseg_supcon.errors import RunError
from medseg_supcon.evaluation import read_history, summarise
from medseg_supcon.files import folder_lock, read_json, write_text
from medseg_supcon.plan import plan_warnings, read_plan, write_plan
from medseg_supcon.slurm import Cluster
from medseg_supcon.text import counted
from medseg_supcon.training import is_finished, is_of_plan, prepare_run

Row = dict[str, Any]
Say = Callable[[str], None]
MARKER = "comparison.json"
LENGTH = "epochs"  # the comparison's, whatever a recipe says
EQUAL = ("steps_per_epoch", "batch_size")  # a recipe that sets one of these has another budget


def compare(
    design: Design, out: Path, *, device: str | None = None, workers: int | None = None, cluster: Cluster | None = None,
    trust_scan_affine: bool = False, trust: bool = False, say: Say = print,
) -> Row:  # fmt: skip
    """Train and test every run of a design, write tables, pictures and ``report.html``; returns ``comparison.json``.

    The same call continues an interrupted comparison: finished runs are kept, and what they were made with is checked.
    With a ``cluster`` every run is a job there, and so is planning, which measures time and memory.
    """
    if not (out / MARKER).exists():
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty and contains no comparison. Choose another --out.")
        write_text(out / MARKER, "{}\n")
    where = Workers(device, workers, cluster, out / CLUSTER_FILES)
    with folder_lock(out, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg compare is working in {out}. Wait for it, or choose another --out.")
        for path in sorted((out / "plans").glob("*.json")):
            check_network_trusted(path, read_plan(path), trust)
        for run in filter(is_planned, sorted((out / "runs").glob("*"))):
            check_configs_trusted(run, trust)
        plans = make_plans(design, out, where, trust_scan_affine, say)
        cells = prepare_cells(design, out, plans)
        do_jobs({job: cell.name for job, cell in cells.items()}, where, say)
        report = write_comparison(out, _read_results(design, next(iter(plans.values())), cells))
        write_text(out / MARKER, json.dumps(report, indent=1, allow_nan=False) + "\n")
        return report


def make_plans(design: Design, out: Path, workers: Workers, trust_affine: bool, say: Say) -> dict[int, Row]:
    """The plan of each budget, kept in ``plans/``, all of one length; a `RunError` if a kept one was made otherwise."""
    plans: dict[int, Row] = {}
    baseline, epochs = design.config.recipes[0].recipe, design.config.epochs
    settings = list(design.config.settings.items())
    mine = [(_bare(key), value) for key, value in (*read_recipe(baseline).items(), *settings) if is_of_plan(key)]
    for labels, split in design.splits.items():
        path, record = (out / folder / f"labels{labels}.json" for folder in ("plans", "jobs/plans"))
        definition = {
            "settings": {key: value for key, value in mine if key != LENGTH},
            "cases": [case.name for case in (*split.training, *split.unlabelled)],
            "--allow-affine-mismatch": trust_affine,
        }
        if path.exists():
            _check_same(path, record, definition)
        else:
            say(f"Planning for {labels} labelled scans")
            options: Row = {"settings": settings, "device": workers.device, "trust_scan_affine": trust_affine}
            options |= {"recipe": baseline, "epochs": epochs}
            write_text(record, json.dumps({"definition": definition}, indent=1, default=str) + "\n")
            task = partial(make_plan_file, design.dataset, split, path.resolve(), options)
            workers.call(f"plan_{path.stem}", task, say)
            for warning in plan_warnings(read_plan(path)):
                say(f"Warning: {warning}")
        plans[labels] = read_plan(path)
        epochs = epochs or plans[labels]["epochs"]
        if (made := plans[labels]["epochs"]) != epochs:
            cure = "Use the same --epochs as before, or choose another --out."
            raise RunError(f"{path} was made for {made} epochs, not {epochs}. {cure}")
    return plans


def make_plan_file(dataset: Dataset, split: Split, path: Path, options: Row) -> str:
    """Plan, on the machine that will train, and write the plan. Returns an empty string, as the task of a cluster."""
    with TemporaryDirectory() as draft:
        plan = prepare_run(dataset, split, Path(draft), **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_plan(plan, path)
    return ""


def prepare_cells(design: Design, out: Path, plans: dict[int, Row]) -> dict[Path, Cell]:
    """A planned run and a job file for every cell; a `RunError` if an existing run was prepared otherwise."""
    root, config, settings = design.dataset.root, design.config, list(design.config.settings.items())
    tests = {jobs.CLEAN: items(design.test, root)}
    for condition in CORRUPTIONS if config.robustness else ():
        degraded = corrupt_cases(design.test, condition, jobs.scores_folder(out / "corrupted", condition))
        tests[condition] = items(degraded, root)
    cells = {}
    for cell in design.cells:
        run, path = out / "runs" / cell.name, out / "jobs" / f"{cell.name}.json"
        split, recipe, plan = design.splits[cell.labels], cell.recipe.recipe, plans[cell.labels]
        definition = {"recipe": read_recipe(recipe), "settings": settings, "epochs": plan["epochs"]}
        definition |= {f"{part} cases": names for part, names in case_names(split).items()}
        definition |= {"own settings": cell.own} if cell.own else {}
        if planned := is_planned(run):
            _check_same(run, path, definition)
        job = {
            "run": str(run.resolve()),
            "tests": str((out / "tests" / cell.name).resolve()),
            "dataset_dir": str(root.resolve()),
            "classes": target_names(design.dataset.label_plan),
            "conditions": tests | ({jobs.TRAINING: items(split.training, root)} if config.training_score else {}),
            "definition": definition,
        }
        write_text(path, json.dumps(job, indent=1, default=str) + "\n")
        if not planned:
            # the quality model of a cell is not used: only --set quality=true fits one
            own = [("quality", False), *settings, *cell.own]
            options: Row = {"settings": own, "plan_settings": _own_plan(design, cell)}
            prepare_run(design.dataset, split, run, recipe=recipe, seed=cell.seed, plan=plan, **options)
        cells[path] = cell
    return cells


def _own_plan(design: Design, cell: Cell) -> list[tuple[str, Any]]:
    """What a cell changes in its budget's plan, which was made under the baseline's recipe."""
    for_all = set(map(_bare, design.config.settings))
    overlay = {} if cell.recipe == design.config.recipes[0] else read_recipe(cell.recipe.recipe)
    mine = [(k, v) for k, v in overlay.items() if _bare(k) not in for_all] + cell.own
    return [(_bare(key), value) for key, value in mine if is_of_plan(key) and _bare(key) != LENGTH]


def _bare(key: str) -> str:
    return key.removeprefix("plan::")


def unequal_recipes(design: Design) -> list[str]:
    """Sentences about recipes and variants that set their own batch or steps, or their own network."""
    sentences = []
    for cell in design.cells:
        mine = dict(_own_plan(design, cell))
        who = cell.recipe.name + (f" ({cell.variant.name})" if cell.variant.levels else "")
        if own := ", ".join(key for key in EQUAL if key in mine):
            sentences.append(f"{who} sets its own {own}, so its budget differs from the baseline's.")
        if "network_def" in mine:
            sentences.append(f"{who} has its own network.")
    return list(dict.fromkeys(sentences))


def _check_same(made: Path, record: Path, definition: Row) -> None:
    """A `RunError` if, as its record says, a plan or run was made with something else than is asked for now."""
    now = json.loads(json.dumps(definition, default=str))  # lists for tuples, text for keys
    try:
        earlier = read_json(record)["definition"]
        changed = [key for key in {**earlier, **now} if now.get(key) != earlier.get(key)]
    except (RunError, KeyError, TypeError, AttributeError):
        cure = f"Delete {made} to create it again, or choose another --out."
        raise RunError(f"{record}, which records how {made} was made, is missing or damaged. {cure}") from None
    if changed:
        cases = any(key.endswith("cases") for key in changed)
        options = " (--cases, --test-cases, --labels, --validation, --split-seed)" if cases else ""
        cure = f"Use the same options as before{options}, or choose another --out."
        raise RunError(f"{made} was prepared with other {' and '.join(changed)}. {cure}")


def do_jobs(names: Mapping[Path, str], workers: Workers, say: Say, again: str = "Run the same command again") -> None:
    """Do what is left of job files, and say so; ``names`` are those of their runs. `RunError` if one of them fails."""
    todo = [job for job in names if not jobs.is_done(read_json(job))]
    if len(todo) < len(names):
        say(f"{len(names) - len(todo)} of {len(names)} runs are finished already.")
    start, problems = monotonic(), dict[str, str]()

    def done(job: Path, problem: str) -> None:
        problems[names[job]] = problem
        left = len(todo) - len(problems)
        minutes = (monotonic() - start) / len(problems) * left / 60
        rest = f"; about {max(minutes, 1):.0f} min left" if left else ""
        say(f"{len(problems)}/{len(todo)}  {names[job]} {f'failed: {problem}' if problem else 'done'}{rest}")

    if todo:
        say(f"{counted(len(todo), 'run')} to do {workers}.")
    workers.run(todo, done, say)
    if failed := [f"{name}: {problem}" for name, problem in problems.items() if problem]:
        cure = f"The others are kept. {again} to continue."
        raise RunError(f"{len(failed)} of {len(names)} runs failed; {failed[0]}. {cure}")


def _read_results(design: Design, plan: Row, cells: Mapping[Path, Cell]) -> Results:
    """The results of finished and tested runs; ``plan`` is the smallest budget's."""
    scores = defaultdict[str, list[Row]](list)
    runs, histories = [], []
    for path, cell in cells.items():
        job = read_json(path)
        run, tests = Path(job["run"]), Path(job["tests"])
        rows = {condition: jobs.read_scores(job, condition) for condition in job["conditions"]}
        for condition, scored in rows.items():
            if scored is None:
                raise RunError(f"{jobs.scores_folder(tests, condition)} was changed. Run the command again.")
            if condition != jobs.TRAINING:
                scores[condition] += [cell.key | row for row in scored]
        history = [{k: v for k, v in row.items() if math.isfinite(v)} for row in read_history(run / "logs/history.csv")]
        histories.append(cell.key | {"history": history})
        runs.append(cell.key | _run_row(history, rows) | jobs.read_cost(tests) | {"finished": is_finished(run)})
    about = {
        "dataset": design.dataset.name,
        "classes": target_names(design.dataset.label_plan),
        "recipes": [recipe.name for recipe in design.config.recipes],
        "overlays": {name: {**read_recipe(r.recipe), **(r.model_extra or {})} for name, r in design.recipes.items()},
        "descriptions": {name: describe_recipe(r.recipe) for name, r in design.recipes.items()},
        "variants": [{"name": v.name, "levels": dict(v.levels), "settings": dict(v.settings)} for v in design.variants],
        "axes": design.config.variants,
        "settings": [f"{key}={value}" for key, value in design.config.settings.items()],
        "patch_size": plan["patch_size"],
        "seeds": design.config.seeds,
        "splits": {labels: case_names(split) for labels, split in design.splits.items()},
        "test": [case.name for case in design.test],
        "tested_on": design.tested_on,
        "epochs": plan["epochs"],
        "steps": plan["epochs"] * plan["steps_per_epoch"],
        "patches_per_step": 2 * plan["batch_size"],
        "warnings": [*unequal_recipes(design), *(w for s in design.splits.values() for w in s.warnings)],
    }
    return Results(about, scores, runs, histories)


def _run_row(history: Sequence[Row], rows: Mapping[str, Any]) -> Row:
    """``test_*``, ``training_dice``: means over classes; validation Dice and losses: of the last epoch that has one."""
    test, last = summarise(rows[jobs.CLEAN])["mean"], {key: value for row in history for key, value in row.items()}
    trained = {"training_dice": summarise(rows[jobs.TRAINING])["mean"]["dice"]} if jobs.TRAINING in rows else {}
    return {
        "test_dice": test["dice"],
        "test_hd95_mm": test["hd95_mm"],
        "validation_dice": last.get("val_mean_dice"),
        "loss": last.get("loss"),
        "contrastive_loss": last.get("contrastive") if any(row.get("contrastive") for row in history) else None,
        "epochs": len(history),
        "steps": int(history[-1]["step"]),
        "minutes": round(sum(row["seconds"] for row in history) / 60, 2),
    } | trained
