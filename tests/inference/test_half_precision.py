"""`medseg predict --amp` on a CPU: the same masks but for a few voxels, and a note where it is slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_supcon import training


def test_masks_are_nearly_the_same(
    trained_run: Path, phantoms: Path, tmp_path: Path, medseg: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scan = sorted((phantoms / "imagesTr").iterdir())[0]
    masks, notes = {}, {}
    for kind, options, able in (("full", [], True), ("half", ["--amp"], True), ("slow", ["--amp"], False)):
        monkeypatch.setattr(training, "has_bfloat16", lambda able=able: able)
        code, _, notes[kind] = medseg(
            "predict", trained_run, scan, "--out", tmp_path / kind, "--device", "cpu", *options
        )
        assert code == 0
        assert json.loads((tmp_path / kind / "manifest.json").read_text())["half_precision"] == (kind != "full")
        masks[kind] = np.asarray(nibabel.load(next((tmp_path / kind).glob("*.nii.gz"))).dataobj)
    assert masks["full"].any()
    assert np.mean(masks["full"] != masks["half"]) < 0.01
    assert "bfloat16" in notes["slow"] and "bfloat16" not in notes["half"] + notes["full"]
