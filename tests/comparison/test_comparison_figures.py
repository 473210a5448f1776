"""Curves of a comparison: every value is visible, on an axis of whole epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_supcon.comparison import figures


@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_single_validation_is_seen_on_an_axis_of_whole_epochs(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    history = [{"epoch": float(e), "loss": 1.0, "contrastive": 0.5} for e in range(1, length + 1)]
    history[-1]["val_mean_dice"] = 0.7
    run = {"variant": "Adam", "recipe": "joint", "labels": 5, "history": history}
    variants = [{"name": "Adam", "levels": {"optimiser": "Adam"}}]
    figures.learning_figure([run], ["joint"], tmp_path / "a.png")
    # matplotlib leaves such names out of legends
    figures.learning_figure([run | {"recipe": "_mine"}], ["_mine"], tmp_path / "b.png")
    figures.grid_curves_figure([run], variants, ["joint"], tmp_path / "b.png")
    assert len(drawn) == 3
    for figure in drawn:
        validation = figure.axes[-1]
        assert any(line.get_marker() == "." and list(line.get_xdata()) == [length] for line in validation.lines)
        for axis in figure.axes:
            low, high = axis.get_xlim()
            ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
            assert low <= 1 and length <= high and ticks and all(tick == round(tick) for tick in ticks)
