"""``medseg train --folds``: runs of one data set, each with other cases held out, in one folder that is resumed as a whole.

RUNS/
  folds.json             number of folds, who is a patient, and the post-processing of the plan as it was made
  fold_0/ fold_1/ ...    ordinary runs, all with one plan, made from all labelled cases
  jobs/                  the job file and, with several workers or on a cluster, the log of each fold
  slurm/                 with a cluster: its jobs
  eval/                  scores of the out-of-fold masks, see `out_of_fold`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from medseg_supcon.bundle import (
    DRAFT,
    FOLDS,
    at_work_in,
    cases_of,
    check_configs_trusted,
    has_folds,
    is_planned,
    member_runs,
    parse_setting,
    plain_text,
    read_config,
    read_recipe,
)
from medseg_supcon.comparison.jobs import CLUSTER_FILES, Workers
from medseg_supcon.comparison.out_of_fold import (
    OutOfFold,
    choose,
    forget_scores,
    is_scored,
    keep_masks,
    masks_are_kept,
    score,
)
from medseg_supcon.comparison.postprocessing import sentences
from medseg_supcon.comparison.runs import do_jobs
from medseg_supcon.datasets import Dataset, Report, Split, group_of, split_folds
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.files import folder_lock, read_json, write_text
from medseg_supcon.plan import read_plan, write_plan
from medseg_supcon.quality import QualityModel
from medseg_supcon.slurm import Cluster
from medseg_supcon.training import (
    Request,
    check_planned,
    extend_training,
    is_complete,
    is_finished,
    prepare_run,
    refuse_errors,
    requested_cases,
)

IN_THE_WAY = ("configs", "models", "eval", "jobs", "fold_*")
POSTPROCESSING = ("keep_largest", "smallest_mm3")  # keys of a plan
ORPHANS = 20.0  # seconds in which the processes of a killed call end
Show = Callable[[Report], None]
Planned = Callable[[dict[str, Any], Split, Path], None]  # the plan, the first split, and its run
Say = Callable[[str], None]


@dataclass(frozen=True)
class FoldSet:
    """A folder of folds.

    Attributes:
        runs: fold_0, fold_1, ...
        patients: case name -> what stands for its patient.
        base: ``keep_largest`` and ``smallest_mm3`` of the plan as it was made.
    """

    folder: Path
    runs: list[Path]
    patients: dict[str, str]
    base: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FoldSet:
        """A `RunError` if folds.json is damaged or a fold is missing."""
        content, runs = read_json(folder / FOLDS), member_runs(folder)
        try:
            patients = {str(name): str(patient) for name, patient in content["patients"].items()}
            base = {key: content["plan"][key] for key in POSTPROCESSING if key in content["plan"]}
        except (KeyError, TypeError, AttributeError):
            raise RunError(f"{folder / FOLDS} is damaged. Copy it again, or choose another --out.") from None
        if missing := [run for run in runs if not is_planned(run)]:
            raise RunError(f"{missing[0]} is missing or damaged. Copy it back, or choose another --out.")
        return cls(folder, runs, patients, base)


def train_folds(
    path: Path, out: Path, number: int | None, request: Request, *, resume: bool = False, device: str | None = None,
    workers: int | None = None, cluster: Cluster | None = None, trust: bool = False, show: Show = lambda _: None,
    planned: Planned = lambda *_: None, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """Plan, train and score the folds of the data set at ``path``; returns the content of ``eval/metrics.json``.

    With a ``cluster`` every fold is a job there, and so is planning, which measures time and memory.
    A killed call is continued with ``resume``: finished folds are kept, and the others continue where they were. `show`
    is called with the check's findings, `planned` with the plan and the first fold, `say` with lines on what is done.

    Raises:
        RunError: the folder contains something else, or folds without ``resume``, or a fold fails.
        DataError: the data set has errors or cannot be split into so many folds.
        ConfigError: a setting is invalid.
    """
    out.mkdir(parents=True, exist_ok=True)
    where = Workers(device, workers or (None if cluster else 1), cluster, out / CLUSTER_FILES)
    with folder_lock(out, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg train is working in {out}. Wait for it, or choose another --out.")
        if has_folds(out):
            if not resume:
                raise RunError(f"{out} already contains folds. Choose another --out, or continue with --resume.")
            _move_drafts(out)
            folds = FoldSet.read(out)
            if number is not None and number != len(folds.runs):
                raise RunError(f"{out} has {len(folds.runs)} folds, not {number}. Use --folds {len(folds.runs)}.")
            if request.epochs is not None:
                for run in folds.runs:
                    extend_training(run, request.epochs)
            if not (complete := _is_complete(folds)):
                _check_again(path, folds, request, show, trust, say)
        else:
            plan, splits = _plan(path, out, number or 0, request, where, trust, show, say)
            complete, folds = False, FoldSet.read(out)
            planned(plan, splits[0], folds.runs[0])
            sizes = ", ".join(str(len(split.validation)) for split in splits)
            say(
                f"{len(splits)} folds of this plan and this expected time each; {sizes} cases held out ({out / FOLDS})."
            )
        if complete:
            say(f"{out} is finished. There is nothing to resume.")
        else:
            _train_and_score(folds, where, say)
        return read_json(out / "eval" / "metrics.json")


def _plan(
    path: Path, out: Path, number: int, request: Request, where: Workers, trust: bool, show: Show, say: Say
) -> tuple[dict[str, Any], tuple[Split, ...]]:
    """Write all folds as planned runs; after a kill there are all of them, or there is nothing but a draft."""
    if there := sorted(path.name for name in IN_THE_WAY for path in out.glob(name)):
        raise RunError(
            f"{out} contains {there[0]}, but no folds.json, so --folds did not write it. Choose another --out."
        )
    if request.validation is not None:
        raise ConfigError(
            "--validation and --folds contradict each other: each fold is validated on the cases held out."
        )
    recipe, seed, draft = request.recipe or "joint", request.seed or 0, out / DRAFT
    read_recipe(recipe)
    settings = [parse_setting(text) for text in request.settings or ()]
    dataset, more = requested_cases(path, request)
    splits = split_folds(dataset, number, labels=request.labels, seed=seed)
    splits = tuple(replace(split, unlabelled=(*split.unlabelled, *more)) for split in splits)
    labelled = tuple(dict.fromkeys(case for split in splits for case in (*split.training, *split.validation)))
    names = {case.name for case in labelled}
    others = tuple(case for case in splits[0].unlabelled if case.name not in names)
    mismatch = request.allow_affine_mismatch
    report = refuse_errors(dataset, [*labelled, *others], labelled, path, show, mismatch, request.unlabelled)
    options: dict[str, Any] = {"recipe": recipe, "settings": settings, "init": request.init, "trust": trust}
    shutil.rmtree(draft, ignore_errors=True)
    try:
        whole = Split(labelled, splits[0].validation, others, splits[0].warnings)
        options |= {"trust_scan_affine": mismatch, "report": report}
        of_plan: dict[str, Any] = {"epochs": request.epochs, "minutes": request.minutes, "device": where.device}
        of_plan |= {"seed": seed, **options}
        where.call("plan", partial(_prepare, dataset, whole, (draft / "plan").resolve(), of_plan), say)
        plan = read_plan(draft / "plan" / "configs" / "plan.json")
        expected = (draft / "plan" / "logs" / "expected.json").read_text(encoding="utf-8")
        for index, split in enumerate(splits):
            run = draft / f"fold_{index}"
            prepare_run(dataset, split, run, seed=seed + index, plan=plan, **options)
            write_text(run / "logs" / "expected.json", expected)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    content = {
        "folds": number,
        "data": str(dataset.root.resolve()),
        "declared_by": None if dataset.folds is None else dataset.folds.source,
        "plan": {key: plan[key] for key in POSTPROCESSING if key in plan},
        "warnings": list(splits[0].warnings),
        "validation": [[case.name for case in split.validation] for split in splits],
        "patients": {case.name: group_of(case) for case in labelled},
    }
    write_text(out / FOLDS, json.dumps(content, indent=1) + "\n")
    _move_drafts(out)
    return plan, splits


def _prepare(dataset: Dataset, split: Split, run: Path, options: dict[str, Any]) -> str:
    """`prepare_run` as the task of a cluster: the machine that trains measures time and memory."""
    prepare_run(dataset, split, run, **options)
    return ""


def _move_drafts(out: Path) -> None:
    for run in member_runs(out):
        if not run.exists() and (out / DRAFT / run.name).exists():
            (out / DRAFT / run.name).rename(run)
    shutil.rmtree(out / DRAFT, ignore_errors=True)


def _check_again(path: Path, folds: FoldSet, request: Request, show: Show, trust: bool, say: Say) -> None:
    """The checks of a resumed run, once for all folds: each lists all cases, in one of its parts."""
    for run in folds.runs:
        check_configs_trusted(run, trust)
    check_planned(path, folds.runs[0], request, resume=True, show=show, trust=trust)
    if given := replace(request, epochs=None).options():
        say(f"Note: {', '.join(given)}: the values in the folds' plan.json and train.yaml are used.")


def _train_and_score(folds: FoldSet, where: Workers, say: Say) -> None:
    if where.cluster is None:
        _wait_for_orphans(folds)
    forget_scores(folds.folder)
    parts = [_out_of_fold(run) for run in folds.runs]
    trained = all(is_finished(run) for run in folds.runs)
    if not (trained and masks_are_kept(folds.folder, parts)):
        _use(folds, folds.base)
        _work(folds, parts, where, say)
        keep_masks(folds.folder, parts)
    chosen, tried = choose(folds.folder, parts, folds.patients, folds.base)
    _use(folds, chosen)
    if not all(map(is_complete, folds.runs)):
        say("The folds are scored again, with the post-processing that helps on the out-of-fold masks.")
        _work(folds, parts, where, say)
    _pool_quality(folds.runs)
    score(folds.folder, parts, tried, sentences(tried))


def _work(folds: FoldSet, parts: Sequence[OutOfFold], where: Workers, say: Say) -> None:
    """Train what is not finished, and score what is not scored."""
    names = {}
    for run, part in zip(folds.runs, parts, strict=True):
        if not part.has_masks():
            (run / "eval" / "metrics.json").unlink(missing_ok=True)  # so that it is scored again
        job = folds.folder / "jobs" / f"{run.name}.json"
        content = {"run": str(run.resolve()), "tests": str(job.parent.resolve() / run.name), "conditions": {}}
        write_text(job, json.dumps(content, indent=1) + "\n")
        names[job] = run.name
    do_jobs(names, where, say, "Run the same command with --resume")


def _use(folds: FoldSet, keys: dict[str, Any]) -> None:
    """Write the post-processing into the plan of each fold; one that had another must be scored again."""
    for run in folds.runs:
        path = run / "configs" / "plan.json"
        plan = read_plan(path)
        wanted = {key: value for key, value in plan.items() if key not in POSTPROCESSING}
        wanted |= {key: value for key, value in keys.items() if value or key == "keep_largest"}
        if wanted != plan:
            with at_work_in(run):
                (run / "eval" / "metrics.json").unlink(missing_ok=True)  # before the plan: a kill between is seen
                write_plan({key: wanted[key] for key in (*plan, *wanted) if key in wanted}, path)


def _pool_quality(runs: Sequence[Path]) -> None:
    """The quality models, if the training was long enough for them, are calibrated on the out-of-fold masks of all folds."""
    models = [model for run in runs if (model := QualityModel.load(run)) is not None]
    if len(models) == len(runs):
        QualityModel.pool(models)
        for run, model in zip(runs, models, strict=True):
            model.save(run)


def _out_of_fold(run: Path) -> OutOfFold:
    folder = plain_text(read_config(run / "configs" / "evaluate.yaml").get("dataset_dir", ""))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'evaluate.yaml'}: dataset_dir must be the path of a folder.")
    return OutOfFold(run, cases_of(run).get("validation", []), folder)


def _is_complete(folds: FoldSet) -> bool:
    return all(map(is_complete, folds.runs)) and is_scored(folds.folder, [_out_of_fold(run) for run in folds.runs])


def _wait_for_orphans(folds: FoldSet) -> None:
    """A process of a killed call notices within a second that it is alone; until then it has its run's lock."""
    until = monotonic() + ORPHANS
    for run in folds.runs:
        with folder_lock(run, wait=False) as free:
            busy = not free
        while busy and monotonic() < until:
            sleep(0.2)
            with folder_lock(run, wait=False) as free:
                busy = not free
