"""Folders of masks against folders of label maps: the report, and what is wrong with single cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from typer.testing import CliRunner

from medseg_supcon.cli import app
from medseg_supcon.errors import ConfigError, DataError, RunError
from medseg_supcon.evaluation import MetricsReport, evaluate_folders, summarise, write_metrics

LABELS = {"background": 0, "organ": 1, "lesion": 2}


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.astype(np.uint8), np.diag([1, 1, 2, 1.0]) if affine is None else affine)
    nib.save(image, path)


def labels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (6, 7, 5))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in "abc":
        save(tmp_path / "masks" / f"{name}.nii.gz", labels_of(ord(name)))
        save(tmp_path / "labels" / f"{name}.nii", labels_of(ord(name) + (name == "b")))
    return tmp_path / "masks", tmp_path / "labels"


def test_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = evaluate_folders(*folders, LABELS, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines()))
    assert [(row["case"], row["class"]) for row in rows] == [(c, k) for c in "abc" for k in ("organ", "lesion")]
    organ = [float(row["dice"]) for row in rows if row["class"] == "organ"]
    p, r = labels_of(ord("b")) == 1, labels_of(ord("c")) == 1
    assert organ == [1.0, pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum())), 1.0]
    summary = report["summary"]
    assert summary["classes"]["organ"]["dice"] == pytest.approx(np.mean(organ))
    assert summary["classes"]["organ"]["dice_std"] == pytest.approx(np.std(organ))
    assert summary["classes"]["organ"]["dice_median"] == 1.0
    means = [summary["classes"][name]["dice"] for name in ("organ", "lesion")]
    assert summary["mean"]["dice"] == pytest.approx(np.mean(means))
    assert (summary["cases"], summary["failed"], summary["mean"]["n"]) == (3, 0, 2)
    # Without names the classes are called by their values.
    unnamed = evaluate_folders(*folders)
    assert list(unnamed["summary"]["classes"]) == ["1", "2"]
    assert unnamed["summary"]["mean"] == summary["mean"]


def test_problems_of_single_cases(folders: tuple[Path, Path]) -> None:
    masks, labels = folders
    (masks / "a.nii.gz").unlink()
    save(masks / "b.nii.gz", np.zeros((6, 7, 4)))
    save(masks / "extra.nii.gz", np.zeros((6, 7, 4)))
    for name, affine in (("d", np.diag([1, 1, 2.3, 1.0])), ("e", None)):
        save(masks / f"{name}.nii.gz", labels_of(1), affine)
        save(labels / f"{name}.nii", labels_of(1) + (name == "e") * 5)
    (labels / "f.nii").write_text("no label map")
    save(masks / "f.nii.gz", labels_of(1))
    report = evaluate_folders(masks, labels, LABELS)
    problems = {p["case"]: p["problem"] for p in report["problems"]}
    assert set(problems) == {"a", "b", "d", "e", "f"}
    assert "there is no mask of this name" in problems["a"]
    assert "shape (6, 7, 4)" in problems["b"]
    assert "affines differ" in problems["d"]
    assert "does not declare" in problems["e"]
    assert "damaged" in problems["f"]
    assert report["summary"]["cases"] == 1
    assert report["summary"]["failed"] == 5
    assert report["without_reference"] == ["extra"]


def test_nothing_to_score(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ((folders[0], tmp_path / "missing"), (tmp_path / "empty", folders[1])):
        with pytest.raises(DataError, match=str(tmp_path)):
            evaluate_folders(*arguments)
    save(tmp_path / "others" / "x.nii", labels_of(0))
    with pytest.raises(DataError, match="no case could be scored"):
        evaluate_folders(folders[0], tmp_path / "others")


def test_a_mask_that_is_there_packed_and_unpacked(folders: tuple[Path, Path]) -> None:
    """It is unknown which of the two is meant; one of them may be years old."""
    save(folders[0] / "b.nii", labels_of(0))
    with pytest.raises(DataError, match=r"b\.nii and b\.nii\.gz have the same name\. Keep one"):
        evaluate_folders(*folders, LABELS)


def test_an_ignore_label(tmp_path: Path) -> None:
    reference, mask = labels_of(1), labels_of(1)
    reference[:2], mask[:2] = 255, 0
    save(tmp_path / "m" / "a.nii", mask)
    save(tmp_path / "r" / "a.nii", reference)
    report = evaluate_folders(tmp_path / "m", tmp_path / "r", ignore_label=255)
    assert list(report["summary"]["classes"]) == ["1", "2"]
    assert report["summary"]["mean"]["dice"] == 1.0


def test_values_of_many_digits_are_classes_of_their_own(tmp_path: Path) -> None:
    """Like those of the Allen mouse brain atlas."""
    array = np.zeros((4, 4, 4), dtype=np.int32)
    array[0], array[1] = 614454277, 614454278
    for folder in "mr":
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / "a.nii")
    report = evaluate_folders(tmp_path / "m", tmp_path / "r")
    assert list(report["summary"]["classes"]) == ["614454277", "614454278"]


def row(case: str, dice: float | None, empty: str = "") -> dict[str, Any]:
    score = {
        "case": case,
        "class": "organ",
        "dice": dice,
        "hd95_mm": dice,
        "surface_dice": dice,
        "empty": empty,
    }
    return {**score, "tolerance_mm": 1.0, "volume_ml": 0.0, "reference_volume_ml": 0.0}


def test_empty_classes_are_counted_and_never_nan(tmp_path: Path) -> None:
    rows = [row("a", 0.5), row("b", None, "both"), row("c", 0.0, "prediction")]
    organ = summarise(rows)["classes"]["organ"]
    assert (organ["dice"], organ["n"]) == (0.25, 2)
    assert organ["empty"] == {"both": 1, "prediction": 1, "reference": 0}
    write_metrics([row("a", None, "both")], tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["summary"]["mean"] == {
        "dice": None,
        "hd95_mm": None,
        "surface_dice": None,
        "n": 0,
    }
    assert next(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))["dice"] == ""


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"):
        write_metrics([row("a", 1.0)], tmp_path / "file")


def test_metrics_report_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    report = MetricsReport(tmp_path, LABELS)
    mask = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4))
    other = torch.eye(4)
    other[0, 3] = 2
    pairs = {
        "share one grid": MetaTensor(torch.zeros(1, 4, 4, 5), affine=torch.eye(4)),
        "affines differ": MetaTensor(torch.zeros(1, 4, 4, 4), affine=other),
        "does not declare": MetaTensor(torch.full((1, 4, 4, 4), 7.0), affine=torch.eye(4)),
    }
    for sentence, label in pairs.items():
        with pytest.raises(DataError, match=sentence):
            report.update([{"name": "case", "pred": mask, "label": label}])
    # 5 % of a voxel in each entry of the affine is three voxels at the end of 60.
    wide = MetaTensor(torch.zeros(1, 60, 7, 5), affine=torch.eye(4))
    stretched = MetaTensor(torch.zeros(1, 60, 7, 5), affine=torch.diag(torch.tensor([1.05, 1, 1, 1])))
    with pytest.raises(DataError, match="affines differ"):
        report.update([{"pred": wide, "label": stretched, "name": "wide"}])
    trusting = MetricsReport(tmp_path, LABELS, trust_scan_affine=True)
    trusting.update([{"name": "case", "pred": mask, "label": pairs["affines differ"]}])
    report.update([{"name": "case", "pred": mask, "label": mask}])
    assert np.isnan(report.compute())  # both empty: no score
    report.reset()
    ones = MetaTensor(torch.ones(1, 4, 4, 4), affine=torch.eye(4))
    report.update([{"name": "case", "pred": ones, "label": ones}])
    assert report.compute() == 1.0
    assert json.loads((tmp_path / "metrics.json").read_text())["summary"]["mean"]["dice"] == 1.0


def test_rounding_of_the_scaling_is_no_value_of_its_own(tmp_path: Path) -> None:
    exact = labels_of(1).astype(np.float32)
    rounded = np.where(exact == 1, np.float32(0.9999999), np.where(exact == 2, np.float32(2.0000002), 0))
    for folder, array in (("m", exact), ("r", rounded), ("m2", rounded), ("r2", exact)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / folder / "a.nii")
    scaled = nib.Nifti1Image(exact, np.eye(4))  # stored as integers with a slope: 2 comes back as 1.99996
    scaled.header.set_data_dtype(np.int16)
    (tmp_path / "s").mkdir()
    nib.save(scaled, tmp_path / "s" / "a.nii")
    for masks, maps in (("m", "r"), ("m2", "r2"), ("m2", "r"), ("m", "s")):
        for labels in (LABELS, None):
            report = evaluate_folders(tmp_path / masks, tmp_path / maps, labels)
            assert report["problems"] == []
            assert len(report["summary"]["classes"]) == 2
            assert report["summary"]["mean"]["dice"] == 1.0
    ignored = evaluate_folders(
        tmp_path / "m", tmp_path / "r", {"background": 0, "organ": 1, "lesion": 2}, ignore_label=1
    )
    assert ignored["summary"]["classes"]["lesion"]["dice"] == 1.0
    report = MetricsReport(tmp_path, LABELS)
    pred, label = (MetaTensor(torch.from_numpy(a)[None], affine=torch.eye(4)) for a in (exact, rounded))
    report.update([{"name": "case", "pred": pred, "label": label}])
    assert report.compute() == 1.0


def test_masks_named_as_scans_with_a_channel_suffix(folders: tuple[Path, Path]) -> None:
    masks, maps = folders
    expected = evaluate_folders(masks, maps, LABELS)["rows"]
    for name in "ab":
        (masks / f"{name}.nii.gz").rename(masks / f"{name}_0000.nii.gz")
    save(masks / "c_0000.nii.gz", np.zeros((6, 7, 5)))  # c has a mask of its own
    report = evaluate_folders(masks, maps, LABELS)
    assert (report["rows"], report["problems"]) == (expected, [])
    assert report["without_reference"] == ["c_0000"]
    (maps / "a.nii").rename(maps / "a_0000.nii")  # equal names come first
    report = evaluate_folders(masks, maps, LABELS)
    assert [row["dice"] for row in report["rows"] if row["case"] == "a_0000"] == [1.0, 1.0]


def test_the_command_line_takes_an_ignore_label(tmp_path: Path) -> None:
    reference, mask = labels_of(1), labels_of(1)
    reference[:2], mask[:2] = 255, 0
    save(tmp_path / "m" / "a.nii", mask)
    save(tmp_path / "r" / "a.nii", reference)
    folders = ["--predictions", str(tmp_path / "m"), "--references", str(tmp_path / "r")]
    call = ["evaluate", *folders, "--out", str(tmp_path / "out"), "--ignore-label"]
    assert CliRunner().invoke(app, [*call, "255"], catch_exceptions=False).exit_code == 0
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]
    assert (list(summary["classes"]), summary["mean"]["dice"]) == (["1", "2"], 1.0)
    with pytest.raises(ConfigError, match="--references"):
        CliRunner().invoke(app, ["evaluate", "run", "data", "--ignore-label", "3"], catch_exceptions=False)


def cube(shape: tuple[int, int, int] = (40, 40, 40)) -> np.ndarray:
    array = np.zeros(shape)
    array[15:25, 15:25, 15:25] = 1
    return array


def turned(degrees: float) -> np.ndarray:
    affine = np.eye(4)
    angle = np.radians(degrees)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


# What the affine of the mask is, against the unit matrix; whether each voxel stays within a tenth of its place.
PLACES = {
    "larger voxels": (np.diag([1.09, 1.09, 1.09, 1]), False),
    "turned": (turned(5), False),
    "turned a little": (turned(0.5), False),
    "shifted": (np.array([[1, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), False),
    "rounding": (np.diag([1.0001, 1, 1, 1]), True),
    "turned by rounding": (turned(0.01), True),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_mask_is_scored_where_it_lies(tmp_path: Path, place: str) -> None:
    """SimpleITK says where the farthest voxel of the mask lies; beyond a tenth of a voxel there is no score."""
    affine, near = PLACES[place]
    save(tmp_path / "m" / "a.nii", cube(), affine)
    save(tmp_path / "r" / "a.nii", cube(), np.eye(4))
    images = [sitk.ReadImage(str(tmp_path / folder / "a.nii")) for folder in "mr"]
    ends = [
        [image.TransformIndexToPhysicalPoint((i, j, k)) for i in (0, 39) for j in (0, 39) for k in (0, 39)]
        for image in images
    ]
    apart = np.linalg.norm(np.subtract(*ends), axis=1).max()
    assert near == (apart < 0.1)
    if near:
        assert evaluate_folders(tmp_path / "m", tmp_path / "r")["summary"]["mean"]["dice"] == 1.0
        return
    with pytest.raises(DataError, match="affines differ") as told:
        evaluate_folders(tmp_path / "m", tmp_path / "r")
    said = float(str(told.value).split("is up to ")[1].split(" mm")[0])
    assert apart * 0.99 <= said <= apart * 1.1  # to the edge of the voxel, half a voxel beyond its centre


def test_the_thickness_of_a_single_slice_counts(tmp_path: Path) -> None:
    save(tmp_path / "m" / "a.nii", cube()[:, :, 20:21], np.diag([1, 1, 5, 1.0]))
    save(tmp_path / "r" / "a.nii", cube()[:, :, 20:21], np.eye(4))
    with pytest.raises(DataError, match="affines differ"):
        evaluate_folders(tmp_path / "m", tmp_path / "r")


@pytest.mark.parametrize("units", ["mm mm", "meter meter", "micron micron", "meter mm", "mm micron"])
def test_lengths_are_mm_whatever_the_unit_of_a_header(tmp_path: Path, units: str) -> None:
    """A cube of 10 x 10 x 10 voxels of 1.2 mm has 1.728 ml; one voxel further along x, its surface is 1.2 mm off."""
    per_mm = {"mm": 1.0, "meter": 1e-3, "micron": 1e3}
    for folder, unit, array in zip("mr", units.split(), (cube(), np.roll(cube(), 1, axis=0)), strict=True):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(array.astype(np.uint8), np.diag([1.2 * per_mm[unit]] * 3 + [1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / folder / "a.nii.gz")
    (found,) = evaluate_folders(tmp_path / "m", tmp_path / "r", tolerance_mm=1.5)["rows"]
    assert found["volume_ml"] == pytest.approx(1.728, rel=1e-5)
    assert found["reference_volume_ml"] == pytest.approx(1.728, rel=1e-5)
    assert found["hd95_mm"] == pytest.approx(1.2, rel=1e-5)
    assert found["surface_dice"] == 1.0
    (strict,) = evaluate_folders(tmp_path / "m", tmp_path / "r", tolerance_mm=1.0)["rows"]
    assert strict["surface_dice"] < 1.0


def save_as(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1, 1.5, 2, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array, affine, dtype=array.dtype), path)


@pytest.mark.parametrize("axes", ["LPS", "RSA", "IPL"])
def test_a_mask_whose_axes_run_otherwise_is_scored_at_its_place(tmp_path: Path, axes: str) -> None:
    expected = evaluate_folders_of(tmp_path / "same", labels_of(1).astype(np.uint8), labels_of(2).astype(np.uint8))
    image = nib.Nifti1Image(labels_of(1).astype(np.uint8), np.diag([1, 1.5, 2, 1.0]))
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    folder = tmp_path / "turned"
    (folder / "m").mkdir(parents=True)
    nib.save(image.as_reoriented(change), folder / "m" / "a.nii.gz")
    save_as(folder / "r" / "a.nii.gz", labels_of(2).astype(np.uint8))
    assert evaluate_folders(folder / "m", folder / "r")["rows"] == expected["rows"]


def evaluate_folders_of(folder: Path, mask: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    save_as(folder / "m" / "a.nii.gz", mask)
    save_as(folder / "r" / "a.nii.gz", reference)
    return evaluate_folders(folder / "m", folder / "r", out=folder / "out")


@pytest.mark.parametrize(
    ("masks", "maps", "words"),
    [
        ([0, 1, 3], [0, 1, 4], ["hold 1, 3,", "hold 1, 4."]),
        ([0, 255, 0], [0, 1, 0], ["hold 255,", "hold 1."]),
        ([0, 1, 0], [0, 1, 2], ["hold 1,", "hold 1, 2."]),
        ([0, 0, 0], [0, 1, 2], ["no structure", "hold 1, 2."]),
        ([0, 1, 2], [0, 1, 2], []),
    ],
)
def test_values_of_one_side_only_are_named(tmp_path: Path, masks: list[int], maps: list[int], words: list[str]) -> None:
    report = evaluate_folders_of(tmp_path, *(np.array(v, np.uint8)[labels_of(1)] for v in (masks, maps)))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["warnings"] == report["warnings"]
    assert len(report["warnings"]) == bool(words)
    assert all(word in report["warnings"][0] for word in words)
    folders = ["--predictions", str(tmp_path / "m"), "--references", str(tmp_path / "r")]
    result = CliRunner().invoke(app, ["evaluate", *folders, "--out", str(tmp_path / "cli")], catch_exceptions=False)
    assert result.exit_code == 0 and all(word in result.output for word in words)


def test_the_ignore_label_is_not_a_value_of_one_side(tmp_path: Path) -> None:
    save_as(tmp_path / "m" / "a.nii.gz", labels_of(1).astype(np.uint8))
    save_as(tmp_path / "r" / "a.nii.gz", np.where(labels_of(3) == 0, 9, labels_of(1)).astype(np.uint8))
    assert evaluate_folders(tmp_path / "m", tmp_path / "r", ignore_label=9)["warnings"] == []


@pytest.mark.parametrize("values", [[0, 0.1, 0.9], [0, 0.5, 1], [0, 1.002, 2], [0, 1e-2, 3e-2]])
@pytest.mark.parametrize("side", ["m", "r"])
def test_fractions_are_refused(tmp_path: Path, values: list[float], side: str) -> None:
    for name in "ab":
        for folder in "mr":
            save_as(tmp_path / folder / f"{name}.nii.gz", labels_of(1).astype(np.uint8))
    save_as(tmp_path / side / "b.nii.gz", np.array(values, np.float32)[labels_of(1)])
    report = evaluate_folders(tmp_path / "m", tmp_path / "r")
    (problem,) = report["problems"]
    assert problem["case"] == "b" and f"{values[1]:.4g}" in problem["problem"] and "fractions" in problem["problem"]
    assert list(report["summary"]["classes"]) == ["1", "2"]


def test_a_scan_in_place_of_a_mask(tmp_path: Path) -> None:
    scan = np.arange(20**3).reshape(20, 20, 20).astype(np.int32)
    for name in "ab":
        for folder in "mr":
            save_as(tmp_path / folder / f"{name}.nii.gz", (scan % 3).astype(np.uint8))
    save_as(tmp_path / "m" / "b.nii.gz", scan)
    (problem,) = evaluate_folders(tmp_path / "m", tmp_path / "r")["problems"]
    assert "8000 different values" in problem["problem"]


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.float64])
def test_neighbouring_values_of_many_digits(tmp_path: Path, dtype: type) -> None:
    reference = np.array([0, 614454276, 614454277], dtype)[labels_of(1)]
    mask = np.array([0, 614454277, 614454276], dtype)[labels_of(1)]
    report = evaluate_folders_of(tmp_path, mask, reference)
    assert list(report["summary"]["classes"]) == ["614454276", "614454277"]
    assert report["summary"]["mean"]["dice"] == 0
    report = MetricsReport(tmp_path, {"background": 0, "a": 614454276, "b": 614454277})
    item = MetaTensor(torch.from_numpy(reference.astype(np.float64))[None], affine=torch.eye(4))
    report.update([{"name": "case", "pred": item, "label": item}])
    assert report.compute() == 1.0
    assert all(row["reference_volume_ml"] > 0 for row in report.rows)
