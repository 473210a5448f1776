"""A data set like BraTS' in nnU-Net v2's layout: four channels, three regions that overlap, voxels that nobody annotated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medseg_supcon.networks import chain

HELD = {"whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}
ORDER = [2, 1, 3]  # the core is written with value 1, though the rest of the whole tumour has 2
IGNORE, EDGE = 4, 20
BRIGHT = ((0, 1, 2, 3), (0, 2, 1, 1), (0, 0, 3, 2), (0, 1, 1, 3))  # per channel, of values 0 to 3
AFFINE = np.array([[0, -1.0, 0, 9], [1.2, 0, 0, -4], [0, 0, 1.5, 2], [0, 0, 0, 1]])


def write_region_phantoms(root: Path, cases: int = 4) -> Path:
    """Balls within balls, moved from case to case; the first two slices of each are not annotated."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in range(cases):
        rng = np.random.default_rng(case)
        middle = EDGE / 2 + rng.uniform(-2, 2, 3)
        distance = np.linalg.norm(np.stack(np.indices((EDGE,) * 3), -1) - middle, axis=-1)
        truth = np.select([distance < 3, distance < 5, distance < 7.5], [3, 1, 2], 0)
        for channel, bright in enumerate(BRIGHT):
            image = (np.array(bright)[truth] + rng.normal(0, 0.2, truth.shape)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(image, AFFINE), root / f"imagesTr/b_{case}_{channel:04d}.nii.gz")
        label = truth.astype(np.uint8)
        label[:2] = IGNORE
        nibabel.save(nibabel.Nifti1Image(label, AFFINE), root / f"labelsTr/b_{case}.nii.gz")
    content: dict[str, Any] = {"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    content["labels"] = {"background": 0, **HELD, "enhancing tumor": 3, "ignore": IGNORE}
    content |= {"regions_class_order": ORDER, "numTraining": cases, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


UNET = {
    "_target_": "monai.networks.nets.UNet",
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 8,
    "channels": [8, 16],
    "strides": [2],
    "num_res_units": 1,
}
SETTINGS = [
    (
        "network_def",
        chain(UNET, {"_target_": "torch.nn.Conv3d", "in_channels": 8, "out_channels": 3, "kernel_size": 1}),
    ),
    ("plan::patch_size", [16, 16, 16]),
    ("plan::steps_per_epoch", 8),
    ("contrast_samples", 128),
    ("learning_rate", 0.02),
]
