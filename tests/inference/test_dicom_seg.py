"""``predict --dicom-seg``: the mask's voxels in the mask's places by three readers, and the patient of the source."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from scipy.spatial.transform import Rotation
from toy_runs import CONFIGS, POINTWISE, blobs, save_nifti, threshold_weights, write_run

from medseg_supcon.inference import Predictor

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
SHAPE = (6, 9, 8)  # frames, rows, columns
STORED = np.round(blobs(SHAPE) * 100).astype(np.int16)
ROW_SPACING, COLUMN_SPACING = 0.9, 0.8
ORIGIN = np.array([-12.0, 34.0, 56.0])
OBLIQUE = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix().T
PLACES = {  # directions of a row and of a column, and the step from slice to slice in mm, LPS
    "axial": ([1, 0, 0], [0, 1, 0], [0, 0, 2.4]),
    "slices downwards": ([1, 0, 0], [0, 1, 0], [0, 0, -2.4]),
    "turned by 180 degrees": ([-1, 0, 0], [0, -1, 0], [0, 0, 2.4]),
    "sagittal": ([0, 1, 0], [0, 0, -1], [1.5, 0, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1], [0, -1.7, 0]),
    "oblique": (OBLIQUE[0], OBLIQUE[1], 2.4 * OBLIQUE[2]),
}
PATIENT = {"PatientID": "PATIENT4711", "PatientBirthDate": "19500101", "PatientSex": "F", "AccessionNumber": "ACC77"}
SECRETS = ("ller", "4711", "19500101", "ACC77", "1.9.9", "Bunsen")
Predict = Callable[..., tuple[int, str, str]]


def header(uid: str, sop: str, pixels: np.ndarray) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    image.SpecificCharacterSet, image.PatientName, image.ReferringPhysicianName = "ISO_IR 100", "Müller^Äpfel", "Bunsen"
    for keyword, value in PATIENT.items():
        setattr(image, keyword, value)
    image.SOPClassUID, image.SOPInstanceUID, image.Modality = sop, uid, "MR"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = "1.9.9", "1.9.9.7", "1.9.9.8"
    image.StudyDate, image.StudyTime, image.StudyID = "20200229", "101112", "S1"
    image.SeriesNumber, image.SamplesPerPixel, image.PhotometricInterpretation = 3, 1, "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape[-2:]
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = np.ascontiguousarray(pixels).astype("<i2").tobytes()
    return image


def text(values: Any) -> list[str]:
    return [f"{value:.9f}"[:16] for value in values]


def item(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def write_slices(folder: Path, place: str = "axial", change: Callable[[Dataset], Any] | None = None) -> Path:
    """A file per slice, with names in another order than their places; slices are thinner than the gap."""
    row, column, step = (np.array(part, float) for part in PLACES[place])
    folder.mkdir(parents=True)
    for k, pixels in enumerate(STORED):
        image = header(f"1.9.9.7.{k + 1}", MR, pixels)
        image.ImagePositionPatient = text(ORIGIN + k * step)
        image.ImageOrientationPatient = text([*row, *column])
        image.PixelSpacing, image.SliceThickness = text([ROW_SPACING, COLUMN_SPACING]), "1.1"
        if change is not None:
            change(image)
        image.save_as(folder / f"{(5 * k) % 7}.dcm", enforce_file_format=True)
    return folder


def enhanced(pixels: np.ndarray, uid: str, numbers: list[int], place: str) -> FileDataset:
    row, column, step = (np.array(part, float) for part in PLACES[place])
    image = header(uid, ENHANCED_MR, pixels)
    image.NumberOfFrames = len(numbers)
    turn, measures = item(ImageOrientationPatient=text([*row, *column])), item(PixelSpacing=text([0.9, 0.8]))
    measures.SliceThickness = "1.1"
    image.SharedFunctionalGroupsSequence = [item(PlaneOrientationSequence=[turn], PixelMeasuresSequence=[measures])]
    places = [item(ImagePositionPatient=text(ORIGIN + k * step)) for k in numbers]
    image.PerFrameFunctionalGroupsSequence = [item(PlanePositionSequence=[one]) for one in places]
    return image


def write_multi_frame(folder: Path, place: str = "axial") -> Path:
    """One file, its frames in no order of places."""
    folder.mkdir(parents=True)
    numbers = [3, 0, 5, 1, 4, 2]
    enhanced(STORED[numbers], "1.9.9.7.99", numbers, place).save_as(folder / "a.dcm", enforce_file_format=True)
    return folder


def write_enhanced_slices(folder: Path, place: str = "axial") -> Path:
    """Enhanced files of one frame each, as some scanners send them."""
    folder.mkdir(parents=True)
    for k in range(len(STORED)):
        image = enhanced(STORED[k : k + 1], f"1.9.9.7.{k + 1}", [k], place)
        image.save_as(folder / f"{(5 * k) % 7}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runnable(tmp_path / "model")


def runnable(run: Path, **changes: Any) -> Path:
    """A run of two classes, values 5 and 300, that the command line takes."""
    scale = [{"_target_": "NormalizeIntensityd", "keys": "image", "subtrahend": 0.0, "divisor": 100.37}]
    labels = {"background": 0, "left kidney": 5, "liver tumour": 300}
    write_run(run, **{"weights": threshold_weights(), "intensity": scale, "labels": labels, **changes})
    shutil.copy(CONFIGS / "train.yaml", run / "configs")
    return run


@pytest.fixture
def predict(medseg: Predict, tmp_path: Path) -> Predict:
    """predict(run, scan, ...): the command with --dicom-seg, into out/; nothing that it says is of the patient."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        code, shown, said = medseg(
            "predict", *arguments, "--out", tmp_path / "out", "--dicom-seg", "--device", "cpu", "--trust"
        )
        assert not any(secret in shown + said for secret in SECRETS)
        return code, shown, said

    return call


def mask_points(file: Path) -> dict[tuple[float, ...], int]:
    """Place (LPS mm) -> value of every voxel of a NIfTI mask that is not background."""
    image = nib.load(file)
    voxels = np.asarray(image.dataobj)
    points = {}
    for index in np.argwhere(voxels != 0):
        x, y, z = (image.affine @ [*index, 1])[:3]
        points[rounded((-x, -y, z))] = int(voxels[tuple(index)])
    return points


def rounded(place: Any) -> tuple[float, ...]:
    return tuple(float(round(value, 2)) + 0.0 for value in place)


def seg_points(file: Path, values: list[int]) -> dict[tuple[float, ...], int]:
    """Place -> value by the formula of PS3.3 C.7.6.2.1.1, frame by frame."""
    seg = pydicom.dcmread(file)
    shared = seg.SharedFunctionalGroupsSequence[0]
    turn = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    down, right = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    frames = np.asarray(seg.pixel_array).reshape(-1, seg.Rows, seg.Columns)
    points: dict[tuple[float, ...], int] = {}
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        start = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        group = frame if "SegmentIdentificationSequence" in frame else shared
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for r, c in np.argwhere(pixels):
            place = rounded(start + turn[:3] * right * c + turn[3:] * down * r)
            assert place not in points
            points[place] = values[number - 1]
    return points


def close(one: dict[tuple[float, ...], int], other: dict[tuple[float, ...], int]) -> bool:
    """Whether two sets of labelled places are the same to 0.02 mm."""
    assert one and len(one) == len(other)
    places, others = np.array(sorted(one)), np.array(sorted(other))
    order = np.abs(places[:, None] - others[None]).max(axis=2).argmin(axis=1)
    same = np.abs(places - others[order]).max() < 0.02 and len(set(order)) == len(order)
    return bool(same) and all(one[rounded(p)] == other[rounded(others[k])] for p, k in zip(places, order, strict=True))


WRITERS = {"slices": write_slices, "multi-frame": write_multi_frame, "enhanced slices": write_enhanced_slices}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", PLACES)
def test_the_segments_are_where_the_mask_is(
    run: Path, predict: Predict, tmp_path: Path, place: str, writer: str
) -> None:
    series = WRITERS[writer](tmp_path / "scan", place)
    assert predict(run, series)[0] == 0
    file, expected = tmp_path / "out" / "scan.seg.dcm", mask_points(tmp_path / "out" / "scan.nii.gz")
    assert set(expected.values()) == {5, 300}
    assert close(expected, seg_points(file, [5, 300]))
    # the same voxels, by the order of the source's slices alone: row, column and slice of the stored scan
    volume = highdicom.seg.segread(file).get_volume(combine_segments=True, allow_missing_positions=True)
    by_highdicom = {}
    for index in np.argwhere(volume.array):
        by_highdicom[rounded((volume.affine @ [*index, 1])[:3])] = [5, 300][volume.array[tuple(index)] - 1]
    assert close(expected, by_highdicom)
    # highdicom refers frames to files of one frame each only where these are of a single-frame class
    check_references(pydicom.dcmread(file), series, each=writer != "enhanced slices")


def check_references(seg: Dataset, series: Path, each: bool) -> None:
    """The object names all source files, and each frame the source slice, or frame, that lies where it lies."""
    places = {}
    for source in map(pydicom.dcmread, series.iterdir()):
        if "PerFrameFunctionalGroupsSequence" not in source:
            places[source.SOPInstanceUID, 1] = source.ImagePositionPatient
            continue
        for number, frame in enumerate(source.PerFrameFunctionalGroupsSequence, 1):
            places[source.SOPInstanceUID, number] = frame.PlanePositionSequence[0].ImagePositionPatient
    for frame in seg.PerFrameFunctionalGroupsSequence if each else ():
        (named,) = frame.DerivationImageSequence[0].SourceImageSequence
        number = named.get("ReferencedFrameNumber", 1)
        own = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(np.array(places[named.ReferencedSOPInstanceUID, number], float), own, atol=1e-6)
    known = {named.ReferencedSOPInstanceUID for named in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert known == {uid for uid, _ in places}


@pytest.mark.parametrize("place", PLACES)
def test_simpleitk_finds_one_segment_in_its_place(predict: Predict, tmp_path: Path, place: str) -> None:
    network = {**POINTWISE, "out_channels": 2}
    weights = {"weight": torch.tensor([0.0, 10.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -12.0])}
    run = runnable(tmp_path / "model", weights=weights, network_def=network, labels={"background": 0, "liver": 1})
    assert predict(run, write_slices(tmp_path / "scan", place))[0] == 0
    image = sitk.ReadImage(str(tmp_path / "out" / "scan.seg.dcm"))
    found = {}
    for k, j, i in np.argwhere(sitk.GetArrayFromImage(image)):
        found[rounded(image.TransformIndexToPhysicalPoint((int(i), int(j), int(k))))] = 1
    assert close(mask_points(tmp_path / "out" / "scan.nii.gz"), found)
    assert image.GetSize() == SHAPE[::-1]
    assert image.GetSpacing() == pytest.approx((0.8, 0.9, np.linalg.norm(PLACES[place][2])))


def test_simpleitk_decodes_the_frames_of_several_segments(run: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(run, write_slices(tmp_path / "scan", "oblique"))[0] == 0
    file = tmp_path / "out" / "scan.seg.dcm"
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(file))) > 0
    np.testing.assert_array_equal(frames, pydicom.dcmread(file).pixel_array > 0)


def test_an_empty_mask(run: Path, predict: Predict, tmp_path: Path) -> None:
    def blank(image: Dataset) -> None:
        image.PixelData = b"\0" * len(image.PixelData)

    assert predict(run, write_slices(tmp_path / "scan", change=blank))[0] == 0
    seg = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm")
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["left kidney", "liver tumour"]
    assert not seg.pixel_array.any()


def code(sequence: Any) -> tuple[str, str]:
    return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator


def test_what_the_object_says(run: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(run, write_slices(tmp_path / "scan"))[0] == 0
    seg = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm")
    assert (seg.Modality, seg.SOPClassUID, seg.SegmentationType) == ("SEG", "1.2.840.10008.5.1.4.1.1.66.4", "BINARY")
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("1.9.9", "1.9.9.8")
    assert not seg.SeriesInstanceUID.startswith("1.9.9") and not seg.SOPInstanceUID.startswith("1.9.9")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (1.1, pytest.approx(2.4))
    kidney, tumour = seg.SegmentSequence
    kind = kidney.SegmentedPropertyTypeCodeSequence
    assert (kidney.SegmentNumber, kidney.SegmentLabel, code(kind)) == (1, "left kidney", ("64033007", "SCT"))
    assert code(kidney.SegmentedPropertyCategoryCodeSequence) == ("91723000", "SCT")
    assert code(kind[0].SegmentedPropertyTypeModifierCodeSequence) == ("7771000", "SCT")
    assert code(tumour.SegmentedPropertyTypeCodeSequence) == ("108369006", "SCT")
    assert code(tumour.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
    assert code(tumour.AnatomicRegionSequence) == ("10200004", "SCT")
    for segment in seg.SegmentSequence:
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and algorithm.AlgorithmName == "medseg_supcon"
        assert algorithm.AlgorithmVersion == manifest["packages"]["medseg-supcon"]
        assert algorithm.AlgorithmParameters == f"SHA-256 of model={manifest['models'][0]['sha256']}"


def test_patient_and_study_are_in_the_object_and_nowhere_else(run: Path, predict: Predict, tmp_path: Path) -> None:
    def odd(image: Dataset) -> None:
        image.PatientSex, image.PatientAge, image.PatientComments = "U", "070Y", "größer"
        image.StudyDate = "2020.02.29"  # of ACR-NEMA
        del image.AccessionNumber

    assert predict(run, write_slices(tmp_path / "scan", change=odd))[0] == 0
    seg = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm")
    assert (str(seg.PatientName), seg.PatientID, seg.PatientBirthDate) == ("Müller^Äpfel", "PATIENT4711", "19500101")
    assert (seg.PatientSex, seg.PatientAge, seg.PatientComments) == ("U", "070Y", "größer")
    assert (seg.StudyDate, seg.StudyTime, seg.StudyID, str(seg.ReferringPhysicianName)) == (
        "2020.02.29", "101112", "S1", "Bunsen",
    )  # fmt: skip
    assert seg.AccessionNumber == "" and "ImageComments" not in seg
    content = (tmp_path / "out" / "manifest.json").read_text() + repr(nib.load(tmp_path / "out" / "scan.nii.gz").header)
    assert not any(secret in content for secret in SECRETS)


def test_names_in_several_alphabets(run: Path, predict: Predict, tmp_path: Path) -> None:
    def japanese(image: Dataset) -> None:
        image.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        image.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"

    assert predict(run, write_slices(tmp_path / "scan", change=japanese))[0] == 0
    seg = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm")
    assert str(seg.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"


def test_the_table_in_the_plan_and_class_names_of_any_kind(predict: Predict, tmp_path: Path) -> None:
    names = ["mon\\ster " + "x" * 80, "腎臓"]
    table = {
        names[1]: {
            "category": "SCT:85756007 Tissue",
            "type": "99ME:K1 My own kidney",
            "laterality": "SCT:1 Both",
        }
    }
    labels = {"background": 0, names[0]: 5, names[1]: 300}
    run = runnable(tmp_path / "model", labels=labels, segments=table)
    assert predict(run, write_slices(tmp_path / "scan"))[0] == 0
    first, second = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm").SegmentSequence
    assert first.SegmentLabel == "mon/ster " + "x" * 55 and second.SegmentLabel == "腎臓"
    assert code(first.SegmentedPropertyTypeCodeSequence) == ("85756007", "SCT")
    kind = second.SegmentedPropertyTypeCodeSequence
    assert code(kind) == ("K1", "99ME") and kind[0].CodeMeaning == "My own kidney"
    assert kind[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Both"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian's package dicom3tools)")
@pytest.mark.parametrize("writer", WRITERS)
def test_dciodvfy_finds_no_error(run: Path, predict: Predict, tmp_path: Path, writer: str) -> None:
    assert predict(run, WRITERS[writer](tmp_path / "scan", "oblique"))[0] == 0
    done = subprocess.run(["dciodvfy", tmp_path / "out" / "scan.seg.dcm"], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "Segmentation" in said and "Error" not in said


# --- what is missing, and what an earlier call left


def outcome(predict: Predict, *arguments: Any) -> tuple[int, str]:
    status, _, said = predict(*arguments)
    return status, " ".join(said.split())


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_series_without_what_the_object_must_repeat(
    run: Path, predict: Predict, tmp_path: Path, keyword: str
) -> None:
    bad = write_slices(tmp_path / "bad", change=lambda image: delattr(image, keyword))
    good = write_slices(tmp_path / "good")
    status, said = outcome(predict, run, bad, good)
    assert status == 3 and f"its headers lack {keyword}" in said and "bad.nii.gz is finished" in said
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*[mz]")) == [
        "bad.nii.gz", "good.nii.gz", "good.seg.dcm",
    ]  # fmt: skip
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["scans"][0]
    assert (entry["name"], entry["status"]) == ("bad", "failed") and keyword in entry["error"]


def test_slices_of_two_frames_of_reference(run: Path, predict: Predict, tmp_path: Path) -> None:
    def other(image: Dataset) -> None:
        if image.SOPInstanceUID.endswith("3"):
            image.FrameOfReferenceUID = "1.9.9.88"

    status, said = outcome(predict, run, write_slices(tmp_path / "scan", change=other))
    assert status == 2 and "its slices differ in FrameOfReferenceUID" in said
    assert (tmp_path / "out" / "scan.nii.gz").exists()


def test_headers_that_highdicom_does_not_accept_are_not_quoted(run: Path, predict: Predict, tmp_path: Path) -> None:
    def private(image: Dataset) -> None:
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.999.4711"

    status, said = outcome(predict, run, write_slices(tmp_path / "scan", change=private))
    assert status == 2 and "highdicom does not accept its headers (KeyError)" in said


def test_a_scan_that_is_not_dicom_keeps_its_mask(run: Path, predict: Predict, tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "scan.nii.gz", STORED)
    for _ in range(2):  # predicted, and then found
        status, said = outcome(predict, run, scan)
        assert status == 2 and "scan.seg.dcm was not written: the scan is not DICOM" in said
        assert (tmp_path / "out" / "scan.nii.gz").exists()


def test_without_highdicom_nothing_is_predicted(
    run: Path, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, said = outcome(predict, run, write_slices(tmp_path / "scan"))
    assert status == 2 and "pip install 'medseg-supcon[dicom-seg]'" in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_mask_and_the_next_call_only_adds_the_object(
    run: Path, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = write_slices(tmp_path / "scan")
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".seg.dcm"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as faults:
        faults.setattr("os.replace", full)
        status, said = outcome(predict, run, series)
    assert status == 2 and "scan.seg.dcm was not written (No space left on device)" in said
    mask = tmp_path / "out" / "scan.nii.gz"
    before = mask.read_bytes()
    monkeypatch.setattr(Predictor, "segment", None)  # would be a TypeError
    assert predict(run, series)[0] == 0
    assert mask.read_bytes() == before and close(
        mask_points(mask), seg_points(tmp_path / "out" / "scan.seg.dcm", [5, 300])
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["summary"] == {"done": 0, "skipped": 1, "failed": 0} and not manifest["scans"][0]["warnings"]


def test_a_mask_of_another_model_is_neither_replaced_nor_signed(run: Path, predict: Predict, tmp_path: Path) -> None:
    series, mask = write_slices(tmp_path / "scan"), tmp_path / "out" / "scan.nii.gz"
    assert predict(run, series)[0] == 0
    (tmp_path / "out" / "scan.seg.dcm").unlink()
    before = mask.read_bytes()
    weights = threshold_weights()
    weights["bias"] += 0.5
    other = runnable(tmp_path / "other", weights=weights)
    status, said = outcome(predict, other, series)
    assert status == 2 and "does not say that this model made it" in said
    assert mask.read_bytes() == before and not (tmp_path / "out" / "scan.seg.dcm").exists()
    assert predict(other, series, "--overwrite")[0] == 0
    assert close(mask_points(mask), seg_points(tmp_path / "out" / "scan.seg.dcm", [5, 300]))


def test_a_new_mask_takes_the_old_object_away(run: Path, predict: Predict, medseg: Predict, tmp_path: Path) -> None:
    series, file = write_slices(tmp_path / "scan"), tmp_path / "out" / "scan.seg.dcm"
    assert predict(run, series)[0] == 0 and file.exists()
    assert predict(run, series)[0] == 0 and file.exists()  # all is there
    options = ("--out", tmp_path / "out", "--overwrite", "--device", "cpu", "--trust")
    assert medseg("predict", run, series, *options)[0] == 0
    assert not file.exists()


def test_the_object_never_replaces_a_slice(run: Path, medseg: Predict, tmp_path: Path) -> None:
    series = write_slices(tmp_path / "scan")
    (series / "0.dcm").rename(series / "scan.seg.dcm")
    before = (series / "scan.seg.dcm").read_bytes()
    for option in ("--dicom-seg", "--overwrite"):
        status, _, said = medseg("predict", run, series, "--out", series, option, "--device", "cpu", "--trust")
        assert status == 2 and "would replace the scan itself" in " ".join(said.split())
    assert (series / "scan.seg.dcm").read_bytes() == before


def test_an_ensemble_names_its_models(predict: Predict, tmp_path: Path) -> None:
    runs = [runnable(tmp_path / name) for name in ("one", "two")]
    assert predict(*runs, write_slices(tmp_path / "scan"))[0] == 0
    seg = pydicom.dcmread(tmp_path / "out" / "scan.seg.dcm")
    said = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert "SHA-256 of one=" in said and "SHA-256 of two=" in said and seg.ManufacturerModelName == "one, two"


@pytest.mark.parametrize("place", ["axial", "oblique"])
def test_regions_that_overlap_are_segments_that_overlap(predict: Predict, tmp_path: Path, place: str) -> None:
    """The core, value 5, and the whole lesion around it: a voxel of the core is in both segments."""
    regions, network = {"whole lesion": [5, 300], "core": [5]}, {**POINTWISE, "out_channels": 2}
    # logits 10 (v - 1) and 20 (v - 1.5): the lesion is above 1, its core above 1.5
    weights = {"weight": torch.tensor([10.0, 20.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([-10.0, -30.0])}
    labels = {"background": 0, "core": 5, "rest": 300}
    more = {"network_def": network, "regions": regions, "regions_class_order": [300, 5], "labels": labels}
    run = runnable(tmp_path / "model", weights=weights, **more)
    series = write_slices(tmp_path / "scan", place)
    assert predict(run, series)[0] == 0
    (mask,) = (tmp_path / "out").glob("*.nii.gz")
    (file,) = (tmp_path / "out").glob("*.seg.dcm")
    expected, image = {}, nib.load(mask)
    voxels = np.asarray(image.dataobj)
    for number, held in enumerate(regions.values(), 1):
        places = [image.affine @ [*index, 1] for index in np.argwhere(np.isin(voxels, held))]
        expected[number] = {rounded((-x, -y, z)) for x, y, z, _ in places}
    assert expected[2] < expected[1]
    seg = highdicom.seg.segread(file)
    assert [one.SegmentLabel for one in seg.SegmentSequence] == list(regions)
    volume = seg.get_volume(combine_segments=False)
    for number, own in expected.items():
        inside = np.argwhere(np.asarray(volume.array)[..., number - 1])
        found = np.array([(volume.affine @ [*index, 1])[:3] for index in inside])
        wanted = np.array(sorted(own))
        assert len(found) == len(wanted)
        assert np.linalg.norm(found[:, None] - wanted[None], axis=-1).min(axis=1).max() < 0.02
