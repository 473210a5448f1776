"""What the runs of a comparison left behind, as rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.comparison._cell import CLEAN, scores_folder
from medseg_supcon.comparison._design import Cell, Design
from medseg_supcon.evaluation import overlay_figure, summarise
from medseg_supcon.training import is_finished

Row = dict[str, Any]
MOST_EXAMPLES = 4
SCORES = ("dice", "hd95_mm", "surface_dice", "volume_ml", "reference_volume_ml", "empty")


def read_results(out: Path, cells: Iterable[Cell], condition: str) -> list[Row]:
    """A row per run, case and class: the cell's key (``recipe``, ``labels``, ``seed``), ``case``, ``class``, scores."""
    rows = []
    for cell in cells:
        path = scores_folder(out / "tests" / cell.name, condition) / "metrics.json"
        for row in json.loads(path.read_text())["rows"]:
            rows.append(cell.key | {key: row[key] for key in ("case", "class", *SCORES)})
    return rows


def read_runs(
    out: Path, cells: Iterable[Cell], results: Sequence[Row], training: Sequence[Row] = ()
) -> list[Row]:
    """A row per run: what it cost and how it ended.

    ``test_dice`` and ``test_hd95_mm``: mean over classes; ``training_dice``: the same on the scans trained on, where
    ``training`` has rows of them; ``validation_dice``, ``loss`` and ``contrastive_loss``: the last epoch that has
    one; ``minutes`` of training, validations included; ``memory_gib``: the peak.
    """

    def mean(rows: Sequence[Row], cell: Cell) -> Row:
        mine = [r for r in rows if all(r[name] == value for name, value in cell.key.items())]
        of: Row = summarise(mine)["mean"]
        return of

    found = []
    for cell in cells:
        run = out / "runs" / cell.name
        test = mean(results, cell)
        history = read_history(run)
        cost_file = out / "tests" / cell.name / "cost.json"
        cost = json.loads(cost_file.read_text()) if cost_file.exists() else {}
        found.append(
            cell.key
            | {
                "test_dice": test["dice"],
                "test_hd95_mm": test["hd95_mm"],
                "validation_dice": _last(history, "val_mean_dice"),
                "loss": _last(history, "loss"),
                "contrastive_loss": _last(history, "contrastive", used_only=True),
                "epochs": len(history),
                "steps": int(history[-1]["step"]) if history else 0,
                "minutes": round(sum(float(row["seconds"]) for row in history) / 60, 2),
                "memory_gib": cost.get("memory_gib"),
                "machine": cost.get("machine"),
                "finished": is_finished(run),
            }
            | ({"training_dice": mean(training, cell)["dice"]} if training else {})
        )
    return found


def read_history(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``history.csv``."""
    with (run / "logs" / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def draw_example(design: Design, out: Path, results: Sequence[Row]) -> list[tuple[str, Path]]:
    """The test scan of median Dice under the baseline, as each recipe's first run of the largest budget masks it."""
    budget, seed = max(design.splits), design.seeds[0]
    rows = [r for r in results if (r["labels"], r["seed"]) == (budget, seed) and r["dice"] is not None]
    dice = {
        (recipe, case.name): [r["dice"] for r in rows if (r["recipe"], r["case"]) == (recipe, case.name)]
        for recipe in design.recipes
        for case in design.test
    }
    score = {key: sum(values) / len(values) for key, values in dice.items() if values}
    ranked = sorted(
        (c for c in design.test if (design.recipes[0], c.name) in score),
        key=lambda c: score[design.recipes[0], c.name],
    )
    if not ranked:
        return []
    case, found = ranked[len(ranked) // 2], []
    for recipe in list(dict.fromkeys(design.recipes))[:MOST_EXAMPLES]:
        cell = Cell(recipe, budget, seed)
        mask = scores_folder(out / "tests" / cell.name, CLEAN) / "predictions" / f"{case.name}.nii.gz"
        picture = out / "pictures" / "examples" / f"{recipe}.png"
        if mask.exists() and (recipe, case.name) in score:
            overlay_figure(case.images[0], case.label, mask, picture, design.dataset.labels)
            found.append(
                (
                    f"{recipe}, {budget} labels, seed {seed}: {case.name}, Dice {score[recipe, case.name]:.3f}",
                    picture,
                )
            )
    return found


def _last(history: Sequence[dict[str, str]], column: str, used_only: bool = False) -> float | None:
    values = [float(row[column]) for row in history if row.get(column)]
    if used_only and not any(values):  # a term that is 0 throughout is not in use
        return None
    return values[-1] if values else None
