"""Every supported layout is read; every broken one gives an error sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg_supcon.datasets import check_dataset, fingerprint, read_case_names, read_dataset, read_unlabelled
from medseg_supcon.errors import ConfigError, DataError, MedsegError


def test_decathlon(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path))
    assert dataset.name == "Toy"
    assert dataset.channels == ("MRI",)
    assert list(dataset.labels.items()) == [("background", 0), ("tumour", 1), ("vessel", 2)]
    assert [case.name for case in dataset.cases] == [f"case_{n}" for n in range(4)]
    assert all(case.images[0].is_file() and case.label.is_file() for case in dataset.cases)
    assert dataset.ignore_label is None


def test_decathlon_with_four_channels_in_one_file(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path, channels=["FLAIR", "T1w", "t1gd", "T2w"]))
    assert dataset.channels == ("FLAIR", "T1w", "t1gd", "T2w")
    assert [len(case.images) for case in dataset.cases] == [1] * 4


def test_one_text_names_every_channel(tmp_path, disk):
    names = ("MRI 0", "MRI 1", "MRI 2")
    root = disk.decathlon(tmp_path / "one", channels=["a", "b", "c"], modality="MRI")
    dataset = read_dataset(root)
    assert dataset.channels == names
    assert not check_dataset(dataset).has_errors
    assert fingerprint(dataset).foreground(2)["mean"] == pytest.approx(100, abs=5)
    root = disk.nnunet(tmp_path / "many", channels=["a", "b", "c"])
    items = [
        {
            "image": [f"imagesTr/case_{n}_000{c}.nii.gz" for c in range(3)],
            "label": f"labelsTr/case_{n}.nii.gz",
        }
        for n in range(4)
    ]
    dataset = read_dataset(disk.json(root / "list.json", {"modality": "MRI", "training": items}))
    assert dataset.channels == names
    assert not check_dataset(dataset).has_errors
    assert read_dataset(disk.decathlon(tmp_path / "single", modality="MRI")).channels == ("MRI",)


def test_eleven_channels_keep_their_order(tmp_path, disk):
    names = [f"echo{n}" for n in range(11)]
    content = {str(n): name for n, name in reversed(list(enumerate(names)))}
    dataset = read_dataset(disk.decathlon(tmp_path, cases=1, modality=content))
    assert dataset.channels == tuple(names)


def test_nnunet_with_several_channels_and_an_ignore_label(tmp_path, disk):
    labels = {"background": 0, "tumour": 1, "vessel": 2, "ignore": 3}
    dataset = read_dataset(disk.nnunet(tmp_path, labels=labels))
    assert dataset.channels == ("T1", "T2")
    assert dataset.labels == {"background": 0, "tumour": 1, "vessel": 2}
    assert dataset.ignore_label == 3
    assert [path.name for path in dataset.cases[0].images] == ["case_0_0000.nii.gz", "case_0_0001.nii.gz"]
    assert dataset.cases[0].name == "case_0"


def test_nnunet_keeps_what_is_missing_visible(tmp_path, disk):
    root = disk.nnunet(tmp_path)
    (root / "imagesTr/case_1_0001.nii.gz").unlink()  # one channel
    for channel in range(2):  # a whole scan
        (root / f"imagesTr/case_2_000{channel}.nii.gz").unlink()
    (root / "labelsTr/case_3.nii.gz").unlink()
    cases = {case.name: case for case in read_dataset(root).cases}
    assert [path.exists() for path in cases["case_1"].images] == [True, False]
    assert [path.exists() for path in cases["case_2"].images] == [False, False]
    assert cases["case_3"].label is None


def test_nnunet_with_a_stray_scan_keeps_the_others(tmp_path, disk):
    root = disk.nnunet(tmp_path)
    disk.nifti(root / "imagesTr/atlas.nii.gz", np.ones((4, 4, 4)))
    cases = {case.name: case for case in read_dataset(root).cases}
    assert all(cases[f"case_{n}"].label for n in range(4))
    assert not all(path.exists() for path in cases["atlas"].images), "the check reports it"


def test_older_nnunet_lists_name_scans_without_channel_suffix(tmp_path, disk):
    items = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(4)]
    root = disk.nnunet(tmp_path, training=items, file_ending=None)
    cases = read_dataset(root).cases
    assert [path.name for path in cases[1].images] == ["case_1_0000.nii.gz", "case_1_0001.nii.gz"]


def test_monai_datalist_with_channels_validation_and_undeclared_labels(tmp_path, disk):
    for number in range(3):
        scan, label = disk.scan_and_label(number)
        disk.nifti(tmp_path / f"p{number}/t1.nii", scan)
        disk.nifti(tmp_path / f"p{number}/t2.nii", scan + 1)
        disk.nifti(tmp_path / f"p{number}/seg.nii", label * 2)
    items = [
        {"image": [f"p{n}/t1.nii", f"p{n}/t2.nii"], "label": f"p{n}/seg.nii", "subject": f"s{n}"} for n in range(3)
    ]
    path = disk.json(tmp_path / "list.json", {"training": items[:2], "validation": items[2:]})
    dataset = read_dataset(path)
    assert [case.name for case in dataset.cases] == ["p0", "p1", "p2"]
    assert [case.patient for case in dataset.cases] == ["s0", "s1", "s2"]
    assert dataset.validation == {"p2"}
    assert dataset.labels == {"background": 0, "label 2": 2, "label 4": 4}
    assert len(dataset.channels) == 2


def test_datalist_folds(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    content = json.loads((root / "dataset.json").read_text())
    for number, item in enumerate(content["training"]):
        item["fold"] = number % 2
    disk.json(root / "dataset.json", content)
    assert read_dataset(root).validation == {"case_0", "case_2"}


def test_hidden_files_in_a_list_do_not_shift_the_folds(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    content = json.loads((root / "dataset.json").read_text())
    shown = [{**item, "fold": number // 2} for number, item in enumerate(content["training"])]
    hidden = {"image": "imagesTr/._case_0.nii.gz", "label": "labelsTr/._case_0.nii.gz", "fold": 1}
    several = {**hidden, "image": ["imagesTr/._case_1.nii.gz", "imagesTr/._case_2.nii.gz"]}
    content["training"] = [hidden, shown[0], several, "imagesTr/._case_3.nii.gz", *shown[1:]]
    disk.json(root / "dataset.json", content)
    dataset = read_dataset(root)
    assert [case.name for case in dataset.cases] == [f"case_{n}" for n in range(4)]
    assert dataset.validation == {"case_0", "case_1"}


def test_absolute_paths_may_lie_anywhere(tmp_path, disk):
    scan, label = disk.scan_and_label(0)
    image = disk.nifti(tmp_path / "elsewhere/a.nii.gz", scan)
    mask = disk.nifti(tmp_path / "elsewhere/a_seg.nii.gz", label)
    path = disk.json(tmp_path / "lists/list.json", {"training": [{"image": str(image), "label": str(mask)}]})
    assert read_dataset(path).cases[0].images == (image,)


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_a_folder_without_a_data_list(tmp_path, disk, folders):
    for number in range(2):
        scan, label = disk.scan_and_label(number)
        disk.nifti(tmp_path / folders[0] / f"scan_201{number}.nii.gz", scan)
        disk.nifti(tmp_path / folders[1] / f"scan_201{number}.nii.gz", label)
    (tmp_path / folders[0] / "._scan_2010.nii.gz").write_bytes(b"\0\5\x16\7")  # what macOS leaves behind
    (tmp_path / folders[1] / "notes.txt").write_text("drawn by hand")
    dataset = read_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["scan_2010", "scan_2011"]
    assert dataset.labels == {"background": 0, "label 1": 1, "label 2": 2}


def test_a_folder_without_a_data_list_but_with_channel_suffixes(tmp_path, disk):
    root = disk.nnunet(tmp_path)
    (root / "dataset.json").unlink()
    dataset = read_dataset(root)
    assert [len(case.images) for case in dataset.cases] == [2] * 4
    assert len(dataset.channels) == 2


def test_unlabelled_scans_and_test_scans(tmp_path, disk):
    root = disk.decathlon(tmp_path, test=["./imagesTs/x.nii.gz"])
    content = json.loads((root / "dataset.json").read_text())
    del content["training"][1]["label"]
    content["training"][2] = content["training"][2]["image"]
    disk.json(root / "dataset.json", content)
    dataset = read_dataset(root)
    assert [case.label is None for case in dataset.cases] == [False, True, True, False]


def test_labels_with_gaps_fractions_and_any_order(tmp_path, disk):
    labels = {"255": "vessel", "0": "background", "0.5": "tumour"}
    dataset = read_dataset(disk.decathlon(tmp_path, cases=1, labels=labels))
    assert list(dataset.labels.items()) == [("background", 0), ("tumour", 0.5), ("vessel", 255)]
    dataset = read_dataset(disk.decathlon(tmp_path, cases=1, labels={"organ": 0, "background": 7}))
    assert list(dataset.labels) == ["background", "organ"]
    dataset = read_dataset(disk.decathlon(tmp_path, cases=1, labels={"1": "organ", "2": "b"}, ignore_label=2))
    assert (dataset.labels, dataset.ignore_label) == ({"background": 0, "organ": 1}, 2)


def test_patients_beside_the_list(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    disk.json(root / "patients.json", {"case_0": "anna", "case_1": "anna"})
    assert [case.patient for case in read_dataset(root).cases] == ["anna", "anna", None, None]


def test_select_keeps_order_and_names_near_matches(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path))
    assert [case.name for case in dataset.select(["case_2", "case_0"]).cases] == ["case_0", "case_2"]
    with pytest.raises(DataError, match=r"'case_0\.nii'.*such as 'case_0'"):
        dataset.select(["case_0.nii"])
    with pytest.raises(DataError, match="empty"):
        dataset.select([])


def test_case_names(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("# fold 1\ncase_1\n\n  case_2  # noisy\ncase_1\nsite#4\n")
    assert read_case_names(file) == ["case_1", "case_2", "site#4"]
    file.write_text("# nothing\n")
    for path in (file, tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_case_names(path)


def test_unlabelled_folder(tmp_path, disk):
    dataset = read_dataset(disk.nnunet(tmp_path / "data"))
    for name in ("new_1_0000", "new_1_0001", "new_2_0000", "new_2_0001"):
        disk.nifti(tmp_path / "more" / f"{name}.nii.gz", np.ones((4, 4, 4)))
    assert [(case.name, len(case.images)) for case in read_unlabelled(tmp_path / "more", dataset)] == [
        ("new_1", 2),
        ("new_2", 2),
    ]
    disk.nifti(tmp_path / "more/case_0_0000.nii.gz", np.ones((4, 4, 4)))
    with pytest.raises(DataError, match="case_0"):
        read_unlabelled(tmp_path / "more", dataset)
    with pytest.raises(DataError, match="nowhere"):
        read_unlabelled(tmp_path / "nowhere", dataset)


def test_numbered_unlabelled_scans_are_no_channels_of_one(tmp_path, disk):
    dataset = read_dataset(disk.decathlon(tmp_path / "data"))
    for number in (1, 2, 10):
        disk.nifti(tmp_path / "more" / f"patient_{number:04d}.nii.gz", np.ones((4, 4, 4)))
    found = read_unlabelled(tmp_path / "more", dataset)
    assert [case.name for case in found] == ["patient_0001", "patient_0002", "patient_0010"]
    assert all(len(case.images) == 1 for case in found)
    disk.nifti(tmp_path / "channels" / "patient_0000.nii.gz", np.ones((4, 4, 4)))
    assert [case.name for case in read_unlabelled(tmp_path / "channels", dataset)] == ["patient"]


ITEM = {"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}

BROKEN = {  # what dataset.json holds instead -> a word of the sentence
    "not json": ('{"training": [,]}', "line 1"),
    "a list": ("[]", "object"),
    "not text": (b"\xff\xfe\x00\x01", "UTF-8"),
    "nothing": ("", "JSON"),
    "deep": ('{"a":' * 100_000, "deep|JSON"),
    "no cases": ({"training": []}, "no training case"),
    "training is text": ({"training": "imagesTr"}, "file_ending|training|labels"),
    "item is a number": ({"training": [3]}, "path"),
    "item without image": ({"training": [{"label": "labelsTr/case_0.nii.gz"}]}, "item 1"),
    "image is a number": ({"training": [{"image": 7}]}, "path"),
    "image is empty": ({"training": [{"image": ""}]}, "item 1"),
    "no label at all": ({"training": [{"image": "imagesTr/case_0.nii.gz"}]}, "label map"),
    "escape": ({"training": [{**ITEM, "image": "../secret.nii.gz"}]}, "leaves the data folder"),
    "hidden escape": ({"training": [{**ITEM, "label": "imagesTr/../../x.nii.gz"}]}, "leaves the data folder"),
    "null byte": ({"training": [{**ITEM, "image": "a\0b.nii.gz"}]}, "path"),
    "two label files": ({"training": [{**ITEM, "label": ["a.nii", "b.nii"]}]}, "2 label files"),
    "twins": ({"training": [ITEM, ITEM]}, "two cases are called 'case_0'"),
    "name with a slash": ({"training": [{**ITEM, "name": "../a"}]}, "cannot be a file name"),
    "labels are a list": ({"labels": ["background", "tumour"]}, "labels"),
    "only background": ({"labels": {"0": "background"}}, "other than the background"),
    "value twice": ({"labels": {"background": 0, "a": 1, "b": 1}}, "twice"),
    "name twice": ({"labels": {"0": "background", "1": "a", "2": "a"}}, "twice"),
    "value is text": ({"labels": {"background": 0, "a": "one"}}, "number"),
    "ignore is text": ({"ignore_label": "none"}, "ignore_label"),
    "region": ({"labels": {"background": 0, "whole": [1, 2]}}, "region"),
    "validation is text": ({"validation": "case_0"}, "validation"),
    "patients": ({"patients": None}, "patients.json"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_data_lists_give_a_sentence(tmp_path, disk, fault):
    content, word = BROKEN[fault]
    root = disk.decathlon(tmp_path / "set", cases=1)
    if fault == "patients":
        disk.json(root / "patients.json", "[1")
    elif isinstance(content, bytes):
        (root / "dataset.json").write_bytes(content)
    elif isinstance(content, dict):
        whole = json.loads((root / "dataset.json").read_text())
        disk.json(root / "dataset.json", {**whole, **content})
    else:
        disk.json(root / "dataset.json", content)
    with pytest.raises(ConfigError if fault == "region" else DataError, match=word) as error:
        read_dataset(root)
    assert "set" in str(error.value), "the sentence names the place"


@pytest.mark.parametrize("place", ["missing", "empty", "text", "only_scans", "no_pairs", "ending", "long"])
def test_broken_folders_give_a_sentence(tmp_path, disk, place):
    root = tmp_path / ("x" * 300 if place == "long" else place)
    scan, label = disk.scan_and_label(0)
    if place == "empty":
        root.mkdir()
    elif place == "text":
        root.write_text("hello")
    elif place == "only_scans":
        disk.nifti(root / "imagesTr/a.nii.gz", scan)
    elif place == "no_pairs":
        disk.nifti(root / "imagesTr/a_0000.nii.gz", scan)
        disk.nifti(root / "labelsTr/b.nii.gz", label)
    elif place == "ending":
        disk.nnunet(root, cases=1, file_ending=".png")
    with pytest.raises(MedsegError) as error:
        read_dataset(root)
    assert place in str(error.value) or place == "long"
    assert str(error.value).endswith(".")
