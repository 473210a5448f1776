"""A picture of a segmentation: three planes through the scan, with reference and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets import snap_labels
from medseg_supcon.errors import DataError
from medseg_supcon.evaluation.figures import BACKGROUND, INK, color_of, legend_below, new_figure, save

Array = npt.NDArray[Any]
# (name, the axis that the plane cuts, horizontal axis, vertical axis) of a scan turned to RAS+
PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
NARROWEST = 0.25  # share of the whole width: a title needs room
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))


def overlay_figure(
    scan: str | Path,
    reference: str | Path | None,
    prediction: str | Path,
    path: str | Path,
    labels: Mapping[str, float],
) -> None:
    """Draws the axial, coronal and sagittal plane with most foreground, with masks, as a PNG.

    The reference is above, the prediction with the reference's outline below. Axes are in mm, so that anisotropic voxels
    look right; letters mark the ends of each axis.

    Args:
        scan: NIfTI file, (X, Y, Z) or with channels last (the first is shown).
        reference: NIfTI label map on the scan's grid, or None.
        prediction: NIfTI mask on the scan's grid.
        path: the PNG; its folder is made.
        labels: class name -> value in the masks, background first.

    Raises:
        DataError: a file cannot be read, or a mask has another shape than the scan.
    """
    image, spacing = _canonical(scan)
    predicted, _ = _canonical(prediction)
    expected = None if reference is None else _canonical(reference)[0]
    for file, mask in ((prediction, predicted), (reference, expected)):
        if mask is not None and mask.shape != image.shape:
            raise DataError(
                f"{file} has shape {mask.shape} and {scan} {image.shape}. They must share one grid."
            )
    values = labels.values()  # a file with a scaling has 2.9999998 for 3
    predicted = snap_labels(predicted, values)
    expected = None if expected is None else snap_labels(expected, values)
    foreground = list(labels.items())[1:]
    shown = predicted if expected is None else expected
    rows = [("prediction", predicted, expected)]
    if expected is not None:
        rows.insert(0, ("reference", expected, None))
    slices = {cut: _best_slice(shown, foreground, cut) for cut in range(3)}
    seen = np.concatenate([_plane(image, cut, index).ravel() for cut, index in slices.items()])
    low, high = np.percentile(seen, (0.5, 99.8))

    size = np.array(image.shape) * spacing
    widths = [size[horizontal] for _, _, horizontal, _ in PLANES]
    widths = [max(width, NARROWEST * sum(widths)) for width in widths]
    height = max(size[vertical] for *_, vertical in PLANES)
    scale = 9.0 / sum(widths)
    figure = new_figure(9.4, min(max(height * scale, 1.2), 9.0) * len(rows) + 1.1)
    axes = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    for (title, fill, outline), line in zip(rows, axes, strict=True):
        for (plane, cut, horizontal, vertical), axis in zip(PLANES, line, strict=True):
            index = slices[cut]
            box = (0, size[horizontal], 0, size[vertical])
            grey = _plane(image, cut, index)
            axis.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", extent=box)
            for number, (_, value) in enumerate(foreground):
                _draw(axis, _plane(fill, cut, index) == value, box, color_of(number), 0.45, 1.0)
                if outline is not None:
                    _draw(axis, _plane(outline, cut, index) == value, box, "white", 0.0, 1.3)
            axis.set(xlim=box[:2], ylim=box[2:], anchor="N")
            _dress(axis, horizontal, vertical, f"{title}, {plane}")
    drawn = {
        number: name
        for number, (name, value) in enumerate(foreground)
        if any((_plane(mask, cut, slices[cut]) == value).any() for _, mask, _ in rows for cut in range(3))
    }
    _legend(figure, drawn, expected is not None)
    save(figure, Path(path))


def _canonical(file: str | Path) -> tuple[Array, Array]:
    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(file))
        data = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises a dozen kinds for damaged files
        raise DataError(f"{file} cannot be read as NIfTI: it is damaged or not a NIfTI file.") from error
    if data.ndim < 3:
        raise DataError(f"{file}: expected a 3-D scan, found shape {data.shape}.")
    while data.ndim > 3:
        data = data[..., 0]
    return data, np.linalg.norm(image.affine[:3, :3], axis=0)


def _best_slice(mask: Array, foreground: list[tuple[str, float]], axis: int) -> int:
    """The slice that shows most: each class counts with its share in the slice."""
    others = tuple(a for a in range(3) if a != axis)
    score = np.zeros(mask.shape[axis])
    for _, value in foreground:
        area = (mask == value).sum(axis=others)
        score += area / max(int(area.max(initial=0)), 1)
    return int(score.argmax()) if score.any() else mask.shape[axis] // 2


def _plane(volume: Array, axis: int, index: int) -> Array:
    """(vertical, horizontal), first row at the bottom."""
    return np.asarray(volume.take(index, axis=axis)).T


def _draw(axis: Any, mask: Array, box: tuple[float, ...], color: Any, alpha: float, width: float) -> None:
    if not mask.any():
        return
    # Padded and doubled, so that outlines follow the voxels' edges, at the border too.
    fine = np.kron(np.pad(mask, 1), np.ones((4, 4)))
    dx, dy = box[1] / mask.shape[1], box[3] / mask.shape[0]
    x = (np.arange(fine.shape[1]) + 0.5) / 4 * dx - dx
    y = (np.arange(fine.shape[0]) + 0.5) / 4 * dy - dy
    if alpha:
        axis.contourf(x, y, fine, levels=[0.5, 1.5], colors=[color], alpha=alpha)
    axis.contour(x, y, fine, levels=[0.5], colors=[color], linewidths=width)


def _dress(axis: Any, horizontal: int, vertical: int, title: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("black")
    for side in axis.spines.values():
        side.set_visible(False)
    shade = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.2}
    for x, y, text, ha, va in (
        (0.02, 0.5, ENDS[horizontal][0], "left", "center"),
        (0.98, 0.5, ENDS[horizontal][1], "right", "center"),
        (0.5, 0.03, ENDS[vertical][0], "center", "bottom"),
        (0.5, 0.97, ENDS[vertical][1], "center", "top"),
    ):
        axis.text(x, y, text, transform=axis.transAxes, fontsize=8, color="white", bbox=shade, ha=ha, va=va)


def _legend(figure: Any, names: Mapping[int, str], outlined: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color_of(i), label=name, alpha=0.8) for i, name in names.items()]
    if outlined:
        line = Line2D([], [], color="white", linewidth=1.6, label="reference's outline")
        handles.append(line)
    if not handles:
        return
    legend = legend_below(figure, handles)
    legend.set_frame_on(True)
    legend.get_frame().set(facecolor="#555555" if outlined else BACKGROUND, edgecolor="none")
    for text in legend.get_texts():
        text.set_color("white" if outlined else INK)
