"""The main job on small phantoms: a run is whole, goes on after a kill, and trains other networks and recipes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from tiny_run import TINY, training_of

from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.training import is_finished, prepare_run, run_config, train_run


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


@pytest.fixture(scope="module")
def planned(phantoms, tmp_path_factory):
    """A planned run of three epochs, not trained."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("planned") / "run"
    prepare_run(dataset, split_cases(dataset), run, epochs=3, settings=TINY, device="cpu")
    return run


def killed_in_training(run):
    """Train, up to the middle of the second epoch."""

    def start(trainer):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda _: os.kill(os.getpid(), signal.SIGKILL))
        straight_on(trainer)

    straight_on, SupervisedTrainer.run = SupervisedTrainer.run, start
    torch.set_num_threads(1)
    run_config(run, device="cpu", quiet=True)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
def test_an_interrupted_training_ends_with_the_same_weights(planned, tmp_path):
    straight, broken = shutil.copytree(planned, tmp_path / "a"), shutil.copytree(planned, tmp_path / "b")
    training_of(straight).trainer.run()

    process = multiprocessing.get_context("fork").Process(target=killed_in_training, args=(broken,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
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
    training_of(run).trainer.run()
    for key, value in weights(trained_run).items():
        assert torch.equal(value, weights(run)[key]), key


def test_the_dice_ce_recipe_has_no_contrast(phantoms, tmp_path):
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    prepare_run(dataset, split_cases(dataset), run, recipe="dice_ce", epochs=1, settings=TINY, device="cpu")
    training_of(run).trainer.run()
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
