"""The pictures: they show the right slices and colours, at the right aspect."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from medseg_supcon.errors import DataError, RunError
from medseg_supcon.evaluation import color_of, curves_figure, overlay_figure
from medseg_supcon.evaluation import figures as _figures
from medseg_supcon.evaluation.figures import _best_slice

LABELS = {"background": 0, "organ": 3, "lesion": 7}


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("with_reference", [True, False])
def test_overlay(tmp_path: Path, with_reference: bool) -> None:
    affine = np.array([[0, 1.0, 0, 0], [-1, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
    scan = np.random.default_rng(0).normal(size=(30, 24, 8)).astype(np.float32)
    mask = np.zeros(scan.shape, np.uint8)
    mask[5:20, 5:15, 2:6], mask[18:25, 10:20, 3:7] = 3, 7
    files = [write(tmp_path / f"{n}.nii", a, affine) for n, a in (("s", scan), ("m", mask), ("p", np.roll(mask, 2, 0)))]
    out = tmp_path / "new" / "picture.png"
    overlay_figure(files[0], files[1] if with_reference else None, files[2], out, LABELS)
    picture = imread(out)[..., :3]
    assert picture.shape[1] > 600
    for color in map(color_of, range(2)):  # the classes' outlines and legend are there
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(picture - rgb).max(-1) < 0.08).sum() > 50
    with pytest.raises(DataError, match="share one grid"):
        overlay_figure(files[0], None, write(tmp_path / "x.nii", mask[:5], affine), out, LABELS)
    (tmp_path / "text.nii").write_text("no scan")
    with pytest.raises(DataError, match=r"text\.nii"):
        overlay_figure(tmp_path / "text.nii", None, files[2], out, LABELS)


@pytest.mark.parametrize("to_left", [True, False])
def test_pictures_are_radiological(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_left: bool) -> None:
    """What is at the patient's left, back and feet is drawn at the right and below, where L, P and I are."""
    figures = []
    monkeypatch.setattr(_figures, "save", lambda figure, path: figures.append(figure))
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[slice(13, 18) if to_left else slice(2, 7), 2:7, 2:7] = 3
    affine = np.diag([-1.0 if to_left else 1.0, 1, 1, 1])  # the first axis runs to the left, or to the right
    files = [write(tmp_path / f"{name}.nii", array, affine) for name, array in (("s", mask * 0.0), ("m", mask))]
    overlay_figure(files[0], None, files[1], tmp_path / "a.png", LABELS)
    figure = figures[0]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)  # from the bottom
    for axis, ends in zip(figure.axes, ("RLPA", "RLIS", "APIS"), strict=True):
        box = axis.get_window_extent()
        part = picture[int(box.y0) + 2 : int(box.y1) - 1, int(box.x0) + 2 : int(box.x1) - 1]
        y, x = np.nonzero(part[..., 0] > part[..., 2] + 40)  # orange on black
        assert x.size > 100 and x.mean() > 0.6 * part.shape[1] and y.mean() < 0.4 * part.shape[0]
        places = {text.get_text(): text.get_position() for text in axis.texts}
        left, right, bottom, top = (places[letter] for letter in ends)
        assert left[0] < 0.1 and right[0] > 0.9 and bottom[1] < 0.1 and top[1] > 0.9


def test_a_label_map_with_a_scaling_is_drawn(tmp_path: Path) -> None:
    """Values within 1e-3 of a declared one count as that value, as in training and in the scores."""
    scan = np.random.default_rng(0).normal(size=(12, 12, 6)).astype(np.float32)
    mask = np.zeros(scan.shape, np.uint8)
    mask[3:9, 3:9, 1:5] = 3
    files = [write(tmp_path / f"{name}.nii", array, np.eye(4)) for name, array in (("s", scan), ("m", mask))]
    scaled = nib.Nifti1Image(mask, np.eye(4))
    scaled.header.set_slope_inter(1.000001, 0)
    nib.save(scaled, tmp_path / "scaled.nii")
    assert float(nib.load(tmp_path / "scaled.nii").dataobj[5, 5, 3]) != 3
    for name in ("m", "scaled"):
        overlay_figure(files[0], tmp_path / f"{name}.nii", files[1], tmp_path / f"{name}.png", LABELS)
    assert np.array_equal(imread(tmp_path / "m.png"), imread(tmp_path / "scaled.png"))


def test_long_legends_and_narrow_planes_stay_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(_figures, "save", lambda figure, path: figures.append(figure))
    scan = np.random.default_rng(0).normal(size=(64, 12, 10)).astype(np.float32)
    mask = np.broadcast_to(np.minimum(np.arange(64) // 2, 30)[:, None, None], scan.shape).astype(np.uint8)
    labels = {f"class {i} with a rather long name": i for i in range(31)}
    files = [write(tmp_path / f"{name}.nii", array, np.eye(4)) for name, array in (("s", scan), ("m", mask))]
    overlay_figure(files[0], files[1], files[1], tmp_path / "a.png", labels)
    figure = figures[0]
    figure.draw_without_rendering()
    page, legend = figure.bbox, figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*list(labels)[1:], "reference's outline"]
    titles = [axis.title for axis in figure.axes] + [axis._left_title for axis in figure.axes]
    for part in (legend, *titles):
        box = part.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, part
    assert min(axis.get_position().height * figure.get_figheight() for axis in figure.axes) > 0.3, "inches"


def test_many_classes_do_not_cover_their_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(_figures, "save", lambda figure, path: figures.append(figure))
    for number in (3, 30):
        classes = "".join(f",val_dice_class {i}" for i in range(number))
        rows = [f"{epoch},{epoch},1,2,{epoch / 10}{f',{epoch / 10}' * number}" for epoch in (1, 2)]
        (tmp_path / "h.csv").write_text("\n".join([f"epoch,step,seconds,loss,val_mean_dice{classes}", *rows]))
        curves_figure(tmp_path / "h.csv", tmp_path / "a")
    few, many = (figure.axes[1] for figure in figures)
    assert len(few.get_legend().get_texts()) == 4
    assert [text.get_text() for text in many.get_legend().get_texts()] == ["mean"] and len(many.lines) == 31
    assert "30 classes" in many.get_title(loc="left")


def test_the_slice_that_shows_most_of_every_class() -> None:
    mask = np.zeros((10, 10, 10), int)
    mask[:, :, 2] = 3  # a large class
    mask[:, :5, 7] = 3
    mask[4, 4, 7] = 7  # a small one
    foreground = list(LABELS.items())[1:]
    assert _best_slice(mask, foreground, 2) == 7
    assert _best_slice(np.zeros((10, 10, 10)), foreground, 2) == 5


def test_curves(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    lines = ["epoch,step,seconds,learning_rate,loss,contrast,contrast_weight,val_mean_dice,val_dice_organ"]
    lines += [
        f"{e},{e * 9},1.0,0.1,{2 / e},{3 / e},0.1,{'' if e % 2 else 0.5},{'' if e % 2 else 'nan'}" for e in range(1, 9)
    ]
    history.write_text("\n".join(lines))
    curves_figure(history, tmp_path / "a.png")
    short = tmp_path / "short.csv"
    short.write_text("epoch,step,seconds,loss\n1,3,1,0.5\n")
    curves_figure(short, tmp_path / "b.png")
    for name in "ab":
        assert imread(tmp_path / f"{name}.png").shape[1] > 800
    history.write_text(lines[0] + "\n")
    for missing in (history, tmp_path / "nowhere.csv"):
        with pytest.raises(RunError, match="Train first"):
            curves_figure(missing, tmp_path / "c.png")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"):
        curves_figure(short, tmp_path / "file" / "c.png")
