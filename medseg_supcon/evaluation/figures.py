"""Pictures: training curves, masks over their scan, and the style that all figures share."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from medseg_supcon.datasets import is_in, reorient, snap_labels, values_in, values_of
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation.metrics import Array, Labels
from medseg_supcon.scans import Volume, read_nifti

INK, GRID = "#222222", "#dddddd"
# Okabe and Ito's palette, which colour-blind people can distinguish, and then matplotlib's tab20.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")


def color_of(number: int) -> Any:
    """The colour of the n-th foreground class, from 0."""
    return PALETTE[number] if number < len(PALETTE) else colormaps["tab20"]((number - len(PALETTE)) % 20)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, size in inches, with automatic layout."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def dress(axis: Any, title: str, below: str = "", epochs: Sequence[float] | Array = ()) -> None:
    """Title, axis label and grid, the same in every plot; of a training's epochs, all are on the axis, as whole numbers."""
    if len(epochs):
        below = "epoch"
        axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def dress_image(axis: Any, title: str) -> None:
    """Title and a light frame without ticks, for slices and maps."""
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(GRID)


def legend_below(figure: Any, handles: Sequence[Any], most: int = 6, **style: Any) -> None:
    """A legend below a figure, with as many columns (at most ``most``) as fit; more rows make the figure higher."""
    letters = np.array([len(handle.get_label()) for handle in handles])

    def inches(columns: int) -> float:  # roughly; a column is as wide as its longest name and the mark before it
        return float(sum(0.075 * part.max() + 0.6 for part in np.array_split(letters, columns)))

    # matplotlib has no handle for a name that begins with _
    columns = next((n for n in range(min(most, len(handles)), 1, -1) if inches(n) <= figure.get_figwidth()), 1)
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(handles) // columns) - 1))
    style = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "frameon": False} | style
    figure.legend(handles=handles, **style)


def save(figure: Any, path: Path) -> None:
    """Writes a PNG; a `RunError` if it cannot be written."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may have $ signs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise RunError(f"{path}: the picture could not be written ({error.strerror}).") from error


PER_CLASS = "val_dice_"
MOST_NAMED = 10  # classes; the names of more would cover the curves
NO_LOSS = ("epoch", "step", "seconds", "learning_rate", "confident")


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's ``history.csv``, numbers only, NaN for an empty field; a RunError if it cannot be used."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [{k: float(v or "nan") for k, v in row.items() if k != "stage"} for row in csv.DictReader(stream)]
        if not all(np.isfinite([row.get(key, np.nan) for key in ("epoch", "step", "seconds")]).all() for row in rows):
            raise ValueError("it lacks an epoch, step or seconds")
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}). Copy it again, or delete the run and train again.") from None
    if not rows:
        raise RunError(f"{path}: the training history is missing or empty. Train first.")
    return rows


def curves_figure(history: Path, path: Path) -> None:
    """Draws the training loss and its terms (left) and validation Dice per class (right) of a ``history.csv``, as a PNG."""
    rows = read_history(history)
    epochs, columns = np.array([row["epoch"] for row in rows]), list(rows[0])
    losses = [c for c in columns if c not in NO_LOSS and not c.startswith("val_") and "weight" not in c]
    losses.sort(key=lambda name: name != "loss")
    classes = [c for c in columns if c.startswith(PER_CLASS)]
    hidden = "_" if len(classes) > MOST_NAMED else ""  # matplotlib leaves such names out of legends
    figure = new_figure(10.5, 3.9)
    left, right = figure.subplots(1, 2)
    curves = [(left, c, c.replace("_", " "), INK if c == "loss" else color_of(i)) for i, c in enumerate(losses)]
    curves += [(right, c, hidden + c.removeprefix(PER_CLASS), color_of(i)) for i, c in enumerate(classes)]
    curves += [(right, "val_mean_dice", "mean", INK)] if "val_mean_dice" in columns else []
    for axis, name, label, color in curves:
        values = np.array([row[name] for row in rows])
        finite = np.isfinite(values)
        style = {"marker": "." if axis is right or finite.sum() < 3 else "", "linewidth": 2.0 if color == INK else 1.4}
        axis.plot(epochs[finite], values[finite], label=label, color=color, **style)
    right.set_ylim(0, 1)
    many = f", mean and {len(classes)} classes" if hidden else ""
    for axis, title in ((left, "Training loss"), (right, f"Validation Dice{many}")):
        dress(axis, title, epochs=epochs)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    save(figure, path)


# (name, the axis that the plane cuts, horizontal axis, vertical axis) of a scan turned to RAS+
PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
HORIZONTAL, VERTICAL = (("R", "L"), ("A", "P")), {1: ("P", "A"), 2: ("I", "S")}  # radiological, as the review page
PLACES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.05), (0.5, 0.95))  # left, right, bottom, top
NARROWEST = 0.25  # share of the whole width: a title needs room
SHADE = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.2}
LETTER: Any = {"fontsize": 8, "color": "white", "bbox": SHADE, "ha": "center", "va": "center"}
ON_DARK: Any = {"frameon": True, "facecolor": "#555555", "edgecolor": "none", "labelcolor": "white"}  # of a legend


def overlay_figure(
    scan: Path | Volume, reference: Path | Volume | None, prediction: Path | Volume, path: Path, labels: Labels
) -> None:
    """Draws the plane with most foreground along each axis, axes in mm: the reference above, the prediction below.

    The display is radiological: the patient's right is on the left, and letters mark the ends of each axis.
    """
    image, spacing = _canonical(scan)
    masks: dict[str, Array] = {}
    for title, file in (("reference", reference), ("prediction", prediction)):
        if file is not None:
            # a file with a scaling has 2.9999998 for 3
            masks[title] = mask = snap_labels(_canonical(file)[0], values_in(labels))
            if mask.shape != image.shape:
                one, other = (what if isinstance(what, Path) else "its volume" for what in (file, scan))
                raise DataError(f"{one} has shape {mask.shape} and {other} {image.shape}. They must share one grid.")
    foreground = list(labels.items())[1:]
    slices = [_best_slice(next(iter(masks.values())), foreground, cut) for cut in range(3)]

    def plane(volume: Array, cut: int) -> Array:  # (vertical, horizontal), first row at the bottom
        return np.asarray(volume.take(slices[cut], axis=cut)).T

    low, high = np.percentile(np.concatenate([plane(image, cut).ravel() for cut in range(3)]), (0.5, 99.8))
    size = np.array(image.shape) * spacing
    widths = size[[horizontal for _, _, horizontal, _ in PLANES]]
    widths = np.maximum(widths, NARROWEST * widths.sum())
    height = max(size[vertical] for *_, vertical in PLANES) * 9.0 / widths.sum()
    figure = new_figure(9.4, min(max(height, 1.2), 9.0) * len(masks) + 1.1)
    axes = figure.subplots(len(masks), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    for (title, mask), line in zip(masks.items(), axes, strict=True):
        for (name, cut, horizontal, vertical), axis in zip(PLANES, line, strict=True):
            box = (0, size[horizontal], 0, size[vertical])
            axis.imshow(plane(image, cut), "gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", extent=box)
            for number, (_, value) in enumerate(foreground):
                _outline(axis, is_in(plane(mask, cut), value), box, color_of(number), fill=True)
                if title == "prediction" and "reference" in masks:
                    _outline(axis, is_in(plane(masks["reference"], cut), value), box, "white")
            axis.set(xlim=box[1::-1], ylim=box[2:], anchor="N", facecolor="black")  # x and y run to the left
            dress_image(axis, f"{title}, {name}")
            for place, letter in zip(PLACES, HORIZONTAL[horizontal] + VERTICAL[vertical], strict=True):
                axis.text(*place, letter, transform=axis.transAxes, **LETTER)
    drawn = {value for mask in masks.values() for cut in range(3) for value in np.unique(plane(mask, cut)).tolist()}
    shown = [(number, name) for number, (name, value) in enumerate(foreground) if drawn & {*values_of(value)}]
    handles: list[Any] = [Patch(color=color_of(number), label=name, alpha=0.8) for number, name in shown]
    if "reference" in masks:
        handles.append(Line2D([], [], color="white", linewidth=1.6, label="reference's outline"))
    if handles:
        legend_below(figure, handles, **(ON_DARK if "reference" in masks else {}))
    save(figure, path)


def _canonical(file: Path | Volume) -> tuple[Array, Array]:
    """The (first) volume of a NIfTI file with its axes turned to RAS+, and its voxel sizes in mm."""
    volume = file if isinstance(file, Volume) else read_nifti(file)
    if volume.data.ndim < 3:
        raise DataError(f"{file}: expected a 3-D scan, found shape {volume.data.shape}.")
    data = volume.data.reshape(*volume.data.shape[:3], -1)[..., 0]
    data, affine = reorient(data, volume.affine, np.eye(4))
    return data, np.linalg.norm(affine[:3, :3], axis=0)


def _best_slice(mask: Array, foreground: Sequence[tuple[str, Any]], axis: int) -> int:
    """The slice that shows most: each class counts with its share in the slice."""
    areas = [is_in(mask, value).sum(axis=tuple({0, 1, 2} - {axis})) for _, value in foreground]
    score = sum((area / max(area.max(), 1) for area in areas), np.zeros(mask.shape[axis]))
    return int(score.argmax()) if score.any() else mask.shape[axis] // 2


def _outline(axis: Any, mask: Array, box: tuple[float, ...], color: Any, fill: bool = False) -> None:
    if not mask.any():
        return
    # Padded and magnified, so that outlines follow the voxels' edges, at the border too.
    fine = np.kron(np.pad(mask, 1), np.ones((4, 4)))
    y, x = (((np.arange(4 * n + 8) + 0.5) / 4 - 1) / n for n in mask.shape)
    if fill:
        axis.contourf(x * box[1], y * box[3], fine, levels=[0.5, 1.5], colors=[color], alpha=0.45)
    axis.contour(x * box[1], y * box[3], fine, levels=[0.5], colors=[color], linewidths=1.0 if fill else 1.3)
