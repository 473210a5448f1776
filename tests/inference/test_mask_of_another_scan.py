"""An existing mask is kept only for its own scan, whatever the format of the scan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import DIRECTION, ORIGIN, write_multi_frame, write_series
from toy_runs import blobs, save_nifti

from medseg_supcon.inference import Predictor

SHAPE = (9, 8, 6)


def write(path: Path, kind: str, shape: tuple[int, ...] = SHAPE, edge: float = 1.0) -> Path:
    """A scan called "c", with a first voxel edge."""
    scan = blobs(shape)
    if kind in ("nii.gz", "metres"):
        factor = 1e-3 if kind == "metres" else 1.0
        file = save_nifti(path / "c.nii", scan, np.diag([edge * factor, 2 * factor, 3 * factor, 1]))
        content = bytearray(file.read_bytes())
        content[123] = 1 if kind == "metres" else 2  # xyzt_units
        file.write_bytes(content)
        return file
    path.mkdir(parents=True, exist_ok=True)
    if kind in ("mha", "nrrd"):
        image = sitk.GetImageFromArray(scan.T)
        image.SetSpacing((edge, 2.0, 3.0))
        image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
        sitk.WriteImage(image, str(path / f"c.{kind}"))
        return path / f"c.{kind}"
    whole = np.round(scan * 100).astype(np.int16)
    if kind == "frames":
        return write_multi_frame(path / "c.dcm", whole)
    shutil.rmtree(path / "c", ignore_errors=True)
    write_series(path / "c", whole)
    return path / "c"


def status(run: Path, scan: Path, out: Path) -> dict[str, Any]:
    return dict(Predictor(run, device="cpu").run([scan], out)["scans"][0])


@pytest.mark.parametrize("kind", ["nii.gz", "metres", "mha", "nrrd", "series", "frames"])
def test_another_shape_is_another_scan(threshold_run: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    scan = write(tmp_path / "in", kind)
    assert status(threshold_run, scan, out)["status"] == "done"
    before = (out / "c.nii.gz").read_bytes()
    assert status(threshold_run, scan, out)["status"] == "skipped"
    for shape in ((9, 8, 5), (8, 9, 6)):
        scan = write(tmp_path / "in", kind, shape)
        entry = status(threshold_run, scan, out)
        assert entry["status"] == "failed"
        assert str(scan) in entry["error"] and "belongs to another scan" in entry["error"]
    assert (out / "c.nii.gz").read_bytes() == before


@pytest.mark.parametrize("kind", ["nii.gz", "metres", "mha", "nrrd"])
def test_another_place_is_another_scan(threshold_run: Path, tmp_path: Path, kind: str) -> None:
    """An edge 10 % longer: 0.9 mm over nine voxels, 0.0001 in a header in metres."""
    out = tmp_path / "out"
    assert status(threshold_run, write(tmp_path / "in", kind), out)["status"] == "done"
    assert "another scan" in status(threshold_run, write(tmp_path / "in", kind, edge=1.1), out)["error"]
    assert status(threshold_run, write(tmp_path / "in", kind, edge=1.0 + 1e-6), out)["status"] == "skipped"


def test_a_mask_in_metres_is_the_mask_of_the_scan_in_mm(threshold_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status(threshold_run, write(tmp_path / "in", "metres"), out)
    assert status(threshold_run, write(tmp_path / "in", "nii.gz"), out)["status"] == "skipped"


def test_slices_farther_apart_are_another_scan(threshold_run: Path, tmp_path: Path) -> None:
    """As many slices."""
    out, scan = tmp_path / "out", write(tmp_path / "in", "series")
    assert status(threshold_run, scan, out)["status"] == "done"
    shutil.rmtree(scan)
    write_series(scan, np.ones(SHAPE, dtype=np.int16), place=lambda k: ORIGIN + DIRECTION[:, 2] * 3.1 * k)
    assert "another scan" in status(threshold_run, scan, out)["error"]
