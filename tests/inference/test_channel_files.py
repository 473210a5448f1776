"""Files of a channel each: what makes one scan, and what would make a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from toy_runs import save_nifti

from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import read_scan

ONE = np.ones((6, 5, 4), dtype=np.int16)


def test_two_files_for_a_channel_are_refused(tmp_path: Path) -> None:
    for name in ("p_0000.nii", "p_0000.nii.gz", "p_0001.nii.gz"):
        save_nifti(tmp_path / name, ONE)
    (scan,) = find_scans([tmp_path], 2)
    assert scan.name == "p"
    assert "two files for channel 0000 (p_0000.nii, p_0000.nii.gz)" in str(scan.problem)


def test_a_folder_named_in_two_ways_is_one(tmp_path: Path) -> None:
    first = save_nifti(tmp_path / "in" / "p_0000.nii", ONE)
    second = save_nifti(tmp_path / "in" / "p_0001.nii", ONE)
    (tmp_path / "other").mkdir()
    (scan,) = find_scans([second, tmp_path / "other" / ".." / "in" / first.name], 2)
    assert scan.problem is None
    assert [file.resolve() for file in scan.files] == [first, second]


def test_one_file_with_all_channels_is_a_scan_whatever_its_name(tmp_path: Path) -> None:
    """The digits of ``patient_0001`` number patients, for its channels are in it."""
    both = sitk.GetImageFromArray(np.ones((4, 5, 6, 2), dtype=np.float32), isVector=True)
    sitk.WriteImage(both, str(tmp_path / "patient_0001.nrrd"))
    (tmp_path / "broken_0000.nrrd").write_text("no scan")
    broken, scan = find_scans([tmp_path], 2)
    assert (scan.name, scan.problem) == ("patient_0001", None)
    assert read_scan(scan, 2).data.shape == (6, 5, 4, 2)
    assert broken.name == "broken"


def test_channels_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for number, columns in enumerate((6, 7)):
        sitk.WriteImage(sitk.Image([columns, 5, 4], sitk.sitkFloat32), str(tmp_path / f"p_{number:04d}.nrrd"))
    (scan,) = find_scans([tmp_path], 2)
    with pytest.raises(DataError, match=r"p_0001\.nrrd: its shape or affine differs .* must share a grid"):
        read_scan(scan, 2)


def test_channels_of_two_formats_are_refused(tmp_path: Path) -> None:
    save_nifti(tmp_path / "m_0000.nii.gz", ONE)
    sitk.WriteImage(sitk.GetImageFromArray(ONE), str(tmp_path / "m_0001.mha"))
    (scan,) = find_scans([tmp_path], 2)
    assert "the same format, found m_0000.nii.gz, m_0001.mha" in str(scan.problem)
    sitk.WriteImage(sitk.GetImageFromArray(ONE), str(tmp_path / "m_0000.nrrd"))
    (tmp_path / "m_0000.nii.gz").unlink()
    (scan,) = find_scans([tmp_path], 2)
    assert scan.problem is None  # one reader takes both
