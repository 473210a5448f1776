"""Training curves: the terms of the loss, and Dice per class."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.errors import RunError
from medseg_supcon.evaluation._canvas import INK, color_of, dress_epochs, new_figure, save

MEAN, PER_CLASS = "val_mean_dice", "val_dice_"
MOST_NAMED = 10  # classes; the names of more would cover the curves
NO_LOSS = ("epoch", "step", "seconds", "learning_rate", "stage", "confident")

History = Mapping[str, Sequence[Any]]


def curves_figure(history: str | Path | History, path: str | Path) -> None:
    """Draws the training loss and its terms (left) and validation Dice per class (right), as a PNG.

    Args:
        history: ``history.csv`` of a run, or its columns: ``epoch``, loss terms under any name,
            ``val_mean_dice``, and ``val_dice_<class>``; cells may be empty.
        path: the PNG; its folder is made.

    Raises:
        RunError: the history is missing or has no epoch.
    """
    columns = history if isinstance(history, Mapping) else _read(Path(history))
    epochs = [int(float(e)) for e in columns.get("epoch", [])]
    if not epochs:
        raise RunError(f"{history}: there is no epoch in this history. Train first.")
    figure = new_figure(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    losses = [c for c in columns if c not in NO_LOSS and not c.startswith("val_") and "weight" not in c]
    losses.sort(key=lambda name: name != "loss")
    for number, name in enumerate(losses):
        x, y = _points(epochs, columns[name])
        style = {"color": INK, "linewidth": 2.0} if name == "loss" else {"color": color_of(number)}
        left.plot(x, y, label=name.replace("_", " "), marker="." if len(x) < 3 else "", **style)
    classes = [c for c in columns if c.startswith(PER_CLASS)]
    for number, name in enumerate(classes):
        x, y = _points(epochs, columns[name])
        label = name.removeprefix(PER_CLASS) if len(classes) <= MOST_NAMED else None
        right.plot(x, y, label=label, color=color_of(number), marker=".", linewidth=1.2)
    if MEAN in columns:
        x, y = _points(epochs, columns[MEAN])
        right.plot(x, y, label="mean", color=INK, marker=".", linewidth=2.0)
    right.set_ylim(0, 1)
    many = f", mean and {len(classes)} classes" if len(classes) > MOST_NAMED else ""
    for axis, title in ((left, "Training loss"), (right, f"Validation Dice{many}")):
        dress_epochs(axis, title, epochs)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    save(figure, Path(path))


def _read(file: Path) -> dict[str, list[str]]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise RunError(
            f"{file}: the training's history cannot be read ({error.strerror}). Train first."
        ) from error
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def _points(epochs: Sequence[int], cells: Sequence[Any]) -> tuple[list[int], list[float]]:
    """The epochs with a finite value, and the values."""
    pairs = [(e, float(v)) for e, v in zip(epochs, cells, strict=True) if v not in ("", None)]
    pairs = [(e, v) for e, v in pairs if math.isfinite(v)]
    return [e for e, _ in pairs], [v for _, v in pairs]
