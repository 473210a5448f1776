"""Names of DICOM series' masks: they stay, are no other's, and no series takes the mask of another one for its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dicom_files import write_series

from medseg_supcon.inference import Predictor

ONE = np.ones((6, 5, 8), dtype=np.int16)


def test_a_series_that_is_added_renames_no_mask(threshold_run: Path, tmp_path: Path) -> None:
    """The folder's only series has its name, several have their numbers: the first one keeps what it got."""
    study, out, predictor = tmp_path / "study", tmp_path / "out", Predictor(threshold_run, device="cpu")

    def names() -> dict[str, str]:
        done = predictor.run([study], out)["scans"]
        assert sorted(p.name for p in out.glob("*.nii.gz")) == sorted(f"{e['name']}.nii.gz" for e in done)
        return {entry["name"]: entry["status"] for entry in done}

    write_series(study, ONE, "1.9.9.5", 12)
    assert names() == {"study": "done"}
    write_series(study, ONE, "1.9.9.4", 3)
    assert names() == {"study": "skipped", "study_series3": "done"}
    for file in [*study.glob("12_*"), out / "study.nii.gz"]:
        file.unlink()
    assert names() == {"study_series3": "skipped"}  # the one that is left keeps its name, too
    assert "1.9.9" not in (out / "manifest.json").read_text()


def test_series_without_numbers_of_their_own_keep_their_names(threshold_run: Path, tmp_path: Path) -> None:
    """They are counted in the order of their files, and a new one may come first."""
    study, out, predictor = tmp_path / "study", tmp_path / "out", Predictor(threshold_run, device="cpu")
    shapes = {}
    for place, (series, depth) in enumerate([("1.9.9.5", 8), ("1.9.9.4", 7), ("1.9.9.3", 6)]):
        for k, file in enumerate(write_series(tmp_path / "new", ONE[:, :, :depth], series, 1)):
            study.mkdir(exist_ok=True)
            file.rename(study / f"{9 - place}_{k}.dcm")  # each before those that are there
        entries = predictor.run([study], out)["scans"]
        found = {entry["name"]: entry["shape"][2] for entry in entries}
        assert shapes.items() <= found.items() and len(found) == place + 1
        shapes = found
    assert shapes == {"study": 8, "study_series1": 7, "study_series2": 6}


def test_new_series_get_names_that_are_free(threshold_run: Path, tmp_path: Path) -> None:
    """Two new ones at once: neither takes the other's name, nor that of a mask whose series is gone."""
    study, out, predictor = tmp_path / "study", tmp_path / "out", Predictor(threshold_run, device="cpu")

    def names(*added: tuple[int, str, int]) -> dict[str, str]:
        for place, series, depth in added:
            for k, file in enumerate(write_series(tmp_path / "new", ONE[:, :, :depth], series, 1)):
                study.mkdir(exist_ok=True)
                file.rename(study / f"{place}_{k}.dcm")
        return {entry["name"]: entry["status"] for entry in predictor.run([study], out)["scans"]}

    names((5, "1.9.9.5", 8))
    assert names((6, "1.9.9.4", 7)) == {"study": "skipped", "study_series2": "done"}
    found = names((3, "1.9.9.3", 6), (4, "1.9.9.2", 5))
    assert found.pop("study_series1") == found.pop("study_series3") == "done"
    assert found == {"study": "skipped", "study_series2": "skipped"}
    for file in study.glob("6_*"):
        file.unlink()
    assert names((2, "1.9.9.1", 4))["study_series4"] == "done"


def test_the_mask_of_a_series_is_not_another_ones(threshold_run: Path, tmp_path: Path) -> None:
    """CDs call their folder DICOM; two scans of one protocol may lie on one grid."""
    out, predictor = tmp_path / "out", Predictor(threshold_run, device="cpu")
    for folder, series in (("a", "1.9.9.5"), ("b", "1.9.9.4")):
        write_series(tmp_path / folder / "DICOM", ONE, series)
    assert predictor.run([tmp_path / "a" / "DICOM"], out)["summary"]["done"] == 1
    for _ in range(2):
        (entry,) = predictor.run([tmp_path / "b" / "DICOM"], out)["scans"]
        assert entry["status"] == "failed" and "it is another DICOM series" in entry["error"]
    assert predictor.run([tmp_path / "a" / "DICOM"], out)["summary"]["skipped"] == 1
    assert predictor.run([tmp_path / "b" / "DICOM"], out, overwrite=True)["summary"]["done"] == 1
    assert predictor.run([tmp_path / "b" / "DICOM"], out)["summary"]["skipped"] == 1
