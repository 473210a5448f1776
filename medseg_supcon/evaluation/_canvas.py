"""Figures that need no display, and the colours of classes. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import RunError

BACKGROUND, INK, GRID = "white", "#222222", "#dddddd"
# Okabe and Ito's palette, which colour-blind people tell apart, and matplotlib's tab20 after it.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")


def color_of(number: int) -> Any:
    """The colour of the n-th foreground class, from 0."""
    if number < len(PALETTE):
        return PALETTE[number]
    from matplotlib import colormaps

    return colormaps["tab20"]((number - len(PALETTE)) % 20)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure in inches that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=BACKGROUND)


def dress(axis: Any, title: str, below: str) -> None:
    """Title, axis label, grid: the look of every plot."""
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def dress_epochs(axis: Any, title: str, epochs: Sequence[int]) -> None:
    """As `dress`, over all epochs of a training, however few of them have a value; the marks are whole epochs."""
    from matplotlib.ticker import MaxNLocator

    dress(axis, title, "epoch")
    axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_below(figure: Any, handles: Sequence[Any], most: int = 6) -> Any:
    """A legend under a figure, in as many columns (`most` at most) as its names leave room for.

    Rows beyond the first make the figure higher: the plots keep their size.
    """
    names = [handle.get_label() for handle in handles]
    columns = max(min(most, len(handles)), 1)  # matplotlib gives no handle of a name that begins with _
    while columns > 1 and _inches(names, columns) > figure.get_figwidth():
        columns -= 1
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    return figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def _inches(names: Sequence[str], columns: int) -> float:
    """About the width of a legend; each column is as wide as its longest name and the mark before it."""
    parts = np.array_split(np.array([len(name) for name in names]), columns)
    return float(sum(0.075 * part.max() + 0.6 for part in parts))


def save(figure: Any, path: Path) -> None:
    """Writes a PNG.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise RunError(f"{path}: the picture could not be written ({error.strerror}).") from error
