"""Scores of a run's model on labelled scans: the predictor's masks against the label maps, case by case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import cases_of, member_runs, plain_text, read_config
from medseg_supcon.datasets import Dataset, check_dataset, items, load_items
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation import Row, score_mask, write_metrics
from medseg_supcon.inference.folder import make_writable, segment_each
from medseg_supcon.inference.manifest import entry_of
from medseg_supcon.inference.predictor import Predictor
from medseg_supcon.inference.prepare import Prediction
from medseg_supcon.plan import read_plan
from medseg_supcon.quality import Entry, write_page, write_pictures
from medseg_supcon.scans import Scan, write_nifti

ONLY_OF_TRAINING = ("duplicate_image", "no_structure")  # errors that do not prevent scoring
TOLERANCE_MM = 1.0


def evaluate_dataset(
    run: str | Path,
    dataset: Dataset,
    out: str | Path,
    *,
    device: str | None = None,
    trust: bool = False,
    pictures: bool = False,
) -> dict[str, Any]:
    """Score a run on the labelled cases of a data set, as `evaluate_items`; cases with errors become ``problems``.

    Of a folder of ``medseg train --folds`` this scores the ensemble. Each row says in ``trained_on`` whether the run (one
    of the folds) was trained on the case. DataError if no case can be scored, or
    the channels are not the run's; RunError if the run is not trained, or needs trust.
    """
    out, runs = Path(out), member_runs(run)
    for one in runs:
        if not all((one / name).is_file() for name in ("configs/plan.json", "models/model.pt")):
            needed = "configs/plan.json and models/model.pt are needed"
            raise RunError(f"{one} is not a trained run: {needed}. Train it first.")
    if not dataset.labelled:
        raise DataError(f"{dataset.root} has no labelled cases. Evaluation needs label maps.")
    plan = read_plan(runs[0] / "configs" / "plan.json")
    theirs, ours = dataset.channels, plan["channels"]
    if len(theirs) != len(ours):
        found = f"has {len(theirs)} channels per scan ({', '.join(theirs)})"
        expected = f"{run} was trained on {len(ours)} ({', '.join(ours)})"
        raise DataError(f"{dataset.root} {found}, and {expected}. Evaluate on a data set with the same channels.")
    meaning = {"labels": plan["labels"], "ignore_label": plan["ignore_label"], "regions": plan.get("regions", {})}
    meaning["regions_class_order"] = tuple(plan.get("regions_class_order", ()))
    selected = replace(dataset, cases=dataset.labelled, **meaning)
    report = check_dataset(selected, allow_affine_mismatch=plan.get("trust_scan_affine", False))
    problems = {f.case: f.message for f in reversed(report.errors) if f.code not in ONLY_OF_TRAINING}
    good = [case for case in dataset.labelled if case.name not in problems]
    if not good:
        raise DataError(f"No case of {dataset.root} can be evaluated. {next(iter(problems.values()))}")
    entries = load_items(items(good, dataset.root), dataset.root)
    predictor = Predictor(run, device=device, trust=trust, quality=pictures)
    seen = set[str]().union(*(trained_on(one, dataset) for one in runs))
    return evaluate_items(predictor, entries, out, problems=problems, seen=seen, pictures=pictures)


def trained_on(run: Path, dataset: Dataset) -> set[str]:
    """Names of the cases of a data set that a run was trained on: the same image, or the same name in that data set."""
    training, config = cases_of(run).get("training"), run / "configs" / "train.yaml"
    if not training:
        return set()
    folder = plain_text(read_config(config).get("dataset_dir", "")) if config.is_file() else ""
    images = {os.path.realpath(file) for item in load_items(training, folder or "") for file in _images(item)}
    same = read_plan(run / "configs" / "plan.json")["name"] == dataset.name
    names = {item.get("name") for item in training} if same else set()
    return {
        case.name
        for case in dataset.cases
        if case.name in names or not images.isdisjoint(os.path.realpath(file) for file in case.images)
    }


def evaluate_validation(run: Path, *, device: str | None = None, trust: bool = False) -> dict[str, Any]:
    """Score a run on the validation cases of its datalist.json, into ``eval/``, with evaluate.yaml's settings."""
    config = read_config(run / "configs" / "evaluate.yaml")
    folder = plain_text(config.get("dataset_dir", ""))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'evaluate.yaml'}: dataset_dir must be the path of a folder.")
    entries = load_items(cases_of(run).get("validation", ()), folder)
    tolerance = config.get("tolerance_mm", TOLERANCE_MM)
    predictor = Predictor(run, device=device, trust=trust)
    return evaluate_items(predictor, entries, run / "eval", tolerance_mm=tolerance, pictures=True)


def evaluate_items(
    predictor: Predictor,
    entries: Sequence[dict[str, Any]],
    out: Path,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    problems: dict[str, str] | None = None,
    seen: set[str] | None = None,
    pictures: bool = False,
) -> dict[str, Any]:
    """Score a predictor on items with absolute paths, each in the scan's own grid; the content of ``metrics.json``.

    Writes ``metrics.csv``, ``metrics.json`` and the masks (``predictions/``) to ``out``. ``tolerance_mm`` is that of
    the surface Dice, ``problems`` says per case why it is not among the items. ``seen`` names the cases for the
    column ``trained_on``. ``pictures``: also ``review.html``, and ``example.png`` of one case. DataError if a scan or
    label map cannot be used, or they are in different places.
    """
    labels = {}
    for entry in entries:
        if not entry.get("label"):
            raise DataError(f"{entry.get('name')} has no label map. Evaluation needs one.")
        files = tuple(map(Path, _images(entry)))
        labels[Scan(str(entry.get("name") or files[0]), files)] = Path(entry["label"])
    make_writable(out)
    make_writable(out / "predictions")
    rows: list[Row] = []
    shown: list[Entry] = []
    plan = predictor.plan
    meaning = predictor.labels
    classes = meaning, plan["ignore_label"], tolerance_mm, plan.get("trust_scan_affine", False)

    def score(scan: Scan, prediction: Prediction) -> list[Row]:
        mask, grid = prediction.mask, prediction.grid
        file = out / "predictions" / f"{scan.name}.nii.gz"
        write_nifti(file, mask, grid)
        shown.append(Entry(scan.name, file, scan, labels[scan], entry_of(prediction, meaning)))
        scored = score_mask(scan.name, mask, grid.affine, labels[scan], *classes)
        return scored if seen is None else [row | {"trained_on": scan.name in seen} for row in scored]

    def add(scan: Scan, outcome: list[Row] | BaseException) -> None:
        if isinstance(outcome, BaseException):
            raise outcome
        rows.extend(outcome)

    segment_each(list(labels), predictor.prepare, predictor.segment, score, add)
    if pictures:
        write_page(out / "review.html", shown, meaning, str(plan["name"]))
        middle = sorted(shown, key=lambda entry: entry.facts["quality"].get("dice", {}).get("mean", 0))[len(shown) // 2]
        write_pictures(out, [replace(middle, name="example")], meaning)
    return write_metrics(sorted(rows, key=lambda row: str(row["case"])), out, problems)


def _images(item: dict[str, Any]) -> list[str]:
    image = item["image"]
    return [image] if isinstance(image, str) else list(image)
