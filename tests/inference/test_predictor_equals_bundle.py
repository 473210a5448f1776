"""`Predictor` gives the masks of the bundle's own inference.yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from toy_runs import UNET, blobs, save_nifti, threshold_weights

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
    save_nifti(scans / "turned.b.nii.gz", blobs((22, 30, 11), 2), np.diag([-1.2, -1.0, 3.0, 1.0]))
    save_nifti(scans / "oblique.nii", blobs((24, 20, 12), 3), OBLIQUE)
    slant = OBLIQUE.copy()
    slant[:3, 0] += 0.004 * slant[:3, 1]  # as far from a right angle as is taken
    save_nifti(scans / "slant.nii", blobs((24, 20, 12), 5), slant)
    save_nifti(scans / "slice.nii.gz", (blobs((24, 20, 1), 4) * 400).astype(np.int16), OBLIQUE)
    bundle = bundle_masks(run, scans, tmp_path / "bundle")
    manifest = Predictor(run, device="cpu").run([scans], tmp_path / "ours")
    assert manifest["summary"] == {"done": 5, "skipped": 0, "failed": 0}
    for name, theirs in bundle.items():
        ours = nib.load(tmp_path / "ours" / name)
        assert ours.shape == theirs.shape
        assert ours.get_data_dtype() == theirs.get_data_dtype() == np.uint8
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
        a, b = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
        assert len(np.unique(b)) > 1 or name == "slice.nii.gz"
        assert (a != b).sum() <= max(2, 1e-3 * a.size), name  # ties


TWO_CHANNELS = [
    {"_target_": "SplitDimd", "keys": "image", "output_postfixes": ["0", "1"], "dim": 0, "keepdim": True},
    {"_target_": "NormalizeIntensityd", "keys": "image_0"},
    {
        "_target_": "ScaleIntensityRanged",
        "keys": "image_1",
        "a_min": 0.5,
        "a_max": 2.5,
        "b_min": -1,
        "b_max": 1,
        "clip": True,
    },
    {"_target_": "ConcatItemsd", "keys": ["image_0", "image_1"], "name": "image", "dim": 0},
    {"_target_": "DeleteItemsd", "keys": ["image_0", "image_1"]},
]


@pytest.mark.parametrize("intensity", [[], TWO_CHANNELS])
def test_several_channels(make_run: Callable[..., Path], tmp_path: Path, intensity: list[Any]) -> None:
    """nnU-Net's channel files and a 4-D file of the same voxels give one mask, here and in the bundle."""
    plan = {"channels": ["CT", "MRI"], "intensity": intensity, "spacing": [1.3, 1.0, 2.0]}
    run = make_run(network_def={**UNET, "in_channels": 2}, **plan)
    scans, both = tmp_path / "scans", np.stack([blobs((20, 24, 16), s) for s in (1, 2)], -1)
    save_nifti(scans / "whole.nii.gz", both, OBLIQUE)
    for channel in (0, 1):
        save_nifti(scans / f"case_{channel:04d}.nii.gz", both[..., channel], OBLIQUE)
    bundle = bundle_masks(run, scans, tmp_path / "bundle")
    assert set(bundle) == {"whole.nii.gz", "case.nii.gz"}
    manifest = Predictor(run, device="cpu").run([scans], tmp_path / "ours")
    assert manifest["summary"]["done"] == 2
    masks = [np.asarray(image.dataobj) for image in bundle.values()]
    masks += [np.asarray(nib.load(tmp_path / "ours" / name).dataobj) for name in bundle]
    assert len(np.unique(masks[0])) > 1
    for mask in masks[1:]:
        assert mask.shape == (20, 24, 16)
        assert (mask != masks[0]).sum() <= 5


def test_label_values(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Negative, large and fractional values of label files come back, in the smallest type for them."""
    save_nifti(tmp_path / "scans" / "a.nii.gz", blobs((12, 12, 12)))
    kinds = {
        (0, -3, 2): np.int8,
        (0, -3, 200): np.int16,
        (0, 1, 300): np.uint16,
        (0, 1, 2.5): np.float32,
        (0, 1, 2): np.uint8,
    }
    for number, (values, kind) in enumerate(kinds.items()):
        labels = dict(zip(("background", "organ", "lesion"), values, strict=True))
        run = make_run(f"run{number}", weights=threshold_weights(), labels=labels)
        bundle = bundle_masks(run, tmp_path / "scans", tmp_path / f"bundle{number}")["a.nii.gz"]
        ours = Predictor(run, device="cpu").predict(tmp_path / "scans" / "a.nii.gz").mask
        assert bundle.get_data_dtype() == ours.dtype == kind
        assert set(np.unique(ours)) == set(values)
        assert (np.asarray(bundle.dataobj) == ours).all()


def test_bundle_refuses_an_empty_folder_and_equal_names(threshold_run: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    with pytest.raises(RuntimeError) as error:
        bundle_masks(threshold_run, tmp_path / "scans", tmp_path / "out")
    assert "contains no NIfTI files" in str(error.value.__cause__)
    for ending in (".nii", ".nii.gz"):
        save_nifti(tmp_path / "scans" / f"a{ending}", blobs((12, 14, 10)))
    with pytest.raises(RuntimeError) as error:
        bundle_masks(threshold_run, tmp_path / "scans", tmp_path / "out")
    assert "one file per scan" in str(error.value.__cause__)


def test_keep_largest(make_run: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="MONAI keeps the largest component by scikit-image")
    run = make_run(network_def=UNET, keep_largest=["organ", "lesion"], spacing=[1.4, 1.0, 1.0])
    save_nifti(tmp_path / "scans" / "a.nii.gz", blobs((22, 26, 20), 2), OBLIQUE)
    bundle = bundle_masks(run, tmp_path / "scans", tmp_path / "bundle")["a.nii.gz"]
    ours = Predictor(run, device="cpu").predict(tmp_path / "scans" / "a.nii.gz").mask
    assert (np.asarray(bundle.dataobj) != ours).sum() <= 5


@pytest.mark.parametrize("also", [{}, {"keep_largest": ["lesion"]}])
def test_smallest_components(make_run: Callable[..., Path], tmp_path: Path, also: dict[str, Any]) -> None:
    """A voxel of the scan is 6.84 mm3: the organ's specks of one to four go, and the lesion altogether."""
    smallest = {"organ": 30.0, "lesion": 1e6}
    options: dict[str, Any] = {"network_def": UNET, "spacing": [1.4, 1.0, 1.0], **also}
    runs = [make_run("with", smallest_mm3=smallest, **options), make_run("without", **options)]
    scan = save_nifti(tmp_path / "scans" / "a.nii.gz", blobs((22, 26, 20), 2), OBLIQUE)
    ours, all_of_them = (Predictor(run, device="cpu").predict(scan).mask for run in runs)
    bundle = bundle_masks(runs[0], tmp_path / "scans", tmp_path / "bundle")["a.nii.gz"]
    assert (np.asarray(bundle.dataobj) != ours).sum() <= 5
    assert ((ours != all_of_them) <= (ours == 0)).all()
    assert {4, 255} <= set(np.unique(all_of_them)) and 4 in ours and 255 not in ours
    assert ((all_of_them == 4) & (ours == 0)).any()
