"""Scores of a run's model on labelled scans: the predictor's masks against the label maps, case by case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import cases_of, plain_text, read_config
from medseg_supcon.datasets import Dataset, check_dataset, items, load_items
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation import Row, score_mask, write_metrics
from medseg_supcon.inference.folder import make_writable, read_ahead
from medseg_supcon.inference.predictor import Predictor
from medseg_supcon.inference.prepare import Prediction
from medseg_supcon.plan import read_plan
from medseg_supcon.scans import Scan, write_nifti

ONLY_OF_TRAINING = ("duplicate_image", "no_structure")  # errors that do not prevent scoring
TOLERANCE_MM = 1.0


def evaluate_dataset(
    run: Path, dataset: Dataset, out: Path, *, device: str | None = None, trust: bool = False
) -> dict[str, Any]:
    """Score a run on the labelled cases of a data set; cases with errors become ``problems`` of the report.

    Each row says in ``trained_on`` whether the run was trained on the case.

    Args:
        run: a trained run.
        dataset: what was read.
        out: folder for ``metrics.csv``, ``metrics.json`` and the masks (``predictions/``).
        device: where the network runs; default: the first GPU, or the CPU.
        trust: the run's plan and inference config may be code.

    Returns:
        the content of ``metrics.json``.

    Raises:
        RunError: not a trained run, or one that needs trust. DataError: no labelled case, other channels than the
            run's, or no case can be scored.
    """
    files = run / "configs" / "plan.json", run / "models" / "model.pt"
    if not all(file.is_file() for file in files):
        raise RunError(f"{run} is not a trained run: configs/plan.json and models/model.pt are needed. Train it first.")
    if not dataset.labelled:
        raise DataError(f"{dataset.root} has no labelled cases. Evaluation needs label maps.")
    plan = read_plan(files[0])
    if len(plan["channels"]) != len(dataset.channels):
        raise DataError(
            f"{dataset.root} has {len(dataset.channels)} channels per scan ({', '.join(dataset.channels)}), and {run} "
            f"was trained on {len(plan['channels'])} ({', '.join(plan['channels'])}). Evaluate on a data set with the "
            "same channels."
        )
    expected = replace(dataset, cases=dataset.labelled, labels=plan["labels"], ignore_label=plan["ignore_label"])
    report = check_dataset(expected, allow_affine_mismatch=plan.get("trust_scan_affine", False))
    problems = {f.case: f.message for f in reversed(report.errors) if f.code not in ONLY_OF_TRAINING}
    good = [case for case in dataset.labelled if case.name not in problems]
    if not good:
        raise DataError(f"No case of {dataset.root} can be evaluated. {next(iter(problems.values()))}")
    entries = load_items(items(good, dataset.root), dataset.root)
    predictor, seen = Predictor(run, device=device, trust=trust), trained_on(run, dataset)
    return evaluate_items(predictor, entries, out, problems=problems, seen=seen)


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
    """Score a run on its own validation cases, into ``eval/``; see `evaluate_dataset`.

    The cases are those of datalist.json; ``dataset_dir`` and ``tolerance_mm`` are evaluate.yaml's.
    """
    config = read_config(run / "configs" / "evaluate.yaml")
    folder = plain_text(config.get("dataset_dir", ""))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'evaluate.yaml'}: dataset_dir must be the path of a folder.")
    entries = load_items(cases_of(run).get("validation", ()), folder)
    tolerance = config.get("tolerance_mm", TOLERANCE_MM)
    return evaluate_items(Predictor(run, device=device, trust=trust), entries, run / "eval", tolerance_mm=tolerance)


def evaluate_items(
    predictor: Predictor,
    entries: Sequence[dict[str, Any]],
    out: Path,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    problems: dict[str, str] | None = None,
    seen: set[str] | None = None,
) -> dict[str, Any]:
    """Score a predictor on items with absolute paths, each in the scan's own grid.

    One thread reads the next scan and one writes and scores the last mask, while this one segments.

    Args:
        predictor: of one run or several.
        entries: ``{"name", "image": path or paths, "label": path}``.
        out: folder for ``metrics.csv``, ``metrics.json`` and the masks (``predictions/``).
        tolerance_mm: of the surface Dice.
        problems: case -> why it is not among the items; added to the report.
        seen: names of cases for ``trained_on`` in the rows; None: without that column.

    Returns:
        the content of ``metrics.json``.

    Raises:
        DataError: a scan or label map cannot be used, or they are in different places.
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

    def score(prediction: Prediction, label: Path) -> list[Row]:
        write_nifti(out / "predictions" / f"{prediction.name}.nii.gz", prediction.mask, prediction.grid)
        plan = predictor.plan
        scored = score_mask(
            prediction.name,
            prediction.mask,
            prediction.grid.affine,
            label,
            plan["labels"],
            plan["ignore_label"],
            tolerance_mm,
            plan.get("trust_scan_affine", False),
        )
        if seen is None:
            return scored
        return [row | {"trained_on": prediction.name in seen} for row in scored]

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        pending: Future[list[Row]] | None = None
        try:
            for scan, prepared in read_ahead(reader, predictor.prepare, list(labels)):
                prediction = predictor.segment(prepared.result())
                if pending is not None:
                    rows += pending.result()
                pending = scorer.submit(score, prediction, labels[scan])
            if pending is not None:
                rows += pending.result()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            with suppress(Exception):
                if pending is not None:
                    pending.result()
            raise
    return write_metrics(sorted(rows, key=lambda row: str(row["case"])), out, problems)


def _images(item: dict[str, Any]) -> list[str]:
    image = item["image"]
    return [image] if isinstance(image, str) else list(image)
