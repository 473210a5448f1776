"""DICOM series: what makes one volume is read where it lies, everything else is a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    DIRECTION,
    DIRECTORY,
    ORIGIN,
    SECRETS,
    SPACING,
    image_tags,
    place_of,
    write_dicom,
    write_multi_frame,
    write_series,
)
from toy_runs import blobs, save_nifti, threshold_weights

from medseg_supcon.errors import DataError
from medseg_supcon.inference import Predictor, find_scans
from medseg_supcon.scans import read_scan

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SCAN = np.round(blobs((9, 8, 6)) * 100).astype(np.int16)
ONE = np.ones((6, 5, 8), dtype=np.int16)


def ras() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = DIRECTION * SPACING, ORIGIN
    return np.asarray(LPS @ affine)


def reason(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_scan(find_scans([path])[0], 1)
    sentence = str(error.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert not any(secret in sentence for secret in SECRETS)
    return sentence


@pytest.mark.parametrize("write", [write_series, write_multi_frame], ids=["slices", "multi-frame"])
def test_voxels_and_place(tmp_path: Path, write: Callable[..., Any]) -> None:
    path = tmp_path / "scan" / "a.dcm" if write is write_multi_frame else tmp_path / "scan"
    write(path, SCAN)
    volume = read_scan(find_scans([path])[0], 1)
    np.testing.assert_array_equal(volume.data, SCAN)
    np.testing.assert_allclose(volume.affine, ras(), atol=1e-5)


def test_the_mask_of_a_series_and_no_word_of_the_patient(
    make_run: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    divide = [{"_target_": "NormalizeIntensityd", "keys": "image", "subtrahend": 0.0, "divisor": 100.37}]
    predictor = Predictor(make_run(weights=threshold_weights(), intensity=divide), device="cpu")
    write_series(tmp_path / "MR_T1", SCAN)
    (tmp_path / "MR_T1" / "notes.txt").write_text("not a scan")
    write_series(tmp_path / "uneven", SCAN, skip=[2])
    files = write_series(tmp_path / "damaged", SCAN)
    files[2].write_bytes(files[2].read_bytes()[:700])
    folders = [tmp_path / name for name in ("MR_T1", "uneven", "damaged")]
    manifest = predictor.run(folders, tmp_path / "out")
    assert manifest["summary"] == {"done": 1, "skipped": 0, "failed": 3}
    mask = nib.load(tmp_path / "out" / "MR_T1.nii.gz")
    same = predictor.predict(save_nifti(tmp_path / "same.nii", SCAN, ras()))
    np.testing.assert_allclose(mask.affine, same.grid.affine, atol=1e-4)
    assert (np.asarray(mask.dataobj) != same.mask).sum() <= 2
    image = sitk.ReadImage(str(tmp_path / "out" / "MR_T1.nii.gz"))
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((0, 0, 5)), place_of(5), atol=1e-4)
    said = (tmp_path / "out" / "manifest.json").read_text() + "".join(capfd.readouterr())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["scans"]
    assert not any(secret in said for secret in SECRETS)


def test_each_slice_has_its_own_scaling(tmp_path: Path) -> None:
    """As PET has: the first slice's is whole, and must not make integers of the others'."""
    write_series(tmp_path / "pet", ONE, change=lambda k, tags: tags.update({0x00281053: ("DS", [1 + k / 4])}))
    data = read_scan(find_scans([tmp_path / "pet"])[0], 1).data
    np.testing.assert_allclose(data[0, 0], 1 + np.arange(8) / 4)


def test_several_series_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "study", ONE[:, :, :4], "1.9.9.5", 12)
    write_series(tmp_path / "study", ONE[:, :, :3], "1.9.9.4", 3, ending="")
    scans = find_scans([tmp_path / "study"])
    assert [scan.name for scan in scans] == ["study_series3", "study_series12"]
    assert [len(scan.files) for scan in scans] == [3, 4]
    assert "one of 3 slices" in str(find_scans([scans[0].files[1]])[0].problem)
    # One level up, beside other scans, and named by "..", too.
    save_nifti(tmp_path / "brain.nii", ONE)
    names = ["brain", "study_series3", "study_series12"]
    assert [scan.name for scan in find_scans([tmp_path])] == names
    (tmp_path / "below").mkdir()
    assert [scan.name for scan in find_scans([tmp_path / "below" / ".." / "study"])] == names[1:]


def shifted(k: int) -> np.ndarray:
    return np.asarray(place_of(k) + DIRECTION[:, 1] * 0.5 * k)


def turned(k: int, tags: dict[int, tuple[str, Any]]) -> None:
    if k == 5:
        tags[0x00200037] = ("DS", DIRECTION.T[1:])


def larger(k: int, tags: dict[int, tuple[str, Any]]) -> None:
    if k == 0:
        tags.update(image_tags(np.ones((9, 9)), uid="1.9.9.7.0"))


def nowhere(k: int, tags: dict[int, tuple[str, Any]]) -> None:
    if k == 2:
        del tags[0x00200032]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip": [3]}, "number 3 and 4 of 7 are 4.80 mm apart, others 2.40 mm"),
        ({"skip": [1]}, "number 1 and 2 of 7 are 4.80 mm apart"),
        ({"place": lambda k: place_of(int(k * 1.2))}, "not evenly spaced"),
        ({"place": shifted}, "a tilted gantry"),
        ({"place": lambda k: place_of(k // 2)}, "8 slices at 4 places"),
        ({"place": lambda k: place_of(max(k - 1, 0))}, "8 slices at 7 places"),
        ({"place": lambda k: place_of(0)}, "8 slices at 1 places"),
        ({"change": nowhere}, "not every slice says where it is"),
        ({"modality": "SEG"}, "contains no scan"),
        ({"modality": "RTDOSE"}, "contains no scan"),
        ({"image_type": "ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC"}, "mosaic"),
    ],
)
def test_what_is_no_volume(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    write_series(tmp_path / "series", ONE, **options)
    assert says in reason(tmp_path / "series")


@pytest.mark.parametrize(("change", "file"), [(turned, "01_004.dcm"), (larger, "01_000.dcm")])
def test_a_localiser_in_the_series_is_named(tmp_path: Path, change: Callable[..., None], file: str) -> None:
    write_series(tmp_path / "series", ONE, change=change)
    said = reason(tmp_path / "series")
    assert said.startswith(f"{tmp_path / 'series' / file}: its ") and "Move it out of the folder" in said


@pytest.mark.parametrize("tilt", [0.0005, 0.001, 0.0015])
def test_the_last_digit_of_a_direction_makes_no_localiser(tmp_path: Path, tilt: float) -> None:
    """Scanners write a direction anew for each slice, rounded now up, now down."""

    def noisy(k: int, tags: dict[int, tuple[str, Any]]) -> None:
        row = np.array([1.0, tilt + 1e-7 * (-1) ** k, 0.0])
        tags[0x00200037] = ("DS", [*row, -row[1], 1.0, 0.0])

    write_series(tmp_path / "series", ONE, change=noisy, place=lambda k: np.array([0.0, 0.0, 2.4 * k]))
    assert read_scan(find_scans([tmp_path / "series"])[0], 1).data.shape == (6, 5, 8)


def test_multi_frame_files(tmp_path: Path) -> None:
    volumes = tmp_path / "volumes"
    for name in ("a.dcm", "b.dcm"):
        write_multi_frame(volumes / name, SCAN)
    assert "2 volumes, one per file" in reason(volumes)
    assert read_scan(find_scans([volumes / "b.dcm"])[0], 1).data.shape == (9, 8, 6)
    # Two echoes of three slices make no volume of six.
    assert "6 slices at 3 places" in reason(write_multi_frame(tmp_path / "c.dcm", SCAN, lambda k: place_of(k % 3)))
    film = write_dicom(tmp_path / "d.dcm", {**image_tags(np.ones((4, 5, 6))), 0x00280008: ("IS", "4")})
    assert "not every slice says where" in reason(film)


def test_pictures_and_documents(tmp_path: Path) -> None:
    picture = write_dicom(tmp_path / "picture.dcm", image_tags(np.ones((5, 6))))
    assert "does not say where it is" in reason(picture)
    plain = image_tags(np.ones((5, 6)), modality="SR")
    report = write_dicom(tmp_path / "report.dcm", {t: v for t, v in plain.items() if t < 0x00280000})
    assert "holds no image" in reason(report)
    seg = write_dicom(tmp_path / "seg.dcm", image_tags(np.ones((5, 6)), "1.9.9.8", modality="SEG"))
    assert "its DICOM modality is SEG" in reason(seg)


def test_only_scans_count_in_a_study_and_a_damaged_slice_is_not_passed_over(tmp_path: Path) -> None:
    """The last slice of a series, cut short, would leave a smaller volume that looks whole."""
    study = tmp_path / "study"
    files = write_series(study, ONE)
    tags = {t: v for t, v in image_tags(np.ones((5, 6)), modality="SR").items() if t < 0x00280000}
    write_dicom(study / "report", tags)
    write_dicom(study / "DIRFILE", {}, DIRECTORY)
    os.mkfifo(study / "pipe")
    assert [scan.name for scan in find_scans([study])] == ["study"]
    files[7].write_bytes(files[7].read_bytes()[:600])
    (study / "empty.dcm").touch()
    scans = find_scans([study])
    assert [scan.name for scan in scans] == ["study", files[7].name, "empty.dcm"]
    assert all("cannot be read as DICOM" in str(scan.problem) for scan in scans[1:])
