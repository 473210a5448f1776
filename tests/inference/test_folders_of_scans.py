"""Folders as they come from an archive or a person: nested, linked, and with scans where none is looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dicom_files import write_series
from toy_runs import save_nifti

from medseg_supcon.inference import Predictor, find_scans

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


def test_scans_in_subfolders_are_named(threshold_run: Path, tmp_path: Path) -> None:
    """Beside scans at the top they are a warning, which the manifest and the terminal show."""
    tmp_path = tmp_path / "scans"
    save_nifti(tmp_path / "sub" / "deep" / "a.nii", ONE)
    (scan,) = find_scans([tmp_path])
    assert str(tmp_path) in str(scan.problem)
    assert f"{Path('sub') / 'deep'} contain other scans" in str(scan.problem)
    save_nifti(tmp_path / "b.nii", ONE)
    save_nifti(tmp_path / "c.nii", ONE)
    (tmp_path / "empty").mkdir()
    entries = Predictor(threshold_run, device="cpu").run([tmp_path], tmp_path / "out")["scans"]
    assert [entry["status"] for entry in entries] == ["done", "done"]
    told = [warning for entry in entries for warning in entry["warnings"] if "contain other scans" in warning]
    assert told == [
        f"{tmp_path}: only DICOM is searched for in subfolders, but {Path('sub') / 'deep'} contain other scans. Pass "
        "those folders too."
    ]
    (tmp_path / "sub" / "deep" / "a.nii").rename(tmp_path / "sub" / "deep" / "a.mgz")
    assert "contain other scans" in str(find_scans([tmp_path])[0].warnings)


def test_what_is_no_scan_takes_no_name(tmp_path: Path) -> None:
    good, same = (save_nifti(tmp_path / f"{name}.nii.gz", ONE) for name in ("good", "same"))
    (tmp_path / "good.nii").mkdir()
    scans = find_scans([tmp_path, tmp_path / "same.mha"])
    assert {scan.source for scan in scans if scan.problem is None} == {good, same}
    refused = {scan.source.name: str(scan.problem) for scan in scans if scan.problem is not None}
    assert "is a folder" in refused.pop("good.nii")
    assert "no such file" in refused.pop("same.mha")
    assert not refused


def test_a_file_given_in_several_ways_is_one_scan(tmp_path: Path) -> None:
    file = save_nifti(tmp_path / "a.nii", ONE)
    other = save_nifti(tmp_path / "far" / "b" / "c.nii", ONE)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "b")
    (tmp_path / "l.nii").symlink_to(file)
    paths = [file, tmp_path / "far" / ".." / "a.nii", tmp_path / "link" / "c.nii", other, tmp_path / "l.nii"]
    scans = find_scans(paths)
    assert [(scan.name, scan.problem) for scan in scans] == [("a", None), ("c", None), ("l", None)]
    # ".." of a link is above what it leads to: another file.
    above = save_nifti(tmp_path / "far" / "a.nii", ONE)
    for scan in find_scans([file, tmp_path / "link" / ".." / "a.nii"]):
        assert "Rename one" in str(scan.problem)
    assert above.exists()
