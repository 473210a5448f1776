"""Every fault of a scan or label map is found, named, and does not hide or touch the good cases."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage

from medseg_supcon.datasets import check_dataset, read_dataset
from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import read_scan

AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])
SHEARED = AFFINE + np.array([[0, 0.2, 0, 0], [0] * 4, [0] * 4, [0] * 4])
SHIFTED = AFFINE + np.array([[0, 0, 0, 0.5], [0] * 4, [0] * 4, [0] * 4])
TURNED = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def changed(array, value, where=(0, 0, 0)):
    array = np.array(array)
    array[where] = value
    return array


def one_hot(label, overlap):
    classes = np.stack([label == 1, label == 2], axis=-1).astype(np.uint8)
    if overlap:
        classes[0, 0, 0] = 1
    return classes


def cut(path, bytes_=200):
    path.write_bytes(path.read_bytes()[:-bytes_])


def flip_a_bit(path):
    """Spoil one voxel of a file whose blocks are stored, not compressed: gzip's checksum alone can tell."""
    stored = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    stored[-20] ^= 1
    path.write_bytes(bytes(stored))


def zero_affine(path):
    """Blank the rows of the affine in the file's header (NIfTI-1: srow_x starts at byte 280)."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:328] = bytes(48)
    path.write_bytes(gzip.compress(bytes(content)))


# fault -> (which file, severity, code, what to do to it: (path, data, write) -> None)
FAULTS = {
    "image missing": ("image", "error", "missing", lambda p, d, w: p.unlink()),
    "label missing": ("label", "error", "missing", lambda p, d, w: p.unlink()),
    "image cut short": ("image", "error", "unreadable", lambda p, d, w: cut(p)),
    "image without its checksum": ("image", "error", "unreadable", lambda p, d, w: cut(p, 6)),
    "one bit flipped": ("image", "error", "unreadable", lambda p, d, w: flip_a_bit(p)),
    "label cut short": ("label", "error", "unreadable", lambda p, d, w: cut(p)),
    "image empty file": ("image", "error", "unreadable", lambda p, d, w: p.write_bytes(b"")),
    "image is text": ("image", "error", "unreadable", lambda p, d, w: p.write_text("no scan")),
    "label is text": ("label", "error", "unreadable", lambda p, d, w: p.write_text("no label map")),
    "image is a folder": ("image", "error", "unreadable", lambda p, d, w: (p.unlink(), p.mkdir())),
    "gzip of nonsense": (
        "image",
        "error",
        "unreadable",
        lambda p, d, w: p.write_bytes(b"\x1f\x8b\x08" + b"x" * 400),
    ),
    "colours": (
        "image",
        "error",
        "unreadable",
        lambda p, d, w: w(p, np.zeros(d.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    ),
    "complex": ("image", "error", "unreadable", lambda p, d, w: w(p, d.astype(np.complex64))),
    "image 2-D": ("image", "error", "not_3d", lambda p, d, w: w(p, d[..., 0])),
    "image 4-D": ("image", "error", "not_3d", lambda p, d, w: w(p, np.stack([d, d + 1], -1))),
    "image 5-D": ("image", "error", "not_3d", lambda p, d, w: w(p, np.stack([d, d], -1)[..., None, :])),
    "label 2-D": ("label", "error", "not_3d", lambda p, d, w: w(p, d[..., 0])),
    "label one-hot": ("label", "error", "one_hot_label", lambda p, d, w: w(p, one_hot(d, False))),
    "label overlaps": ("label", "error", "overlapping_labels", lambda p, d, w: w(p, one_hot(d, True))),
    "label smaller": ("label", "error", "shape_mismatch", lambda p, d, w: w(p, d[:-1])),
    "label transposed": ("label", "error", "shape_mismatch", lambda p, d, w: w(p, d.transpose(1, 0, 2))),
    "label shifted": ("label", "error", "affine_mismatch", lambda p, d, w: w(p, d, SHIFTED)),
    "label turned": ("label", "error", "affine_mismatch", lambda p, d, w: w(p, d, TURNED)),
    "label scaled": ("label", "error", "affine_mismatch", lambda p, d, w: w(p, d, np.diag([1, 1, 2.0, 1]))),
    "one NaN": ("image", "error", "not_finite", lambda p, d, w: w(p, changed(d, np.nan))),
    "one Inf": ("image", "error", "not_finite", lambda p, d, w: w(p, changed(d, np.inf))),
    "label NaN": ("label", "error", "not_finite", lambda p, d, w: w(p, changed(d.astype("f4"), np.nan))),
    "one beyond float32": (
        "image",
        "error",
        "not_finite",
        lambda p, d, w: w(p, changed(d.astype("f8"), 1e300)),
    ),
    "one of 1e20": (
        "image",
        "warning",
        "outlier_voxels",
        lambda p, d, w: w(p, changed(d.astype("f4"), 1e20)),
    ),
    "constant": ("image", "error", "constant_image", lambda p, d, w: w(p, np.full(d.shape, 7, "i2"))),
    "undeclared": ("label", "error", "undeclared_label", lambda p, d, w: w(p, changed(d, 9))),
    "negative": ("label", "error", "undeclared_label", lambda p, d, w: w(p, changed(d.astype("i2"), -3))),
    "huge": ("label", "error", "undeclared_label", lambda p, d, w: w(p, changed(d.astype("f8"), 3e9))),
    "fraction": ("label", "error", "fractional_label", lambda p, d, w: w(p, changed(d.astype("f4"), 0.4))),
    "singular affine": ("image", "error", "bad_affine", lambda p, d, w: zero_affine(p)),
    "label is image": ("list", "error", "label_is_image", None),
    "duplicate": ("twin", "error", "duplicate_image", None),
    "empty label": ("label", "warning", "empty_label", lambda p, d, w: w(p, np.zeros_like(d))),
    "sheared": ("both", "error", "sheared", lambda p, d, w: w(p, d, SHEARED)),
    "single slice": ("both", "warning", "single_slice", lambda p, d, w: w(p, d[:, :, 3:4])),
    "spacing": ("both", "warning", "spacing_outlier", lambda p, d, w: w(p, d, np.diag([1, 1, 3.0, 1]))),
    "size": ("both", "warning", "size_outlier", lambda p, d, w: w(p, np.tile(d, (3, 1, 1)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_named(tmp_path, disk, fault):
    which, severity, code, damage = FAULTS[fault]
    root = disk.decathlon(tmp_path, cases=5)
    files = {"image": root / "imagesTr/case_2.nii.gz", "label": root / "labelsTr/case_2.nii.gz"}
    if which == "list":
        content = json.loads((root / "dataset.json").read_text())
        content["training"][2]["label"] = content["training"][2]["image"]
        disk.json(root / "dataset.json", content)
    elif which == "twin":
        scan = nibabel.load(root / "imagesTr/case_0.nii.gz").get_fdata()
        disk.nifti(files["image"], scan.astype(np.float64))  # other bytes on disk, the same voxels
    else:
        for kind in files if which == "both" else [which]:
            path = files[kind]
            damage(path, np.asanyarray(nibabel.load(path).dataobj), disk.nifti)
    report = check_dataset(read_dataset(root))
    found = [f for f in report.findings if f.code == code]
    assert found, f"{[(f.code, f.message) for f in report.findings]}"
    assert {f.case for f in report.findings} == {"case_2"}, "the good cases are clean"
    assert found[0].severity == severity
    assert str(found[0].file) in found[0].message
    assert found[0].message.endswith(".") or "chmod" in found[0].message
    assert report.has_errors == (severity == "error")


def test_nothing_to_learn_is_an_error(tmp_path, disk):
    """`medseg train` refuses such data, so `medseg check` must report it."""
    root = disk.decathlon(tmp_path, cases=3)
    for path in (root / "labelsTr").iterdir():
        disk.nifti(path, np.zeros(nibabel.load(path).shape, np.uint8))
    report = check_dataset(read_dataset(root))
    assert [f.code for f in report.errors] == ["no_structure"]
    assert [f.code for f in report.findings if f.severity == "warning"] == ["empty_label"] * 3


def test_a_good_data_set_is_clean(tmp_path, disk):
    for root in (disk.decathlon(tmp_path / "d"), disk.nnunet(tmp_path / "n")):
        report = check_dataset(read_dataset(root))
        assert report.findings == ()
        assert "no problems found" in report.summary()
    four = disk.decathlon(tmp_path / "f", channels=["a", "b", "c"])
    assert not check_dataset(read_dataset(four)).findings


def test_trailing_axis_of_one_and_slight_rounding_are_fine(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    scan, label = disk.scan_and_label(0)
    disk.nifti(root / "imagesTr/case_0.nii.gz", scan[..., None])
    near = AFFINE.copy()
    near[0, 3] += 1e-4
    disk.nifti(root / "labelsTr/case_0.nii.gz", label.astype(np.float32)[..., None], near)
    assert not check_dataset(read_dataset(root)).findings


def test_affine_mismatch_can_be_allowed(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    _, label = disk.scan_and_label(1)
    disk.nifti(root / "labelsTr/case_1.nii.gz", label, SHIFTED)
    report = check_dataset(read_dataset(root), allow_affine_mismatch=True)
    assert [(f.code, f.severity) for f in report.findings] == [("affine_mismatch", "warning")]
    assert "0.5 mm" in report.findings[0].message


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_channel_counts(tmp_path, disk, layout):
    if layout == "decathlon":
        root = disk.decathlon(tmp_path, channels=["a", "b", "c"])
        scan, _ = disk.scan_and_label(2, channels=2)
        disk.nifti(root / "imagesTr/case_2.nii.gz", scan)
    else:
        root = disk.nnunet(tmp_path)
        disk.nifti(root / "imagesTr/case_2_0002.nii.gz", disk.scan_and_label(77)[0])
    report = check_dataset(read_dataset(root))
    assert [(f.case, f.code) for f in report.errors] == [("case_2", "channels")]
    expected = "2 channels, but the data set has 3" if layout == "decathlon" else "3 channels, but the data set has 2"
    assert expected in report.errors[0].message


def test_channels_of_one_case_must_share_a_grid(tmp_path, disk):
    root = disk.nnunet(tmp_path)
    scan, _ = disk.scan_and_label(1)
    disk.nifti(root / "imagesTr/case_1_0001.nii.gz", scan[:-2])
    disk.nifti(root / "imagesTr/case_2_0001.nii.gz", scan + 1, SHIFTED)
    (root / "imagesTr/case_3_0001.nii.gz").unlink()
    found = {(f.case, f.code) for f in check_dataset(read_dataset(root)).errors}
    assert found == {("case_1", "shape_mismatch"), ("case_2", "affine_mismatch"), ("case_3", "missing")}


def test_ignore_label_and_float_values_are_declared_values(tmp_path, disk):
    root = disk.decathlon(tmp_path, labels={"0": "background", "0.5": "a", "4": "b", "255": "ignore"})
    for number in range(4):
        _, label = disk.scan_and_label(number)
        label[:, :, 7] = 3
        values = np.array([0, 0.5, 4, 255], np.float32)[label]
        disk.nifti(root / f"labelsTr/case_{number}.nii.gz", values)
    assert not check_dataset(read_dataset(root)).findings


def test_a_class_that_nobody_drew(tmp_path, disk):
    labels = {"0": "background", "1": "tumour", "2": "vessel", "3": "stone"}
    report = check_dataset(read_dataset(disk.decathlon(tmp_path, labels=labels)))
    assert [(f.case, f.severity, f.code) for f in report.findings] == [("", "warning", "absent_class")]
    assert "stone" in report.findings[0].message


def test_several_faults_at_once_reach_json_and_table(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    (root / "imagesTr/case_0.nii.gz").unlink()
    cut(root / "labelsTr/case_1.nii.gz")
    _, label = disk.scan_and_label(2)
    disk.nifti(root / "labelsTr/case_2.nii.gz", np.zeros_like(label))
    report = check_dataset(read_dataset(root))
    content = json.loads(json.dumps(report.to_dict()))
    assert (content["cases"], content["errors"], content["warnings"]) == (4, 2, 1)
    assert [f.case for f in report.findings] == ["case_0", "case_1", "case_2"]
    assert [f.severity for f in report.findings] == ["error", "error", "warning"]
    assert "2 errors, 1 warning" in report.summary()
    *lines, last = str(report).splitlines()
    assert last == report.summary() and len(lines) == 3
    assert all(finding.message in line for finding, line in zip(report.findings, lines, strict=True))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_2_is_read_like_nifti_1(tmp_path, disk, ending):
    items = []
    for number in range(2):
        scan, label = disk.scan_and_label(number)
        item = {"image": f"images/{number}{ending}", "label": f"labels/{number}{ending}"}
        for path, data in zip(item.values(), (scan, label), strict=True):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti2Image(data, AFFINE), tmp_path / path)
        items.append(item)
    dataset = read_dataset(disk.json(tmp_path / "list.json", {"training": items}))
    assert dataset.labels == {"background": 0, "label 1": 1, "label 2": 2}
    assert not check_dataset(dataset).findings


@pytest.mark.parametrize("code", [1, 3])
def test_lengths_in_another_unit_are_an_error(tmp_path, disk, code):
    root = disk.decathlon(tmp_path)
    path = root / "imagesTr/case_1.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[123] = code | 8  # xyzt_units: metres or microns, seconds
    path.write_bytes(gzip.compress(bytes(content)))
    report = check_dataset(read_dataset(root))
    assert [(f.case, f.code) for f in report.errors] == [("case_1", "unit")]
    assert "expected mm" in report.errors[0].message


def with_forms(path, data, qform, sform, codes, pixdim=None):
    """A NIfTI-1 file whose forms are written into its bytes, as no library checks them."""
    image = nibabel.Nifti1Image(data, np.eye(4))
    image.set_qform(np.asarray(qform), 1)
    content = bytearray(image.to_bytes())
    content[252:256] = struct.pack("<2h", *codes)
    content[280:328] = np.asarray(sform, "<f4")[:3].tobytes()
    if pixdim is not None:
        content[80:92] = struct.pack("<3f", *pixdim)
    path.write_bytes(gzip.compress(bytes(content)))


FLIPPED = np.diag([-1.0, 1, 1, 1])
# (qform, sform, codes of both, pixdim or that of the qform): what check says of scan and label map
FORMS = {
    "alike": (AFFINE, AFFINE, (1, 1), None, set()),
    "sform alone": (FLIPPED, AFFINE, (0, 1), None, set()),
    "qform alone": (FLIPPED, AFFINE, (1, 0), None, set()),
    "sizes rounded": (AFFINE, AFFINE, (1, 1), (1.004, 1.0, 1.0), set()),
    "sform of 2 mm": (AFFINE, np.diag([2.0, 2, 2, 1]), (1, 1), None, {("error", "two_voxel_sizes")}),
    "sform of 2 mm alone": (AFFINE, np.diag([2.0, 2, 2, 1]), (0, 1), None, {("error", "two_voxel_sizes")}),
    "2 % longer": (AFFINE, np.diag([1.02, 1, 1, 1]), (1, 1), None, {("error", "two_voxel_sizes")}),
    "left is right": (FLIPPED, AFFINE, (1, 1), None, {("warning", "forms_disagree")}),
    "left is right and rounded": (
        FLIPPED,
        np.diag([1.004, 1, 1, 1]),
        (1, 1),
        None,
        {("error", "two_places")},
    ),
    "shifted": (SHIFTED, AFFINE, (1, 2), None, {("warning", "forms_disagree")}),
    "no codes": (AFFINE, AFFINE, (0, 0), None, {("warning", "no_orientation")}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_header_that_says_two_things_about_place_or_none(tmp_path, disk, name):
    *forms, expected = FORMS[name]
    root = disk.decathlon(tmp_path, cases=5)
    scan, label = disk.scan_and_label(2)
    files = {"image": root / "imagesTr/case_2.nii.gz", "label": root / "labelsTr/case_2.nii.gz"}
    for kind, data in (("image", scan), ("label", label)):
        with_forms(files[kind], data, *forms)
    report = check_dataset(read_dataset(root))
    own = [f for f in report.findings if not f.code.endswith("_outlier")]
    assert {(f.severity, f.code) for f in own} == expected
    assert {f.case for f in report.findings} <= {"case_2"}
    told = [f.file for f in own]
    assert told == (list(files.values()) if expected and name != "no codes" else [files["image"]] * len(own))
    if ("error", "two_voxel_sizes") in expected:
        sizes = " x ".join(f"{float(v):.4g}" for v in np.diag(forms[1])[:3])
        assert f"{sizes} in its sform, but 1 x 1 x 1 in its pixdim" in own[0].message


@pytest.mark.parametrize("name", FORMS)
def test_what_check_passes_is_trained_where_it_lies(tmp_path, disk, name):
    """Without an error, the place that training reads is that of nibabel, to 1 %; with one, it is not."""
    *forms, expected = FORMS[name]
    with_forms(tmp_path / "a.nii.gz", disk.scan_and_label(2)[0], *forms)
    trained = LoadImage("NibabelReader", image_only=True)(tmp_path / "a.nii.gz").affine.numpy()
    same = np.allclose(trained, nibabel.load(tmp_path / "a.nii.gz").affine, atol=0.01)
    assert same != any(severity == "error" for severity, _ in expected)


@pytest.mark.parametrize("degrees", [0, 0.3, -0.5, 0.7, -5, 17])
@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (2, 1)])
def test_check_and_predict_draw_one_line_for_shear(tmp_path, disk, degrees, axes):
    """An axis tilted by a known angle, on a turned grid of 1 x 1.5 x 3 mm, passes both below 0.6 degrees or neither."""
    tilt = np.eye(4)
    tilt[axes] = np.sin(np.radians(degrees))
    tilt[axes[1], axes[1]] = np.cos(np.radians(degrees))
    affine = TURNED @ tilt @ np.diag([1, 1.5, 3, 1])
    root = disk.decathlon(tmp_path, cases=2)
    for folder, data in zip(("imagesTr", "labelsTr"), disk.scan_and_label(1), strict=True):
        disk.nifti(root / folder / "case_1.nii.gz", data, affine)
    errors = check_dataset(read_dataset(root)).errors
    scan = root / "imagesTr" / "case_1.nii.gz"
    if abs(degrees) < 0.6:
        assert not errors
        assert read_scan(find_scans([scan])[0], 1).data.shape == (12, 10, 8)
        return
    assert {(f.case, f.code) for f in errors} == {("case_1", "sheared")}
    assert f"{abs(degrees):.1f} degrees off a right angle" in errors[0].message
    with pytest.raises(DataError, match=f"{abs(degrees):.1f} degrees off a right angle"):
        read_scan(find_scans([scan])[0], 1)


def test_a_patient_whom_the_data_list_trains_and_validates_on(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        for kind, array in (("image", rng.normal(size=(8, 8, 8))), ("label", rng.integers(0, 2, (8, 8, 8)))):
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), AFFINE), tmp_path / f"{kind}{number}.nii.gz")
    items = [
        {"image": f"image{n}.nii.gz", "label": f"label{n}.nii.gz", "patient": who}
        for n, who in enumerate(("ann", "bob", "ann"))
    ]
    listed = {"labels": {"background": 0, "x": 1}, "training": items[:2], "validation": items[2:]}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    (found,) = check_dataset(read_dataset(tmp_path / "list.json")).findings
    assert (found.severity, found.code) == ("warning", "patient_on_both_sides")
    assert "'ann'" in found.message


def codes(dataset):
    return [(f.case, f.severity, f.code) for f in check_dataset(dataset).findings]


def ct_scan(number, change):
    """Air, soft tissue and a bright structure in Hounsfield units, changed as a converter would."""
    rng = np.random.default_rng(number)
    scan = np.full((12, 10, 8), -1000.0)
    scan[2:10, 2:8, 1:7], scan[2:5, 2:5, 2:6] = 40, 160
    return change(scan + rng.normal(0, 12, scan.shape)).astype(np.float32)


CT = {  # how some scans differ -> which are reported
    "not at all": (lambda x: x, [], []),
    "stored from 0 in one": (lambda x: x + 1024, [2], ["intensity_outlier"]),
    "stored from 0 in most": (lambda x: np.maximum(x + 1024, 0), [0, 1, 2, 3], ["intensity_outlier"] * 4),
    "stored from 0 in all": (lambda x: np.maximum(x + 1024, 0), range(6), ["not_hounsfield"]),
    "0 to 1 in one": (lambda x: np.clip((x + 160) / 400, 0, 1), [4], ["intensity_outlier"]),
    "tenths in two": (lambda x: x * 10, [0, 3], ["intensity_outlier"] * 2),
    "shifted down": (lambda x: x - 1024, [5], ["intensity_outlier"]),
    "padding": (lambda x: np.where(np.arange(8) < 2, -3024, x), [1], []),
    "metal": (lambda x: np.where(x > 190, 3000, x), [1], []),
}


@pytest.mark.parametrize("change", CT)
@pytest.mark.parametrize("channel", ["CT", "CTA"])
def test_ct_that_is_not_in_hounsfield_units(tmp_path, disk, change, channel):
    convert, cases, expected = CT[change]
    root = disk.decathlon(tmp_path, cases=6, modality={"0": channel})
    for number in range(6):
        scan = ct_scan(number, convert if number in cases else lambda x: x)
        disk.nifti(root / f"imagesTr/case_{number}.nii.gz", scan)
    found = codes(read_dataset(root))
    assert {code for _, _, code in found} == set(expected)
    if "not_hounsfield" not in expected:
        odd = set(cases) if expected else set()
        if change == "stored from 0 in most":  # those that are right are the outliers, or those that are not
            assert {f"case_{n}" for n in cases} <= {case for case, _, _ in found}
        else:
            assert {case for case, _, _ in found} == {f"case_{n}" for n in odd}


@pytest.mark.parametrize(("factor", "reported"), [(1, False), (500, False), (1e-2, False), (1e6, True), (1e-6, True)])
def test_only_extreme_scales_of_mr_are_reported(tmp_path, disk, factor, reported):
    root = disk.decathlon(tmp_path, cases=5)
    disk.nifti(root / "imagesTr/case_3.nii.gz", disk.scan_and_label(3)[0] * np.float32(factor))
    expected = [("case_3", "warning", "intensity_outlier")] if reported else []
    assert codes(read_dataset(root)) == expected


def draw(root, disk, class_of):
    """Give class 2 to those cases alone for which `class_of` says so."""
    for number in range(4):
        label = disk.scan_and_label(number)[1]
        disk.nifti(root / f"labelsTr/case_{number}.nii.gz", np.where((label == 2) & (not class_of(number)), 0, label))


def test_classes_that_training_cannot_learn(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    draw(root, disk, lambda number: number == 3)
    dataset = read_dataset(root)
    (alone,) = check_dataset(dataset).findings
    assert alone.code == "class_in_one_case" and "'vessel' (value 2, drawn in case_3)" in alone.message
    (never,) = check_dataset(replace(dataset, validation=frozenset(["case_3", "case_1"]))).findings
    assert never.code == "class_not_trained" and "'vessel' (value 2, drawn in case_3)" in never.message
    assert codes(replace(dataset, validation=frozenset(["case_1"]))) == []
    draw(root, disk, lambda number: number > 1)
    assert codes(replace(dataset, validation=frozenset(["case_2", "case_3"]))) == [("", "warning", "class_not_trained")]
    assert codes(dataset) == []


@pytest.mark.parametrize("axes", ["LPS", "PSR", "AIL"])
def test_a_label_map_with_other_axes_at_the_same_place_is_called_turned(tmp_path, disk, axes):
    root = disk.decathlon(tmp_path)
    path = root / "labelsTr/case_1.nii.gz"
    image = nibabel.load(path)
    change = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(change), path)
    (found,) = check_dataset(read_dataset(root)).findings
    assert (found.code, found.severity) == ("turned", "error")
    assert f"its axes are {axes} and the scan's are RAS" in found.message and "mm" not in found.message


@pytest.mark.parametrize("slope", [12 / 255, 0.5, 3.0])
def test_labels_that_the_header_scales(tmp_path, disk, slope):
    root = disk.decathlon(tmp_path)
    path = root / "labelsTr/case_1.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = struct.pack("<2f", slope, 0)
    path.write_bytes(gzip.compress(bytes(content)))
    (found,) = check_dataset(read_dataset(root)).findings
    assert found.code == ("undeclared_label" if slope == 3 else "fractional_label")
    assert f"scl_slope {slope:.6g}" in found.message and "nearest neighbour" not in found.message


def test_scan_and_label_map_swapped(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    items = json.loads((root / "dataset.json").read_text())
    items["training"][2] = {"image": "labelsTr/case_2.nii.gz", "label": "imagesTr/case_2.nii.gz"}
    disk.json(root / "dataset.json", items)
    (found,) = check_dataset(read_dataset(root)).errors
    assert found.case == "case_2" and "swapped" in found.message


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 2.5), (0.7, 0.7, 1.2), (1, 1, 2)])
def test_a_voxel_size_that_got_lost(tmp_path, disk, spacing):
    root = disk.decathlon(tmp_path, cases=5)
    for number in range(1, 5):
        for folder, data in zip(("imagesTr", "labelsTr"), disk.scan_and_label(number), strict=True):
            disk.nifti(root / folder / f"case_{number}.nii.gz", data, np.diag([*spacing, 1]))
    found = [f for f in check_dataset(read_dataset(root)).findings if f.code == "spacing_outlier"]
    assert [f.case for f in found] == ["case_0"]
