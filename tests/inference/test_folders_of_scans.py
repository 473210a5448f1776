"""Folders as they come from an archive or a person: nested, linked, and with scans where none is looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series
from toy_runs import save_nifti

from medseg_supcon.inference import find_scans

ONE = np.ones((6, 5, 4), dtype=np.int16)


def test_an_export_of_patients_studies_and_series(tmp_path: Path) -> None:
    """Each slice of it is found, under a name that tells the patients apart."""
    written = {}
    for number, place in enumerate(("P1/S1/T1", "P1/S1/T2", "P1/S2/T1", "P2/S1/T1")):
        written[place.replace("/", "_")] = write_series(tmp_path / place, ONE, f"1.9.9.{number}")
    save_nifti(tmp_path / "good.nii.gz", ONE)
    scans = {scan.name: scan for scan in find_scans([tmp_path])}
    assert set(scans) == {"good", *written}
    assert all(scan.problem is None for scan in scans.values())
    for name, files in written.items():
        assert set(scans[name].files) == set(files)
    assert [scan.name for scan in find_scans([tmp_path / "P1" / "S1"])] == ["T1", "T2"]
    write_series(tmp_path / "P2" / "S1" / "T1", ONE, "1.9.9.8", 2)
    assert [scan.name for scan in find_scans([tmp_path / "P2"])] == ["S1_T1_series1", "S1_T1_series2"]


def test_links_that_make_a_ring(tmp_path: Path) -> None:
    write_series(tmp_path / "a" / "b", ONE)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    write_series(tmp_path / ".hidden" / "b", ONE)
    assert [scan.name for scan in find_scans([tmp_path])] == ["a_b"]


def test_scans_in_subfolders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_nifti(tmp_path / "sub" / "deep" / "a.nii", ONE)
    (scan,) = find_scans([tmp_path])
    assert str(tmp_path) in str(scan.problem)
    assert f"{Path('sub') / 'deep'} hold other scans" in str(scan.problem)
    save_nifti(tmp_path / "b.nii", ONE)
    assert not caplog.records
    (scan,) = find_scans([tmp_path])
    assert scan.problem is None
    (record,) = caplog.records
    assert f"{Path('sub') / 'deep'} hold other scans" in record.getMessage()
