"""The main job on small phantoms: a run is a bundle, the bundle's commands give what medseg gives."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_run import TINY

from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.inference import Predictor
from medseg_supcon.training import is_finished, prepare_run, run_config, train_run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in these tests: sums in the same order


def bundle(config: Path, run: Path, cwd: Path, *more: str) -> None:
    """``python -m monai.bundle run`` from another folder."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(config)]
    done = subprocess.run(
        [*command, "--bundle_root", str(run), *more],
        cwd=cwd,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(run: Path, name: str = "model.pt") -> dict[str, torch.Tensor]:
    return torch.load(run / "models" / name, weights_only=True)


def test_a_run_is_whole(trained_run):
    for name in (
        "LICENSE",
        "configs/plan.json",
        "configs/datalist.json",
        "configs/train.yaml",
        "configs/train.json",
        "configs/evaluate.yaml",
        "configs/inference.yaml",
        "configs/metadata.json",
        "configs/logging.conf",
        "models/model.pt",
        "models/checkpoint.pt",
        "docs/README.md",
        "docs/curves.png",
        "logs/history.csv",
        "eval/metrics.csv",
        "eval/metrics.json",
    ):
        assert (trained_run / name).is_file(), name
    assert list((trained_run / "logs").glob("events.out.tfevents.*"))
    assert is_finished(trained_run)
    with (trained_run / "logs" / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [r["epoch"] for r in rows] == ["1", "2"]
    assert {"loss", "segmentation", "contrastive", "contrast_weight", "learning_rate"} <= set(rows[0])
    assert "val_dice_nodule" in rows[-1]


def test_the_shipped_weights_are_the_stock_networks(trained_run):
    assert not any("projection" in key for key in weights(trained_run))
    saved = torch.load(trained_run / "models" / "checkpoint.pt", weights_only=True)
    assert any("projection" in key for key in saved["state"]["loss"])


def test_bundle_training_gives_the_same_weights_from_anywhere(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "models")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bundle(run / "configs" / "train.yaml", run, elsewhere)
    for key, value in weights(trained_run).items():
        assert torch.equal(value, weights(run)[key]), key
    assert list(elsewhere.iterdir()) == []


def test_bundle_evaluation_gives_the_same_metrics(trained_run, tmp_path):
    bundle(
        trained_run / "configs" / "evaluate.yaml",
        trained_run,
        tmp_path,
        "--output_dir",
        str(tmp_path / "out"),
    )
    folders = (tmp_path / "out", trained_run / "eval")
    theirs, ours = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert len(theirs["rows"]) == len(ours["rows"]) == 5
    assert all(a == pytest.approx(b) for a, b in zip(theirs["rows"], ours["rows"], strict=True))


def test_bundle_inference_gives_the_same_masks_in_the_scans_own_space(trained_run, phantoms, tmp_path):
    scans = phantoms / "imagesTs"
    arguments = ("--dataset_dir", str(scans), "--output_dir", str(tmp_path / "bundle"))
    bundle(trained_run / "configs" / "inference.yaml", trained_run, tmp_path, *arguments)
    Predictor(trained_run, device="cpu").run([scans], tmp_path / "medseg")
    files = sorted(scans.glob("*.nii.gz"))
    assert files
    for file in files:
        ours, stock = (nibabel.load(tmp_path / side / file.name) for side in ("medseg", "bundle"))
        assert np.mean(np.asarray(ours.dataobj) != np.asarray(stock.dataobj)) < 1e-4
        scan, mask = sitk.ReadImage(str(file)), sitk.ReadImage(str(tmp_path / "medseg" / file.name))
        assert scan.GetSize() == mask.GetSize()
        for get in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(scan, get)(), getattr(mask, get)(), atol=1e-4)


@pytest.fixture(scope="module")
def planned(phantoms, tmp_path_factory):
    """A planned run of three epochs, not trained."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("planned") / "run"
    prepare_run(dataset, split_cases(dataset), run, epochs=3, settings=TINY, device="cpu")
    return run


def test_an_interrupted_training_ends_with_the_same_weights(planned, tmp_path):
    straight, broken = shutil.copytree(planned, tmp_path / "a"), shutil.copytree(planned, tmp_path / "b")
    run_config(straight, device="cpu", quiet=True)

    # stopped in the middle of the second epoch, as kill -9 would: no handler of the training sees it
    code = (
        "import sys, os, medseg_supcon.training as t\n"
        "from ignite.engine import Events\n"
        "from monai.engines import SupervisedTrainer as T\n"
        "run = T.run\n"
        "def killed(self):\n"
        "    self.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: os._exit(9))\n"
        "    run(self)\n"
        "T.run = killed\n"
        f"t.run_config(__import__('pathlib').Path({str(broken)!r}), device='cpu', quiet=True)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, env=ONE_THREAD)
    assert done.returncode == 9, done.stderr[-2000:]
    assert not is_finished(broken)
    train_run(broken, device="cpu", resume=True, quiet=True)
    for name in ("model.pt", "best.pt"):
        for key, value in weights(straight, name).items():
            assert torch.equal(value, weights(broken, name)[key]), (name, key)

    def rows(run: Path) -> list[dict[str, str]]:
        with (run / "logs" / "history.csv").open() as stream:
            return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(stream)]

    assert rows(straight) == rows(broken)


def test_resuming_with_another_seed_is_refused(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    with pytest.raises(RunError, match="seed"):
        run_config(run, device="cpu", quiet=True, resume=True, seed=5)


def test_fine_tuning_starts_from_the_earlier_weights(trained_run, phantoms, tmp_path):
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    settings = [("plan::steps_per_epoch", 1), ("learning_rate", 0.0), ("weight_decay", 0.0)]
    prepare_run(dataset, split_cases(dataset), run, epochs=1, settings=settings, init=trained_run, device="cpu")
    run_config(run, device="cpu", quiet=True)
    for key, value in weights(trained_run).items():
        assert torch.equal(value, weights(run)[key]), key


def test_the_dice_ce_recipe_has_no_contrast(phantoms, tmp_path):
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    prepare_run(dataset, split_cases(dataset), run, recipe="dice_ce", epochs=1, settings=TINY, device="cpu")
    run_config(run, device="cpu", quiet=True)
    with (run / "logs" / "history.csv").open() as stream:
        row = next(csv.DictReader(stream))
    assert float(row["contrast_weight"]) == 0.0
    assert float(row["loss"]) == pytest.approx(float(row["segmentation"]))


NETWORKS = {
    "BasicUNet": {"spatial_dims": 3, "out_channels": 6, "features": [4, 4, 8, 8, 8, 4]},
    "DynUNet": {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 6, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2], "filters": [4, 8, 8],
    },
    "SegResNet": {"spatial_dims": 3, "init_filters": 8, "out_channels": 6},
    "SwinUNETR": {"in_channels": 1, "out_channels": 6, "feature_size": 12, "spatial_dims": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_by_network_def_alone(name, phantoms, tmp_path):
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    settings = [
        ("network_def", {"_target_": name, **NETWORKS[name]}),
        ("plan::patch_size", [20, 24, 16]),
        ("plan::steps_per_epoch", 1),
        ("plan::batch_size", 1),
    ]
    split = split_cases(dataset, labels=2)
    plan = prepare_run(dataset, split, run, epochs=1, settings=settings, device="cpu")
    if name == "SwinUNETR":
        assert sorted(plan["patch_size"]) == [32, 32, 64]
    train_run(run, device="cpu", quiet=True)
    assert json.loads((run / "eval" / "metrics.json").read_text())["summary"]["cases"] == 1
