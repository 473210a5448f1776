"""A run that trains in seconds: whole, not good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.bundle import ConfigWorkflow

from medseg_supcon.networks import chain

UNET = {
    "_target_": "monai.networks.nets.UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 8,
    "channels": [8, 16],
    "strides": [2],
    "num_res_units": 1,
}
TINY_NETWORK = chain(UNET, {"_target_": "torch.nn.Conv3d", "in_channels": 8, "out_channels": 6, "kernel_size": 1})
TINY = [
    ("network_def", TINY_NETWORK),
    ("plan::patch_size", [16, 16, 16]),
    ("plan::steps_per_epoch", 3),
    ("contrast_samples", 256),
]


def training_of(run: Path, overlays: Sequence[str] = (), **options: object) -> ConfigWorkflow:
    """A planned run's training as MONAI sets it up, ready to run; its trainer alone writes no scores and no documents."""
    config = [str(run / "configs" / f"{name}.yaml") for name in ("train", *overlays)]
    common = {"workflow_type": "train", "logging_file": False, "bundle_root": str(run), "quiet": True}
    workflow = ConfigWorkflow(config, **common, **{"device": "$torch.device('cpu')", **options})
    workflow.initialize()
    return workflow
