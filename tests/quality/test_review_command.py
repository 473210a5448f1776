"""``medseg review``: which masks, scans and label maps it brings together, and what it says."""

from __future__ import annotations

import base64
import gzip
import json
import locale
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.datasets import PHANTOM_LABELS
from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.quality import Entry, folder_entries, write_page, write_pictures
from medseg_supcon.scans import Grid, Scan, Volume


def content(page: Path) -> tuple[dict[str, Any], list[bytes]]:
    """What is in a page: its data and the voxels of each scan."""
    text = page.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    blobs = re.findall(r'<script type="text/plain" id="volume\d+">(.*?)</script>', text)
    return json.loads(data[1]), [gzip.decompress(base64.b64decode(blob)) for blob in blobs]


def save(file: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), file)
    return file


@pytest.fixture
def masks(phantoms: Path, tmp_path: Path) -> Path:
    """Label maps of the training phantoms, as masks without a manifest; the scans are beside them."""
    shutil.copytree(phantoms / "imagesTr", tmp_path / "imagesTr")
    return shutil.copytree(phantoms / "labelsTr", tmp_path / "masks")


def test_a_folder_without_a_manifest(medseg, masks, phantoms, tmp_path):
    page = tmp_path / "new" / "page.html"
    code, shown, error = medseg("review", masks, "--references", phantoms / "labelsTr", "--out", page)
    assert code == 0 and "6 masks" in shown and str(page) in shown and error == ""
    assert re.search(r"(src|href)=|url\(|@import", page.read_text()) is None  # nothing to load
    data, blobs = content(page)
    assert [row["mean"] for row in data["rows"]] == [1.0] * 6 and len(blobs) == 6
    assert [one["name"] for one in data["classes"]] == [str(v) for v in PHANTOM_LABELS.values() if v]
    file = masks / "phantom_02.nii.gz"
    mask = nibabel.as_closest_canonical(nibabel.load(file))
    scan = nibabel.as_closest_canonical(nibabel.load(phantoms / "imagesTr" / file.name))
    number, row = next((k, row) for k, row in enumerate(data["rows"]) if row["name"] == "phantom_02")
    assert row["shape"] == list(mask.shape) and row["notes"] == []
    assert np.allclose(row["spacing"], mask.header.get_zooms(), atol=1e-4)
    grey, shown_mask, reference = np.frombuffer(blobs[number], np.uint8).reshape(3, -1)
    expected = np.asarray(mask.dataobj).ravel("F")
    assert np.array_equal(shown_mask, expected) and np.array_equal(reference, expected)
    values = np.asarray(scan.dataobj).ravel("F").astype(float)
    apart, levels = np.abs(np.array(row["levels"])[grey] - values) / np.ptp(values), row["levels"]
    assert apart[(values > levels[0]) & (values < levels[-1])].max() < 0.04 and np.median(apart) < 0.002
    voxel = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    assert np.allclose(row["volumes"], [(expected == v).sum() * voxel for v in range(1, 6)], atol=1e-4)


def test_what_predict_wrote(medseg, trained_run, phantoms, tmp_path):
    scans = tmp_path / "elsewhere"
    shutil.copytree(phantoms / "imagesTs", scans)
    (scans / "broken.nii.gz").write_bytes(b"damaged")
    assert medseg("predict", trained_run, scans, "--out", tmp_path / "masks", "--device", "cpu")[0] == 3
    page = tmp_path / "page.html"
    code, _, error = medseg("review", tmp_path / "masks", "--out", page)
    assert code == 2 and "--scans" in error and not page.exists()
    code, shown, error = medseg("review", tmp_path / "masks", "--scans", scans, "--out", page)
    assert code == 0 and "2 masks" in shown and "broken has no mask" in error
    data, _ = content(page)
    assert [one["name"] for one in data["classes"]] == list(PHANTOM_LABELS)[1:]
    manifest = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    entries = {one["name"]: one for one in manifest["scans"]}
    for row in data["rows"]:
        facts = entries[row["name"]]
        assert np.allclose(row["volumes"], [one["volume_ml"] for one in facts["labels"].values()], atol=1e-3)
        assert row["warnings"] == facts["warnings"] and row["levels"] is not None
    code, _, error = medseg("review", tmp_path / "masks", "--scans", scans, "--out", page)
    assert code == 2 and "already exists. Replace it with --overwrite" in error


def test_the_worst_of_many(medseg, masks, tmp_path):
    means = {"phantom_01": ("good", 0.9), "phantom_03": ("reject", 0.4), "phantom_04": ("review", 0.6)}
    means |= {"phantom_05": ("reject", 0.2)}
    scans = [
        {"name": name, "quality": {"verdict": verdict, "dice": {"mean": mean}}}
        for name, (verdict, mean) in means.items()
    ]
    (masks / "manifest.json").write_text(json.dumps({"labels": PHANTOM_LABELS, "scans": scans}))
    page = tmp_path / "page.html"
    code, shown, error = medseg("review", masks, "--out", page, "--most", 4)
    assert code == 0 and "2 reject, 1 review" in shown and "4 of 6 masks" in error
    # without a verdict before good ones
    assert [row["name"] for row in content(page)[0]["rows"]] == ["phantom_05", "phantom_03", "phantom_04", "phantom_02"]


def test_faults_are_sentences(medseg, masks, tmp_path):
    page = tmp_path / "page.html"
    (tmp_path / "nothing").mkdir()
    for words, says in (
        ((tmp_path / "no",), "not a folder"),
        ((tmp_path / "nothing",), "holds no NIfTI file"),
        ((masks, "--references", tmp_path / "no"), "not a folder"),
        ((masks, "--scans", tmp_path / "no"), "--scans"),
    ):
        code, _, error = medseg("review", *words, "--out", page)
        assert code == 2 and says in error, words
    for text in ("[]", '{"scans": 3}', '{"scans": [], "labels": {"a": "x"}}', "{", '{"labels": {}}'):
        (masks / "manifest.json").write_text(text)
        code, _, error = medseg("review", masks, "--out", page)
        assert code == 2 and "manifest.json" in error, text
    assert not page.exists()


def test_some_that_cannot_be_shown(medseg, masks, tmp_path):
    """A damaged mask, one of another scan, a scan that is damaged, and one whose scan is missing."""
    (masks / "phantom_01.nii.gz").write_bytes(b"damaged")
    shutil.copy(masks / "phantom_03.nii.gz", masks / "phantom_02.nii.gz")
    (tmp_path / "imagesTr" / "phantom_04.nii.gz").write_bytes(b"damaged")
    (tmp_path / "imagesTr" / "phantom_05.nii.gz").unlink()
    page = tmp_path / "page.html"
    code, shown, error = medseg("review", masks, "--out", page)
    assert code == 3 and "5 masks" in shown and "phantom_01.nii.gz" in error
    (masks / "manifest.json").write_text(json.dumps({"labels": PHANTOM_LABELS, "scans": []}))
    code, shown, error = medseg("review", masks, "--out", page, "--overwrite")
    assert code == 3 and "5 masks" in shown and "phantom_01.nii.gz" in error
    rows = {row["name"]: row for row in content(page)[0]["rows"]}
    for name, says in (("02", "shape or affine differs"), ("04", "damaged"), ("05", "not found")):
        assert rows[f"phantom_{name}"]["levels"] is None and says in rows[f"phantom_{name}"]["notes"][0]
    assert rows["phantom_03"]["levels"] is not None


def test_large_scans_are_cropped_and_downsampled(tmp_path):
    """Where each voxel of the page is: a mask and a scan that say their own place."""
    shape = (260, 200, 170)
    place = np.arange(shape[0], dtype=np.float32)[:, None, None] + np.zeros(shape, np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[100:180, 60:140, 50:120] = 1
    files = [save(tmp_path / f"{name}.nii", data) for name, data in (("mask", mask), ("scan", place))]
    page = tmp_path / "page.html"
    entries = [Entry(str(k), files[0], Scan("s", (files[1],))) for k in range(12)]
    result = write_page(page, entries[:1], {"background": 0, "organ": 1})
    assert result["problems"] == []
    data, blobs = content(page)
    row = data["rows"][0]
    assert "cropped around the mask: 160 x 160 x 140 of 260 x 200 x 170" in row["notes"][0]
    grey, shown = (part.reshape(row["shape"], order="F") for part in np.frombuffer(blobs[0], np.uint8).reshape(2, -1))
    assert row["volumes"] == [80 * 80 * 70 / 1000] and shown.sum() == 80 * 80 * 70
    assert np.abs(np.array(row["levels"])[grey[:, 0, 0]] - np.arange(60, 220)).max() < 1
    write_page(page, entries, {"background": 0, "organ": 1})
    data, blobs = content(page)
    row = data["rows"][0]
    steps = np.array(row["spacing"])
    assert "downsampled by" in row["notes"][0] and np.prod(row["shape"]) <= 3_000_000 and page.stat().st_size < 60e6
    grey, shown = (part.reshape(row["shape"], order="F") for part in np.frombuffer(blobs[0], np.uint8).reshape(2, -1))
    assert abs(shown.sum() * np.prod(steps) / (80 * 80 * 70) - 1) < 0.1
    middles = 60 + (np.arange(row["shape"][0]) + 0.5) * steps[0] - 0.5
    assert np.abs(np.array(row["levels"])[grey[:, 0, 0]] - middles).max() < 1


def test_a_mask_with_other_axes_and_a_scan_of_another_format(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 2, 3, 1])
    mask = (rng.random((9, 8, 7)) > 0.5).astype(np.uint8)
    scan = rng.normal(size=mask.shape).astype(np.float32)
    turned = np.array([[0, 0, -1.0, 8], [2, 0, 0, 0], [0, -3, 0, 18], [0, 0, 0, 1]])  # voxel (y, z, x), two mirrored
    file = save(tmp_path / "turned.nii", np.moveaxis(mask, 0, 2)[:, ::-1, ::-1], turned)
    image = SimpleITK.GetImageFromArray(scan.T)
    image.SetSpacing((1, 2, 3))
    image.SetDirection(np.diag([-1.0, -1, 1]).ravel())  # LPS to RAS
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mha"))
    reference = save(tmp_path / "reference.nii", mask, affine)
    entry = Entry("x", file, Scan("x", (tmp_path / "scan.mha",), "itk"), reference)
    write_page(tmp_path / "page.html", [entry], {"background": 0, "organ": 1})
    data, blobs = content(tmp_path / "page.html")
    row = data["rows"][0]
    assert row["notes"] == [] and row["mean"] == 1 and row["spacing"] == [1, 2, 3]
    grey, shown, truth = (p.reshape(row["shape"], order="F") for p in np.frombuffer(blobs[0], np.uint8).reshape(3, -1))
    assert np.array_equal(shown, mask) and np.array_equal(truth, mask)
    assert np.corrcoef(np.array(row["levels"])[grey].ravel(), scan.ravel())[0, 1] > 0.999
    assert write_pictures(tmp_path / "pictures", [entry], {"background": 0, "organ": 1}) == []
    assert (tmp_path / "pictures" / "x.png").read_bytes()[:4] == b"\x89PNG"
    lost = write_pictures(tmp_path / "pictures", [Entry("y", file)], {"background": 0, "organ": 1})
    assert len(lost) == 1 and "y" in lost[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_dice_and_volumes(tmp_path_factory, seed):
    """Against loops over the voxels; a value that no class has in the label map does not count."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("dice")
    shape = tuple(rng.integers(1, 5, 3))
    mask, truth = (rng.choice([0, 1, 4], shape).astype(np.int16), rng.choice([0, 1, 4, 99], shape).astype(np.int16))
    files = [save(folder / f"{k}.nii", data) for k, data in enumerate((mask, truth))]
    write_page(folder / "page.html", [Entry("x", files[0], None, files[1])], {"nothing": 0, "one": 1, "four": 4})
    row = content(folder / "page.html")[0]["rows"][0]
    scores = []
    for number, value in enumerate((1, 4)):
        pairs = [
            (a == value, b == value)
            for a, b in zip(mask.flatten().tolist(), truth.flatten().tolist(), strict=True)
            if b != 99
        ]
        total = sum(a + b for a, b in pairs)
        expected = 2 * sum(a and b for a, b in pairs) / total if total else None
        assert row["dice"][number] == (None if expected is None else pytest.approx(expected))
        assert row["volumes"][number] == pytest.approx(sum(v == value for v in mask.flat) / 1000, abs=1e-4)
        scores += [] if expected is None else [expected]
    assert row["mean"] == (pytest.approx(np.mean(scores)) if scores else None)
    assert any("99" in note for note in row["notes"]) == bool((truth == 99).any())


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dice", "mean", "interval", "verdict", "reasons", "one"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_entry_of_a_manifest_gives_a_page(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("any")
    save(folder / "masks" / "x.nii", np.ones((2, 2, 2), np.uint8))
    facts = {"name": "x", "quality": value, "labels": value, "warnings": value, "series": value}
    (folder / "masks" / "manifest.json").write_text(
        json.dumps({"labels": {"none": 0, "one": 1}, "scans": [facts, value, {"name": value}]})
    )
    entries, labels, _ = folder_entries(folder / "masks")
    assert write_page(folder / "page.html", entries, labels)["shown"] == 1


def test_volumes_instead_of_files(tmp_path):
    rng = np.random.default_rng(2)
    mask = (rng.random((6, 5, 4)) > 0.5).astype(np.uint8)
    grid = Grid.at(mask.shape, np.eye(4))
    scan, label = (Volume(data, grid, grid.affine) for data in (rng.normal(size=(6, 5, 4, 2)).astype(np.float32), mask))
    entries = [Entry("x", label, scan, label), Entry("odd", Volume(mask[:3], grid, grid.affine), scan)]
    assert write_page(tmp_path / "page.html", entries, {"background": 0, "organ": 1})["shown"] == 2
    row, odd = content(tmp_path / "page.html")[0]["rows"]
    assert row["notes"] == [] and row["mean"] == 1 and "shape or affine differs" in odd["notes"][0]
    problems = write_pictures(tmp_path, entries, {"background": 0, "organ": 1})
    assert (
        (tmp_path / "x.png").exists() and len(problems) == 1 and "(3, 5, 4)" in problems[0] and len(problems[0]) < 200
    )


def test_too_many_classes_and_no_mask(tmp_path):
    file = save(tmp_path / "x.nii", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(DataError, match="254 classes"):
        write_page(tmp_path / "page.html", [Entry("x", file)], {str(k): k for k in range(300)})
    with pytest.raises(DataError, match="no mask"):
        write_page(tmp_path / "page.html", [], {"background": 0})


def write_dicom(folder: Path, scan: np.ndarray) -> None:
    """A series of int16 slices (X, Y, Z) with voxels of 1 x 1 x 2.5 mm."""
    folder.mkdir(parents=True)
    uid = f"1.2.826.0.1.{folder.name.encode().hex()[:6]}".replace("a", "1").replace("e", "2")
    for z in range(scan.shape[2]):
        image = SimpleITK.GetImageFromArray(scan[None, :, :, z].transpose(0, 2, 1).astype(np.int16))
        for tag, value in {
            "0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": uid, "0008|0018": f"{uid}.{z + 1}",
            "0020|0013": str(z + 1), "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0032": f"0\\0\\{2.5 * z}", "0018|0050": "2.5",
        }.items():  # fmt: skip
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(image)
        locale.setlocale(locale.LC_ALL, before)  # GDCM's writer leaves the process in the locale C


def test_dicom_series_and_channels(medseg, tmp_path):
    """A series under another name than its mask's is known by what predict wrote down; of channels the first is shown."""
    rng = np.random.default_rng(1)
    scans = {name: rng.integers(0, 500, (6, 7, 5)) for name in ("one", "two")}
    for name, scan in scans.items():
        write_dicom(tmp_path / "dicom" / name, scan)
    series = {scan.name: scan.series for scan in find_scans([tmp_path / "dicom"])}
    place = np.diag([-1.0, -1, 2.5, 1])
    masks = {name: (scan > 250).astype(np.uint8) for name, scan in scans.items()}
    save(tmp_path / "masks" / "two.nii.gz", masks["one"], place)  # the other one's name
    entries = [{"name": "two", "series": series["one"]}]
    channels = np.stack([scans["two"], rng.integers(0, 500, (6, 7, 5))], axis=-1).astype(np.int16)
    save(tmp_path / "4d" / "four.nii.gz", channels, place)
    for number in range(2):
        save(tmp_path / "nnunet" / f"single_000{number}.nii", channels[..., number], place)
    for name in ("four", "single"):
        save(tmp_path / "masks" / f"{name}.nii.gz", masks["two"], place)
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps({"labels": {"no": 0, "yes": 1}, "scans": entries}))
    page = tmp_path / "page.html"
    folders = [word for name in ("dicom", "4d", "nnunet") for word in ("--scans", tmp_path / name)]
    code, shown, error = medseg("review", tmp_path / "masks", *folders, "--out", page)
    assert code == 0 and "3 masks" in shown and error == ""
    data, blobs = content(page)
    for row, blob in zip(data["rows"], blobs, strict=True):
        name = "one" if row["name"] == "two" else "two"
        expected = scans[name][::-1, ::-1]  # LPS to RAS
        grey, mask = (part.reshape(row["shape"], order="F") for part in np.frombuffer(blob, np.uint8).reshape(2, -1))
        assert np.array_equal(mask, expected > 250) and row["spacing"] == [1, 1, 2.5]
        assert np.corrcoef(np.array(row["levels"])[grey].ravel(), expected.ravel())[0, 1] > 0.999


def test_the_page_of_predict_shows_the_first_of_several_channel_files(tmp_path):
    rng = np.random.default_rng(1)
    files = [tmp_path / f"scan_000{number}.nii.gz" for number in range(2)]
    channels = [rng.integers(0, 500, (6, 7, 5)).astype(np.int16) for _ in files]
    for file, channel in zip(files, channels, strict=True):
        save(file, channel, np.eye(4))
    save(tmp_path / "mask.nii.gz", (channels[0] > 250).astype(np.uint8), np.eye(4))
    entry = Entry("scan", tmp_path / "mask.nii.gz", Scan("scan", tuple(files)))
    found = write_page(tmp_path / "page.html", [entry], {"no": 0, "yes": 1}, "Two channels")
    assert found["notes"] == found["problems"] == []
    data, (blob,) = content(tmp_path / "page.html")
    (row,) = data["rows"]
    grey = np.frombuffer(blob, np.uint8).reshape(2, -1)[0].reshape(row["shape"], order="F")
    assert np.corrcoef(np.array(row["levels"])[grey].ravel(), channels[0].ravel())[0, 1] > 0.999
