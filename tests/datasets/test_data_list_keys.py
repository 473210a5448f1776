"""Every key of a data list is understood, named in a warning, or refused with the nearest known one."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from medseg_supcon.datasets import (
    check_dataset,
    fingerprint,
    normalisation,
    read_dataset,
)
from medseg_supcon.errors import DataError
from medseg_supcon.plan import make_plan

ALL_OF_NNUNET = {
    "numTraining": 4, "name": "Toy", "description": "d", "reference": "r", "licence": "l", "license": "l",
    "release": "1", "citation": "c", "converted_by": "me", "tensorImageSize": "3D", "numTest": 0, "test": [],
    "overwrite_image_reader_writer": "SimpleITKIO", "regions_class_order": [1, 2],
}  # fmt: skip


def changed(root, disk, **changes):
    content = json.loads((root / "dataset.json").read_text())
    disk.json(root / "dataset.json", {**content, **changes})
    return root


def with_items(root, disk, **keys):
    """Every item of the list gets the keys, each a function of its number."""
    items = json.loads((root / "dataset.json").read_text())["training"]
    return changed(root, disk, training=[{**one, **{k: v(n) for k, v in keys.items()}} for n, one in enumerate(items)])


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_known_keys_are_no_warnings(tmp_path, disk, layout):
    root = getattr(disk, layout)(tmp_path, **ALL_OF_NNUNET)
    assert read_dataset(root).warnings == ()
    assert not check_dataset(read_dataset(root)).findings


def test_a_training_list_counts_beside_the_keys_of_nnunet(tmp_path, disk):
    """The list names other label maps and fewer cases than the folders hold."""
    root = disk.nnunet(tmp_path, channels=("MRI",))
    for number in range(2):
        whole = (disk.scan_and_label(number)[1] > 0).astype(np.uint8)
        disk.nifti(root / f"labelsTr2/case_{number}.nii.gz", whole)
    items = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr2/case_{n}.nii.gz"} for n in range(2)]
    dataset = read_dataset(changed(root, disk, training=items, labels={"background": 0, "whole": 1}))
    assert [case.label.parent.name for case in dataset.cases] == ["labelsTr2"] * 2
    assert [case.images[0].name for case in dataset.cases] == ["case_0_0000.nii.gz", "case_1_0000.nii.gz"]
    assert ["file_ending" in w for w in dataset.warnings] == [True, False]
    assert '"numTraining" is 4, but there are 2' in dataset.warnings[1]
    codes = {f.code for f in check_dataset(dataset).findings}
    assert codes == {"data_list"}


def test_nnunets_dataset_key_says_where_files_are(tmp_path, disk):
    root = disk.nnunet(tmp_path)
    files = {
        f"p{n}": {
            "images": [f"imagesTr/case_{n}_000{c}.nii.gz" for c in range(2)],
            "label": f"labelsTr/case_{n}.nii.gz",
        }
        for n in range(2)
    }
    dataset = read_dataset(changed(root, disk, dataset=files, numTraining=2))
    assert [(c.name, len(c.images), c.label.name) for c in dataset.cases] == [
        ("p0", 2, "case_0.nii.gz"),
        ("p1", 2, "case_1.nii.gz"),
    ]
    assert dataset.warnings == ()


@pytest.mark.parametrize("key", ["fold:", "Fold", "folds", "fold "])
def test_a_misspelt_fold_is_not_a_random_split(tmp_path, disk, key):
    root = with_items(disk.decathlon(tmp_path), disk, **{key: lambda n: n % 2})
    with pytest.raises(DataError, match=rf"unknown key '{key}'.*'fold'"):
        read_dataset(root)


@pytest.mark.parametrize(("key", "near"), [("lable", "label"), ("labels", "label"), ("patient_id", "patient")])
def test_misspelt_keys_of_items(tmp_path, disk, key, near):
    root = disk.decathlon(tmp_path)
    items = json.loads((root / "dataset.json").read_text())["training"]
    items[1][key] = items[1].pop("label")  # the other items are right
    with pytest.raises(DataError, match=rf"'{key}'.*'{near}'"):
        read_dataset(changed(root, disk, training=items))


def test_other_keys_of_items_are_warnings(tmp_path, disk):
    dataset = read_dataset(with_items(disk.decathlon(tmp_path), disk, site=lambda n: "A", age=lambda n: 7))
    assert [w.split("key ")[1].split(",")[0] for w in dataset.warnings] == ["'site'", "'age'"]
    assert [f.code for f in check_dataset(dataset).findings] == ["data_list"] * 2


@pytest.mark.parametrize("folds", [[1, 2, 1, 2], [0, 0, 0, 0], ["train", "val", "train", "train"]])
def test_folds_that_name_no_validation(tmp_path, disk, folds):
    root = with_items(disk.decathlon(tmp_path), disk, fold=lambda n: folds[n])
    with pytest.raises(DataError, match="fold 0 is for validation"):
        read_dataset(root)


@pytest.mark.parametrize("key", ["val", "Validation", "train", "holdout", "imagesTs", "unlabeled_scans"])
def test_lists_of_cases_under_unknown_names_are_refused(tmp_path, disk, key):
    items = [{"image": "imagesTr/case_3.nii.gz", "label": "labelsTr/case_3.nii.gz"}]
    root = disk.decathlon(tmp_path)
    changed(root, disk, **{key: ["imagesTs/a.nii.gz"] if key == "imagesTs" else items})
    with pytest.raises(DataError, match=rf"'{key}' is a list of 1 cases"):
        read_dataset(root)
    root = disk.decathlon(tmp_path, testing=items, test=["imagesTs/a.nii.gz"])
    assert len(read_dataset(root).cases) == 4


@pytest.mark.parametrize("key", ["chanel_names", "Labels", "ignore_labels", "file_endings"])
def test_misspelt_keys_of_the_file(tmp_path, disk, key):
    near = {"chanel_names": "channel_names", "Labels": "labels", "ignore_labels": "ignore_label"}
    root = disk.nnunet(tmp_path, ignore_label=None, file_ending=None, labels=None, channel_names=None)
    with pytest.raises(DataError, match=f"'{key}'.*'{near.get(key, 'file_ending')}'"):
        read_dataset(changed(root, disk, **{key: {"background": 0, "a": 1}}))


def test_unknown_keys_of_the_file_are_warnings(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path, author="me", splits=[{"train": ["a"], "val": ["b"]}]))
    assert ["'author'" in w or "'splits'" in w for w in dataset.warnings] == [True, True]


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        ({"CT": 0}, ("CT",)),
        ({"T2": 1, "T1": "0"}, ("T1", "T2")),
        ({"1": "T2", "0": "T1"}, ("T1", "T2")),
        (["T1", "T2"], ("T1", "T2")),
    ],
)
def test_channel_names_in_any_direction(tmp_path, disk, declared, names):
    assert read_dataset(disk.nnunet(tmp_path, channels=names, channel_names=declared)).channels == names


@pytest.mark.parametrize("declared", [{"CT": "a"}, {"0": 7}, {"0": ""}, {"a": 0, "b": 0}, 3, {"0": "a\nb"}])
def test_broken_channel_names(tmp_path, disk, declared):
    root = disk.nnunet(tmp_path, channels=("CT",), channel_names=declared)
    with pytest.raises(DataError, match="channel_names"):
        read_dataset(root)


@pytest.mark.parametrize("name", ["a\nb", "", "  ", "\udc80", "a\x1b[31m", "\u202eright"])
def test_class_names_that_cannot_be_printed(tmp_path, disk, name):
    root = disk.decathlon(tmp_path, labels={"0": "background", "1": name, "2": "b"})
    with pytest.raises(DataError, match="printable") as error:
        read_dataset(root)
    str(error.value).encode()


def test_paths_of_windows(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    items = [{"image": f".\\imagesTr\\case_{n}.nii.gz", "label": f"labelsTr\\case_{n}.nii.gz"} for n in range(4)]
    dataset = read_dataset(changed(root, disk, training=items))
    assert all(case.images[0].is_file() and case.label.is_file() for case in dataset.cases)
    assert [case.name for case in dataset.cases] == [f"case_{n}" for n in range(4)]
    for path in ("C:\\data\\a.nii.gz", "d:/data/a.nii.gz", "\\\\server\\share\\a.nii.gz"):
        with pytest.raises(DataError, match="absolute Windows path"):
            read_dataset(changed(root, disk, training=[{"image": path}]))
    with pytest.raises(DataError, match="leaves the data folder"):
        read_dataset(changed(root, disk, training=[{"image": "..\\a.nii.gz"}]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("CT", "ct"),
        ("ct 0", "ct"),
        ("CT_venous", "ct"),
        ("CTA", "ct"),
        ("Computed Tomography", "ct"),
        ("PET/CT", "zscore"),
        ("noNorm", "nonorm"),
        ("RGB_to_0_1", "rgb_to_0_1"),
        ("rescale_to_0_1", "rescale_to_0_1"),
        ("zscore", "zscore"),
        ("structure", "zscore"),
        ("T1", "zscore"),
    ],
)
def test_what_channel_names_mean(name, kind):
    assert normalisation(name) == kind


def test_nnunets_names_of_normalisations(tmp_path, disk):
    """Against the formulas of nnU-Net, through MONAI's own transforms."""
    from monai.bundle import ConfigParser
    from monai.data import MetaTensor
    from monai.transforms import Compose

    formulas = {
        "noNorm": lambda x: x,
        "rescale_to_0_1": lambda x: (x - x.min()) / (x.max() - x.min()),
        "rgb_to_0_1": lambda x: x / 255,
        "zscore": lambda x: (x - x.mean()) / x.std(),
    }
    scan = np.random.default_rng(0).uniform(0, 255, (4, 6, 5, 4)).astype("f4")
    for names in (["noNorm"], ["rescale_to_0_1"] * 2, ["rgb_to_0_1"], ["zscore"] * 2, list(formulas)):
        dataset = read_dataset(disk.nnunet(tmp_path / "-".join(names), channels=names))
        steps = ConfigParser({"x": make_plan(fingerprint(dataset), dataset)["intensity"]}).get_parsed_content("x")
        image = MetaTensor(scan[: len(names)].copy())
        out = Compose(steps)({"image": image})["image"].numpy()
        expected = np.stack([formulas[name](scan[i]) for i, name in enumerate(names)])
        np.testing.assert_allclose(out, expected, atol=1e-4)


def test_many_digits_stay_apart_and_no_more_than_float64_can_tell(tmp_path, disk):
    labels = {"background": 0, "a": 614454276, "b": 614454277}
    root = disk.decathlon(tmp_path, labels=labels)
    for file in (root / "labelsTr").iterdir():
        disk.nifti(file, np.array([0, 614454276, 614454277], np.uint32)[nibabel.load(file).dataobj])
    dataset = read_dataset(root)
    assert not check_dataset(dataset).findings
    assert (fingerprint(dataset).class_voxels > 0).all()
    with pytest.raises(DataError, match=r"up to 2\^53"):
        read_dataset(changed(root, disk, labels={"background": 0, "a": 2**60, "b": 2**60 + 1}))


def test_keys_of_two_kinds_that_contradict_each_other(tmp_path, disk):
    root = disk.nnunet(tmp_path, channels=("CT",), modality={"0": "MRI"})
    with pytest.raises(DataError, match='"channel_names" and "modality" differ'):
        read_dataset(root)
    assert read_dataset(changed(root, disk, modality={"0": "CT"})).channels == ("CT",)


@pytest.mark.parametrize("entry", [{"image": ["a.nii.gz"], "labels": "b.nii.gz"}, "a.nii.gz", {"label": "b.nii.gz"}])
def test_broken_entries_of_nnunets_dataset_key(tmp_path, disk, entry):
    root = changed(disk.nnunet(tmp_path), disk, dataset={"p0": entry})
    with pytest.raises(DataError, match=r"'label'|\"images\"|\"image\""):
        read_dataset(root)


def test_patients_of_cases_that_do_not_exist(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    disk.json(root / "patients.json", {"case_0": "anna", "Case-1": "anna"})
    (warning,) = read_dataset(root).warnings
    assert "'Case-1'" in warning and "'case_1'" in warning
