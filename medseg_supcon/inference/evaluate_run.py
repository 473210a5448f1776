"""Scores of a run's model on labelled scans: the predictor's masks against the label maps, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import plain_text, read_plain
from medseg_supcon.datasets import Dataset, check_dataset, items, load_items
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation import Row, add_problems, score_mask, write_metrics
from medseg_supcon.files import read_json
from medseg_supcon.inference.folder import make_writable, read_ahead
from medseg_supcon.inference.predictor import Prediction, Predictor
from medseg_supcon.plan import read_plan
from medseg_supcon.scans import Scan, write_nifti

ONLY_OF_TRAINING = ("duplicate_image", "no_structure")  # errors that do not keep a case from being scored
TOLERANCE_MM = 1.0


def evaluate_dataset(
    run: Path, dataset: Dataset, out: Path, *, device: str | None = None, trust: bool = False
) -> dict[str, Any]:
    """Score a run on the labelled cases of a data set; cases with errors become ``problems`` of the report.

    Args:
        run: a trained run.
        dataset: what was read.
        out: folder for ``metrics.csv``, ``metrics.json`` and the masks (``predictions/``).
        device: where the network runs; by default a GPU where there is one.
        trust: the run's plan and inference config may be code.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        RunError: not a trained run, or one that needs trust. DataError: no labelled case, other channels than the
            run's, or no case can be scored.
    """
    files = run / "configs" / "plan.json", run / "models" / "model.pt"
    if not all(file.is_file() for file in files):
        raise RunError(
            f"{run} is not a trained run: configs/plan.json and models/model.pt are needed. Train it first."
        )
    if not dataset.labelled:
        raise DataError(f"{dataset.root} has no labelled case to evaluate on.")
    plan = read_plan(files[0])
    if len(plan["channels"]) != len(dataset.channels):
        raise DataError(
            f"{dataset.root} has {len(dataset.channels)} channels per scan ({', '.join(dataset.channels)}), and {run} "
            f"was trained on {len(plan['channels'])} ({', '.join(plan['channels'])}). Evaluate on a data set with the "
            "same channels."
        )
    expected = replace(
        dataset, cases=dataset.labelled, labels=plan["labels"], ignore_label=plan["ignore_label"]
    )
    report = check_dataset(expected, allow_affine_mismatch=plan.get("trust_scan_affine", False))
    problems = {f.case: f.message for f in reversed(report.errors) if f.code not in ONLY_OF_TRAINING}
    good = [case for case in dataset.labelled if case.name not in problems]
    if not good:
        raise DataError(f"No case of {dataset.root} can be evaluated. {next(iter(problems.values()))}")
    entries = load_items(items(good, dataset.root), dataset.root)
    return evaluate_items(Predictor(run, device=device, trust=trust), entries, out, problems=problems)


def evaluate_validation(run: Path, *, device: str | None = None, trust: bool = False) -> dict[str, Any]:
    """Score a run on its own validation cases, into ``eval/``; see `evaluate_dataset`.

    The cases are those of datalist.json; ``dataset_dir`` and ``tolerance_mm`` are evaluate.yaml's.
    """
    config = read_plain(run / "configs" / "evaluate.yaml")
    folder = plain_text(config.get("dataset_dir", ""))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'evaluate.yaml'}: dataset_dir must be the path of a folder.")
    entries = load_items(read_json(run / "configs" / "datalist.json")["validation"], folder)
    tolerance = config.get("tolerance_mm", TOLERANCE_MM)
    return evaluate_items(
        Predictor(run, device=device, trust=trust), entries, run / "eval", tolerance_mm=tolerance
    )


def evaluate_items(
    predictor: Predictor,
    entries: Sequence[dict[str, Any]],
    out: Path,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    problems: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Score a predictor on items with absolute paths, each in the scan's own grid.

    One thread reads the next scan and one writes and scores the last mask, while this one segments.

    Args:
        predictor: of one run or several.
        entries: ``{"name", "image": path or paths, "label": path}``.
        out: folder for ``metrics.csv``, ``metrics.json`` and the masks (``predictions/``).
        tolerance_mm: of the surface Dice.
        problems: case -> why it is not among the items; added to the report.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        DataError: a scan or label map cannot be used, or a label map lies elsewhere than its scan.
    """
    labels = {}
    for entry in entries:
        if not entry.get("label"):
            raise DataError(f"{entry.get('name')}: the case has no label map to be scored against.")
        image = entry["image"]
        files = tuple(map(Path, [image] if isinstance(image, str) else image))
        labels[Scan(str(entry.get("name") or files[0]), files)] = Path(entry["label"])
    make_writable(out)
    make_writable(out / "predictions")
    rows: list[Row] = []

    def score(prediction: Prediction, label: Path) -> list[Row]:
        write_nifti(out / "predictions" / f"{prediction.name}.nii.gz", prediction.mask, prediction.grid)
        plan = predictor.plan
        return score_mask(
            prediction.name,
            prediction.mask,
            prediction.grid.affine,
            label,
            plan["labels"],
            plan["ignore_label"],
            tolerance_mm,
            plan.get("trust_scan_affine", False),
        )

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        behind: Future[list[Row]] | None = None
        try:
            for scan, prepared in read_ahead(reader, predictor, list(labels)):
                prediction = predictor.segment(prepared.result())
                if behind is not None:
                    rows += behind.result()
                behind = scorer.submit(score, prediction, labels[scan])
            if behind is not None:
                rows += behind.result()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            with suppress(Exception):
                if behind is not None:
                    behind.result()
            raise
    report = write_metrics(sorted(rows, key=lambda row: str(row["case"])), out)
    return add_problems(out, problems) if problems else report
