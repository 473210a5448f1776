"""The fingerprint against SimpleITK's geometry and plain loops over nibabel's voxels."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from medseg_supcon.datasets import check_dataset, fingerprint, read_dataset
from medseg_supcon.errors import DataError
from medseg_supcon.plan import LabelPreprocessingd


def test_geometry_agrees_with_simpleitk(phantoms):
    dataset = read_dataset(phantoms)
    found = fingerprint(dataset)
    for case, one in zip(dataset.cases, found.cases, strict=True):  # LPS axes are RAS axes reversed
        image = sitk.DICOMOrient(sitk.ReadImage(str(case.images[0])), "LPS")
        assert one.shape == image.GetSize()
        assert one.spacing == pytest.approx(image.GetSpacing(), abs=1e-5)
    assert len({one.orientation for one in found.cases}) == 4


def test_voxels_per_class_and_volumes(phantoms):
    dataset = read_dataset(phantoms)
    found = fingerprint(dataset)
    expected = np.zeros(6)
    volumes = []
    for case in dataset.cases:
        label = nibabel.load(case.label)
        counts = [int((np.asanyarray(label.dataobj) == c).sum()) for c in range(6)]
        expected += counts
        volumes.append(counts[5] * float(np.prod(label.header.get_zooms())) / 1000)
    assert found.class_voxels.tolist() == expected.tolist()
    told = found.summary()["volume_ml"]["nodule"]
    assert [told["min"], told["median"], told["max"]] == pytest.approx(
        [min(volumes), np.median(volumes), max(volumes)], rel=1e-3
    )


def test_intensities_of_the_structures(tmp_path, disk):
    dataset = read_dataset(disk.nnunet(tmp_path))
    found = fingerprint(dataset)
    for channel in range(2):
        values = []
        for case in dataset.cases:
            scan = nibabel.load(case.images[channel]).get_fdata()
            values.append(scan[nibabel.load(case.label).get_fdata() > 0])
        values = np.concatenate(values)
        told = found.foreground(channel)
        assert told["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert told["std"] == pytest.approx(values.std(), rel=1e-6)
        assert told["percentile_00_5"] == pytest.approx(np.percentile(values, 0.5), rel=1e-6)
        assert told["percentile_99_5"] == pytest.approx(np.percentile(values, 99.5), rel=1e-6)


def test_four_channels_in_one_file_are_those_of_four_files(tmp_path, disk):
    one = fingerprint(read_dataset(disk.decathlon(tmp_path / "d", channels=["T1", "T2"])))
    many = fingerprint(read_dataset(disk.nnunet(tmp_path / "n", channels=["T1", "T2"])))
    for a, b in zip(one.cases, many.cases, strict=True):
        assert (a.shape, a.spacing, a.class_voxels) == (b.shape, b.spacing, b.class_voxels)
        np.testing.assert_array_equal(a.foreground, b.foreground)


def test_channels_as_itk_writes_them(tmp_path, disk):
    """(X, Y, Z, 1, C), here by SimpleITK itself, and a label map with two further axes of one."""
    root = disk.decathlon(tmp_path, channels=["T1", "T2"])
    expected = fingerprint(read_dataset(root))
    for file in (root / "imagesTr").iterdir():
        data = nibabel.load(file).get_fdata(dtype=np.float32)
        vector = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0, 3)), isVector=True)
        vector.SetDirection(np.diag([-1.0, -1, 1]).ravel().tolist())  # LPS: the RAS identity of the files
        sitk.WriteImage(vector, str(file))
        assert nibabel.load(file).shape == (12, 10, 8, 1, 2)
    for file in (root / "labelsTr").iterdir():
        disk.nifti(file, np.asanyarray(nibabel.load(file).dataobj)[..., None, None])
    dataset = read_dataset(root)
    assert not check_dataset(dataset).has_errors
    for a, b in zip(expected.cases, fingerprint(dataset).cases, strict=True):
        assert (a.shape, a.spacing, a.class_voxels) == (b.shape, b.spacing, b.class_voxels)
        np.testing.assert_array_equal(a.foreground, b.foreground)
    image = MetaTensor(torch.zeros(2, 12, 10, 8), affine=torch.eye(4))
    case = dataset.cases[0]
    label = LabelPreprocessingd({"labels": dataset.labels})({"image": image, "label": str(case.label)})["label"]
    np.testing.assert_array_equal(label[0], nibabel.load(case.label).get_fdata()[..., 0, 0])


def test_ignored_voxels_count_for_no_class(tmp_path, disk):
    root = disk.decathlon(tmp_path, cases=1, labels={"0": "background", "1": "tumour", "2": "ignore"})
    found = fingerprint(read_dataset(root))
    label = disk.scan_and_label(0)[1]
    assert found.class_voxels.tolist() == [(label == 0).sum(), (label == 1).sum()]
    assert found.cases[0].foreground.shape == (1, (label == 1).sum())


def test_unlabelled_cases_count_by_their_geometry(tmp_path, disk):
    root = disk.decathlon(tmp_path, cases=2)
    content = json.loads((root / "dataset.json").read_text())
    del content["training"][1]["label"]
    disk.json(root / "dataset.json", content)
    found = fingerprint(read_dataset(root))
    assert found.cases[1].class_voxels is None and found.cases[1].shape == (12, 10, 8)
    summary = json.loads(json.dumps(found.summary()))
    assert (summary["cases"], summary["labelled"]) == (2, 1)


def test_faults_are_told_with_the_file(tmp_path, disk):
    root = disk.decathlon(tmp_path, cases=1)
    scan, label = disk.scan_and_label(0)
    dataset = read_dataset(root)
    disk.nifti(root / "labelsTr/case_0.nii.gz", label + 5)
    with pytest.raises(DataError, match=r"labelsTr/case_0.*contains 5, 6, 7"):
        fingerprint(dataset)
    disk.nifti(root / "labelsTr/case_0.nii.gz", label[1:])
    with pytest.raises(DataError, match=r"labelsTr/case_0.*11, 10, 8"):
        fingerprint(dataset)
    disk.nifti(root / "imagesTr/case_0.nii.gz", np.stack([scan, scan], -1))
    with pytest.raises(DataError, match="2 channels"):
        fingerprint(dataset)
    with pytest.raises(DataError, match="no case"):
        fingerprint(dataset, [])


def test_check_and_fingerprint_read_each_file_once(phantoms, monkeypatch):
    """The check measures sound labelled cases on the way: the very figures that reading them again gives."""
    dataset = read_dataset(phantoms)
    expected = fingerprint(dataset)
    opened: list[str] = []
    original = gzip.open
    monkeypatch.setattr(gzip, "open", lambda path, *a: opened.append(str(path)) or original(path, *a))
    report = check_dataset(dataset)
    once = sorted(set(opened))
    assert set(report.fingerprints) == set(dataset.labelled)
    opened.clear()
    again = fingerprint(dataset, known=report.fingerprints)
    labelled = {str(path) for case in dataset.labelled for path in (*case.images, case.label)}
    assert labelled <= set(once) and not labelled & set(opened)
    for a, b in zip(expected.cases, again.cases, strict=True):
        np.testing.assert_array_equal(a.foreground, b.foreground)
        assert dataclasses.replace(a, foreground=None) == dataclasses.replace(b, foreground=None)


def test_a_case_with_an_error_has_no_fingerprint(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path / "d"))
    Path(dataset.cases[0].images[0]).write_bytes(b"")
    report = check_dataset(dataset)
    assert report.has_errors and set(report.fingerprints) == set(dataset.cases[1:])
