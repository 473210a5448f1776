"""nnU-Net's side of `benchmarks.minutes`: plans, trains for some minutes, predicts.

It runs in an interpreter that has nnunetv2 and does not need medseg_supcon. Its folders come from nnU-Net's own
environment variables (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):

    python benchmarks/_nnunet_training.py prepare
    python benchmarks/_nnunet_training.py train MINUTES SEED
    python benchmarks/_nnunet_training.py predict SCANS OUT

Prints one line of JSON with what was done.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATASET, CONFIGURATION = "Dataset001_Benchmark", "3d_fullres"
PREPROCESSED, TRAINED = (Path(os.environ[f"nnUNet_{name}"]) / DATASET for name in ("preprocessed", "results"))
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def prepare() -> dict[str, Any]:
    """nnU-Net's own fingerprint, plan and preprocessing of the raw data set."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([1], num_processes=THREADS, check_dataset_integrity=True)
    plan_experiments([1])
    preprocess([1], configurations=[CONFIGURATION], num_processes=[THREADS])
    found = plans()["configurations"][CONFIGURATION]
    versions = f"nnunetv2 {version('nnunetv2')} on torch {version('torch')}"
    return {"versions": versions, "batch_size": found["batch_size"], "patch_size": found["patch_size"]}


def preprocessed(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((PREPROCESSED / name).read_text())
    return loaded


def plans() -> dict[str, Any]:
    return preprocessed("nnUNetPlans.json")


def trained_weights() -> Path:
    folder = f"TimedTrainer__nnUNetPlans__{CONFIGURATION}"
    return TRAINED / folder / "fold_all" / "checkpoint_final.pth"


def train(minutes: float, seed: int) -> dict[str, Any]:
    """nnU-Net's trainer on all cases, its polynomial schedule stretched over minutes instead of epochs."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class TimedTrainer(nnUNetTrainer):
        """No validation on the way: all of the time is for steps."""

        def run_training(self) -> None:
            self.on_train_start()
            self.network.train()
            self.steps, share, start = 0, 0.0, time.perf_counter()
            while share < 1:
                self.lr_scheduler.step(share * self.num_epochs)
                loss = self.train_step(next(self.dataloader_train))["loss"]
                share = (time.perf_counter() - start) / (60 * minutes)
                self.steps += 1
                if self.steps % 50 == 0:
                    self.print_to_log_file(f"{share:.0%} of {minutes:g} minutes, {self.steps} steps, loss {loss:.3f}")
            self.current_epoch = self.num_epochs
            self.on_train_end()

    torch.set_num_threads(THREADS)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)  # not all that is random: worker processes draw from seeds of their own
    settings = plans() | {"continue_training": False}
    trainer = TimedTrainer(settings, CONFIGURATION, "all", preprocessed("dataset.json"), torch.device("cpu"))
    trainer.run_training()
    return {"steps": trainer.steps}


def predict(scans: Path, out: Path) -> dict[str, Any]:
    """Masks of all scans of a folder, with nnU-Net's defaults: half-overlapping windows, mirrored along all axes.

    A process with one thread per core, which is faster for small scans than one process with several threads.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(scans.glob("*.nii.gz"))
    with multiprocessing.get_context("spawn").Pool(THREADS) as pool:
        mirrored = pool.starmap(predict_part, [(files[part::THREADS], out) for part in range(THREADS)], chunksize=1)
        pool.close()
        pool.join()
    return {"scans": len(files), "mirrored_axes": mirrored[0]}


def predict_part(files: list[Path], out: Path) -> list[int]:
    """Masks of some scans, with one thread; returns the axes along which nnU-Net mirrors."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    dataset, manager = preprocessed("dataset.json"), PlansManager(plans())
    configuration = manager.get_configuration(CONFIGURATION)
    classes = manager.get_label_manager(dataset).num_segmentation_heads
    network = nnUNetTrainer.build_network_architecture(
        manager, configuration, len(dataset["channel_names"]), classes, enable_deep_supervision=False
    )
    checkpoint = torch.load(trained_weights(), map_location="cpu", weights_only=False)
    weights, mirrored = checkpoint["network_weights"], list(checkpoint["inference_allowed_mirroring_axes"])
    network.load_state_dict(weights)
    names = [str(out / file.name.removesuffix(".nii.gz")) for file in files]
    with contextlib.redirect_stdout(sys.stderr):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.manual_initialization(network, manager, configuration, [weights], dataset, "nnUNetTrainer", mirrored)
        predictor.predict_from_files_sequential([[str(file)] for file in files], names)
    return mirrored


if __name__ == "__main__":
    stage, *arguments = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        if stage == "train":
            result = train(float(arguments[0]), int(arguments[1]))
        else:
            result = prepare() if stage == "prepare" else predict(*map(Path, arguments))
    print(json.dumps(result))
