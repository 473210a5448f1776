"""Keys of nnU-Net v2's dataset.json that say where the files are and how they are read."""

from __future__ import annotations

import json
import shutil

import pytest

from medseg_supcon.datasets import check_dataset, read_dataset
from medseg_supcon.errors import DataError


@pytest.fixture
def nnunet(tmp_path, disk):
    """nnunet(KEY=VALUE, ...): a folder in nnU-Net's layout with these keys in its dataset.json; None removes one."""

    def make(**keys):
        root = disk.nnunet(tmp_path / "data", channels=("MRI",))
        content = json.loads((root / "dataset.json").read_text()) | keys
        disk.json(root / "dataset.json", {key: value for key, value in content.items() if value is not None})
        return root

    return make


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "None", None])
def test_readers_of_nifti_are_ours(nnunet, reader):
    dataset = read_dataset(nnunet(overwrite_image_reader_writer=reader))
    assert dataset.warnings == () and not check_dataset(dataset).findings


@pytest.mark.parametrize("reader", ["Tiff3DIO", "NaturalImage2DIO"])
def test_readers_of_pictures_are_refused(nnunet, reader):
    with pytest.raises(DataError, match=rf"'{reader}', which reads .* training data must be NIfTI. Convert"):
        read_dataset(nnunet(overwrite_image_reader_writer=reader))


def test_a_reader_of_the_users_own_is_a_warning(nnunet):
    (warning,) = read_dataset(nnunet(overwrite_image_reader_writer="MyIO")).warnings
    assert "'MyIO', which is not one of nnU-Net's own readers" in warning


def test_only_files_with_the_file_ending_count(nnunet, disk):
    root = nnunet(file_ending=".nii.gz")
    scan, label = disk.scan_and_label(9)
    disk.nifti(root / "imagesTr/other_0000.nii", scan)
    disk.nifti(root / "labelsTr/other.nii", label)
    dataset = read_dataset(root)
    assert len(dataset.cases) == 4
    (warning,) = dataset.warnings
    assert (
        "'.nii.gz', and 2 files with another ending, such as" in warning and "other_0000.nii, are not used" in warning
    )


@pytest.mark.parametrize("ending", [".mha", ".png", ".tif"])
def test_another_format_is_refused(nnunet, ending):
    with pytest.raises(DataError, match=rf'"file_ending" is \'{ending}\'. Training data must be NIfTI'):
        read_dataset(nnunet(file_ending=ending))


def entry(images, label):
    return {"images": images, "label": label}


def test_the_dataset_key_names_files_anywhere(nnunet, tmp_path, monkeypatch):
    """Relative to dataset.json, absolute, and through a variable as nnU-Net expands it: ``$nnUNet_raw/...``."""
    root = nnunet()
    shutil.move(root / "imagesTr", tmp_path / "elsewhere")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (root / "$odd").mkdir()
    shutil.copy(root / "labelsTr/case_3.nii.gz", root / "$odd/label.nii.gz")
    shutil.copy(tmp_path / "elsewhere/case_3_0000.nii.gz", root / "scan.nii.gz")
    outside = tmp_path / "elsewhere"
    files = {
        "absolute": entry([str(outside / "case_0_0000.nii.gz")], "labelsTr/case_0.nii.gz"),
        "variable": entry(["$nnUNet_raw/elsewhere/case_1_0000.nii.gz"], "${nnUNet_raw}/data/labelsTr/case_1.nii.gz"),
        "one text": entry("$nnUNet_raw/elsewhere/case_2_0000.nii.gz", "labelsTr/case_2.nii.gz"),
        "odd names": entry(["scan.nii.gz"], "$odd/label.nii.gz"),
    }
    content = json.loads((root / "dataset.json").read_text()) | {"dataset": files}
    (root / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(root)
    assert dataset.warnings == () and not check_dataset(dataset).findings
    cases = {case.name: case for case in dataset.cases}
    assert set(cases) == set(files)
    assert [cases[name].images for name in list(files)[:3]] == [(outside / f"case_{n}_0000.nii.gz",) for n in range(3)]
    assert cases["variable"].label == root / "labelsTr/case_1.nii.gz"
    assert cases["odd names"].label == root / "$odd/label.nii.gz"


def test_a_variable_that_is_not_set_and_a_path_that_leaves_the_folder_are_sentences(nnunet, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    files = {"a": entry(["$nnUNet_raw/a_0000.nii.gz"], "labelsTr/case_0.nii.gz")}
    with pytest.raises(DataError, match=r"the environment variable \$nnUNet_raw is not set"):
        read_dataset(nnunet(dataset=files))
    files = {"a": entry(["../elsewhere/a_0000.nii.gz"], "labelsTr/case_0.nii.gz")}
    with pytest.raises(DataError, match=r"leaves the data folder .*\. Write an absolute path if you mean this file"):
        read_dataset(nnunet(dataset=files))


def test_a_missing_file_of_the_dataset_key_is_a_finding(nnunet):
    files = {"a": entry(["imagesTr/none_0000.nii.gz"], "labelsTr/case_0.nii.gz")}
    files["b"] = entry(["imagesTr/case_1_0000.nii.gz"], "labelsTr/case_1.nii.gz")
    found = check_dataset(read_dataset(nnunet(dataset=files, numTraining=2))).findings
    assert [(one.case, one.severity) for one in found] == [("a", "error")]
    assert "none_0000.nii.gz" in found[0].message
