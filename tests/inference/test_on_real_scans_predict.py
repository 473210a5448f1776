"""Real scans through a run with random weights: where the masks are, and that the bundle gives the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from toy_runs import UNET

from medseg_supcon.inference import Predictor


@pytest.mark.parametrize("task", ["Task04_Hippocampus", "LeftAtrium_1p5mm"])
def test_masks_are_where_their_scans_are(
    real_data: Path, make_run: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    zscore = [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}]
    run = make_run(network_def=UNET, intensity=zscore, spacing=[1.7, 1.4, 1.2], patch_size=[32, 32, 32])
    scans = sorted((real_data / task / "imagesTr").glob("*.nii.gz"))[:3]
    manifest = Predictor(run, device="cpu").run(scans, tmp_path / "out")
    assert manifest["summary"]["done"] == 3
    for path in scans:
        source, mask = nib.load(path), nib.load(tmp_path / "out" / path.name)
        assert mask.shape == source.shape
        np.testing.assert_array_equal(mask.affine, source.affine)
        for code in ("qform_code", "sform_code"):
            assert mask.header[code] == source.header[code]
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 4, 255}
        ours, theirs = sitk.ReadImage(str(tmp_path / "out" / path.name)), sitk.ReadImage(str(path))
        for corner in ((0, 0, 0), tuple(n - 1 for n in theirs.GetSize())):
            here, there = (i.TransformIndexToPhysicalPoint(corner) for i in (ours, theirs))
            np.testing.assert_allclose(here, there, atol=1e-3)
