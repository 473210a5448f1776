"""A copy of the trained run that a test may change, and planned runs made by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg_supcon.bundle import write_network
from medseg_supcon.networks import chain

TEMPLATE = Path(__file__).parents[2] / "bundles" / "segmentation"

NETWORK = chain(
    {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [4, 8],
        "strides": [2],
    },
    {"_target_": "torch.nn.Conv3d", "in_channels": 4, "out_channels": 3, "kernel_size": 1},
)
PLAN: dict[str, Any] = {
    "name": "toy",
    "channels": ["MRI"],
    "labels": {"background": 0, "organ": 4, "lesion": 255},
    "ignore_label": None,
    "orientation": "RAS",
    "spacing": [1.0, 1.0, 1.0],
    "intensity": [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}],
    "patch_size": [16, 24, 16],
    "flip_axes": [0],
    "batch_size": 1,
    "steps_per_epoch": 1,
    "epochs": 1,
    "class_frequencies": [0.8, 0.1, 0.1],
    "class_weights": [0.4, 1.3, 1.3],
    "network_def": NETWORK,
    "inference": {"overlap": 0.5, "sw_batch_size": 2},
    "keep_largest": [],
    "fingerprint": {},
}


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """The trained run, to change at will."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture
def planned_run(tmp_path: Path) -> Callable[..., Path]:
    """planned_run(**plan): a run folder with the template's configs and a plan, not trained."""

    def make(**changes: Any) -> Path:
        run = tmp_path / "planned"
        shutil.copytree(TEMPLATE, run, ignore=shutil.ignore_patterns("*.j2"), dirs_exist_ok=True)
        (run / "configs" / "plan.json").write_text(json.dumps({**PLAN, **changes}))
        write_network(run)
        return run

    return make


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an empty folder far from run and checkout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
