"""Runs made by hand: a plan, seeded or known weights, and the shipped configs; and toy scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from medseg_supcon.bundle import write_network

CONFIGS = Path(__file__).parents[2] / "bundles" / "segmentation" / "configs"

POINTWISE = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}
UNET = {
    "_target_": "monai.networks.nets.UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 8],
    "strides": [2, 2],
}


def plan_of(**changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "name": "toy",
        "channels": ["MRI"],
        "labels": {"background": 0, "organ": 4, "lesion": 255},
        "ignore_label": None,
        "orientation": "RAS",
        "spacing": [1.0, 1.0, 1.0],
        "intensity": [],
        "patch_size": [16, 16, 16],
        "flip_axes": [0],
        "batch_size": 1,
        "steps_per_epoch": 1,
        "epochs": 1,
        "network_def": POINTWISE,
        "inference": {"overlap": 0.5, "sw_batch_size": 2},
        "keep_largest": [],
        "fingerprint": {},
    }
    plan |= changes
    each = [1 / len(plan["labels"])] * len(plan["labels"])
    return {"class_frequencies": each, "class_weights": each, **plan}


def threshold_weights() -> dict[str, torch.Tensor]:
    """Logits 0, 10 (v - 1) and 20 (v - 1.5): class 1 for intensities in 1..2, class 2 above 2."""
    return {
        "weight": torch.tensor([0.0, 10.0, 20.0]).reshape(3, 1, 1, 1, 1),
        "bias": torch.tensor([0.0, -10.0, -30.0]),
    }


def write_run(run: Path, weights: dict[str, torch.Tensor] | None = None, seed: int = 0, **changes: Any) -> Path:
    """A run folder; weights None: random ones, wide enough that all classes win somewhere."""
    plan = plan_of(**changes)
    (run / "configs").mkdir(parents=True)
    (run / "models").mkdir()
    for config in ("inference.yaml", "evaluate.yaml"):
        shutil.copy(CONFIGS / config, run / "configs")
    shutil.copytree(CONFIGS.parent / "scripts", run / "scripts")
    versions = ("version", "monai_version", "pytorch_version", "numpy_version")
    (run / "configs" / "metadata.json").write_text(json.dumps(dict.fromkeys(versions, "0")))
    (run / "configs" / "plan.json").write_text(json.dumps(plan))
    write_network(run)
    if weights is None:
        torch.manual_seed(seed)
        network = ConfigParser({"network": plan["network_def"]}).get_parsed_content("network")
        weights = {k: v * 3 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(weights, run / "models" / "model.pt")
    return run


def save_nifti(
    path: Path, array: np.ndarray, affine: np.ndarray | None = None, codes: tuple[int, int] = (1, 1)
) -> Path:
    """Writes a NIfTI with the (qform, sform) codes given."""
    affine = np.eye(4) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth random scan with intensities of about 0..3, float32."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    field = (field - field.min()) / max(float(np.ptp(field)), 1e-9) * 3
    return np.asarray(field, dtype=np.float32)
