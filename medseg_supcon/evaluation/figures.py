"""Training curves: the terms of the loss, and Dice per class."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import RunError

BACKGROUND, INK, GRID = "white", "#222222", "#dddddd"
# Okabe and Ito's palette, which colour-blind people can distinguish, and then matplotlib's tab20.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")


def color_of(number: int) -> Any:
    """The colour of the n-th foreground class, from 0."""
    if number < len(PALETTE):
        return PALETTE[number]
    from matplotlib import colormaps

    return colormaps["tab20"]((number - len(PALETTE)) % 20)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, size in inches, with automatic layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=BACKGROUND)


def dress(axis: Any, title: str, below: str) -> None:
    """Title, axis label and grid, the same in every plot."""
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def dress_epochs(axis: Any, title: str, epochs: Sequence[int]) -> None:
    """As `dress`, for a training's epochs: all of them are on the axis, and its ticks are whole epochs."""
    from matplotlib.ticker import MaxNLocator

    dress(axis, title, "epoch")
    axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_below(figure: Any, handles: Sequence[Any], most: int = 6) -> Any:
    """A legend below a figure, with as many columns (at most ``most``) as fit; more rows make the figure higher."""
    names = [handle.get_label() for handle in handles]
    columns = max(min(most, len(handles)), 1)  # matplotlib has no handle for a name that begins with _
    while columns > 1 and _inches(names, columns) > figure.get_figwidth():
        columns -= 1
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    return figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def _inches(names: Sequence[str], columns: int) -> float:
    """The approximate width of a legend; each column is as wide as its longest name and the mark before it."""
    parts = np.array_split(np.array([len(name) for name in names]), columns)
    return float(sum(0.075 * part.max() + 0.6 for part in parts))


def save(figure: Any, path: Path) -> None:
    """Writes a PNG; a `RunError` if it cannot be written."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may have $ signs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise RunError(f"{path}: the picture could not be written ({error.strerror}).") from error


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
    epochs = [int(float(epoch)) for epoch in columns.get("epoch", [])]
    if not epochs:
        raise RunError(f"{history}: this history has no epoch. Train first.")
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
