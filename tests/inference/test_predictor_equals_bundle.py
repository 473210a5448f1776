"""`Predictor` gives the masks of the bundle's own inference.yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import UNET, blobs, save_nifti
from monai.bundle import ConfigWorkflow

from medseg_supcon.inference import Predictor

OBLIQUE = np.array([[0.1, -1.9, 0.2, 5.0], [1.2, 0.1, -0.1, -8.0], [0.06, 0.15, 3.0, 2.0], [0, 0, 0, 1]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * [1.2, 1.9, 3.0]


def bundle_masks(run: Path, scans: Path, out: Path) -> dict[str, Any]:
    workflow = ConfigWorkflow(
        config_file=str(run / "configs" / "inference.yaml"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(run),
        dataset_dir=str(scans),
        output_dir=str(out),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    return {path.name: nib.load(path) for path in sorted(out.glob("*.nii.gz"))}


@pytest.mark.parametrize(
    "plan",
    [
        {"intensity": [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}]},
        {
            "spacing": [1.5, 1.0, 2.2],
            "orientation": "PIL",
            "inference": {"overlap": 0.25, "sw_batch_size": 3},
        },
        {"spacing": [2.0, 2.0, 2.0], "patch_size": [32, 16, 32]},
    ],
)
def test_same_masks(make_run: Callable[..., Path], tmp_path: Path, plan: dict[str, Any]) -> None:
    run = make_run(network_def=UNET, **{"patch_size": [16, 16, 16], **plan})
    scans = tmp_path / "scans"
    save_nifti(scans / "plain.nii.gz", blobs((30, 26, 20), 1))
    save_nifti(scans / "turned.nii.gz", blobs((22, 30, 11), 2), np.diag([-1.2, -1.0, 3.0, 1.0]))
    save_nifti(scans / "oblique.nii", blobs((24, 20, 12), 3), OBLIQUE)
    save_nifti(scans / "slice.nii.gz", (blobs((24, 20, 1), 4) * 400).astype(np.int16), OBLIQUE)
    bundle = bundle_masks(run, scans, tmp_path / "bundle")
    manifest = Predictor(run, device="cpu").run([scans], tmp_path / "ours")
    assert manifest["summary"] == {"done": 4, "skipped": 0, "failed": 0}
    for name, theirs in bundle.items():
        ours = nib.load(tmp_path / "ours" / name)
        assert ours.shape == theirs.shape
        assert ours.get_data_dtype() == theirs.get_data_dtype() == np.uint8
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
        a, b = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
        assert len(np.unique(b)) > 1 or name == "slice.nii.gz"
        assert (a != b).sum() <= max(2, 1e-3 * a.size), name  # ties
