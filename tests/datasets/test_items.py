"""Items on disk and back, and label values to class indices."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.datasets import (
    Case,
    class_indices,
    items,
    label_type,
    load_items,
    read_datalist,
    read_dataset,
    split_cases,
    write_datalist,
)
from medseg_supcon.errors import DataError
from medseg_supcon.scans import count_values

PLAN = {"labels": {"background": 0, "tumour": 4, "vessel": 0.5}, "ignore_label": 255}


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_items_survive_the_disk(tmp_path, disk, layout):
    root = getattr(disk, layout)(tmp_path / "set")
    split = split_cases(read_dataset(root), labels=3)
    write_datalist(split, tmp_path / "datalist.json", root)
    content = json.loads((tmp_path / "datalist.json").read_text())
    assert {key: len(entries) for key, entries in content.items()} == {
        "training": 2,
        "validation": 1,
        "unlabelled": 1,
    }
    assert "label" not in content["unlabelled"][0], "the label of an unlabelled case must not be at hand"
    loaded = load_items(content["training"], root)
    for case, item in zip(split.training, loaded, strict=True):
        assert item["name"] == case.name
        assert item["label"] == str(case.label)
        several = layout == "nnunet"
        assert item["image"] == ([str(p) for p in case.images] if several else str(case.images[0]))


@pytest.mark.parametrize(
    "change", [{"training": None}, {"validation": "a"}, {"unlabelled": [["a"]]}, {"training": {"image": "a"}}]
)
def test_a_datalist_edited_wrongly(tmp_path, disk, change):
    root = disk.decathlon(tmp_path / "set")
    path = tmp_path / "datalist.json"
    write_datalist(split_cases(read_dataset(root)), path, root)
    content = json.loads(path.read_text())
    assert read_datalist(path) == content
    disk.json(path, {key: value for key, value in {**content, **change}.items() if value is not None})
    with pytest.raises(DataError, match=f'datalist.json: "{next(iter(change))}" must be a list of items'):
        read_datalist(path)


def test_paths_inside_are_relative_and_others_absolute(tmp_path):
    case = Case("a", (tmp_path / "set/x/a.nii.gz",), Path("/elsewhere/a.nii.gz"))
    assert items([case], tmp_path / "set") == [{"name": "a", "image": "x/a.nii.gz", "label": "/elsewhere/a.nii.gz"}]


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_a_run_can_move_however_the_folder_was_named(tmp_path, disk, layout, monkeypatch):
    """A ``..`` on the command line must not make the run's paths absolute, nor follow a link the wrong way."""
    root = getattr(disk, layout)(tmp_path / "elsewhere" / "data")
    (tmp_path / "elsewhere" / "deep").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path / "work")
    for name in (Path("link") / ".." / "data", Path("..") / "elsewhere" / "data"):
        dataset = read_dataset(name)
        found = items(dataset.cases, dataset.root)
        assert found == items(read_dataset(root).cases, root)
        assert not any(Path(item["label"]).is_absolute() for item in found)


def test_a_single_file_in_a_list_is_a_text(tmp_path):
    assert load_items([{"image": ["a.nii"]}], tmp_path)[0]["image"] == str(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([], "empty"),
        ([{"name": "a"}], "item 1"),
        ([{"image": "../a.nii"}], "leaves the data folder"),
        ([{"image": ["a.nii", "b/../../c.nii"]}], "leaves the data folder"),
        ([{"image": "a.nii", "label": "../../a.nii"}], "leaves the data folder"),
    ],
)
def test_broken_items(tmp_path, entries, word):
    with pytest.raises(DataError, match=word):
        load_items(entries, tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_class_indices(dtype):
    label = np.array([0, 4, 0.5, 255, 0.5], dtype=dtype)
    assert class_indices(label, PLAN).tolist() == [0, 1, 2, -1, 2]
    assert class_indices(np.array([0, 4, 255], np.uint8), PLAN).tolist() == [0, 1, -1]
    assert class_indices(label * (1 + 1e-6), PLAN).tolist() == [0, 1, 2, -1, 2], "rounding of a scaled file"
    for stray in (1, 2, 3, 0.4, -1, 254):
        with pytest.raises(DataError, match=rf"seg\.nii: holds {stray}, .*0, 4, 0\.5, 255"):
            class_indices(np.array([0, stray], dtype=dtype), PLAN, "seg.nii")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_class_indices_agree_with_a_loop(data):
    values = data.draw(st.lists(st.sampled_from([0, 1, 2, 0.5, 7, 255, -3, 40_000]), min_size=2, unique=True))
    plan = {"labels": {str(v): v for v in values[:-1]}, "ignore_label": values[-1]}
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    drawn = data.draw(st.lists(st.sampled_from(values), min_size=64, max_size=64))
    label = np.resize(np.array(drawn, dtype=np.float32), shape)
    if data.draw(st.booleans()):
        label = np.asfortranarray(label)
    order = {float(v): i for i, v in enumerate(values[:-1])}
    found = class_indices(label, plan)
    assert found.ravel().tolist() == [order.get(v, -1) for v in label.ravel().tolist()]
    counts = count_values(label)
    assert counts == {float(v): int((label == v).sum()) for v in np.unique(label)}
    if float(label.max()).is_integer() and not (label % 1).any():
        assert np.array_equal(class_indices(label.astype(np.int32), plan), found)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 4, 255], "uint8"),
        ([-1, 0, 127], "int8"),
        ([-128, 0], "int8"),
        ([-1, 0, 128], "int16"),
        ([0, 256], "uint16"),
        ([0.0, 70000.0], "uint32"),
        ([-1, 70000], "int32"),
        ([0, 1.5], "float32"),
        ([0.5, 70000], "float32"),
    ],
)
def test_a_mask_takes_the_smallest_type_that_holds_its_labels(values, kind):
    """In Python, and in the bundle's own script."""
    assert label_type(values) == np.dtype(kind)
    script = Path(__file__).parents[2] / "bundles" / "segmentation" / "scripts" / "inference.py"
    assert np.dtype(runpy.run_path(str(script))["mask_type"](values)) == np.dtype(kind)


def test_unsigned_values_of_a_wide_range_and_an_ignore_label_below_zero():
    plan = {"labels": {"background": 0, "organ": 200_000}, "ignore_label": -1}
    assert class_indices(np.array([0, 200_000], np.uint32), plan).tolist() == [0, 1]
    with pytest.raises(DataError, match="holds 3,"):
        class_indices(np.array([3, 200_000], np.uint32), plan)


def test_large_label_maps_are_taken_in_slabs(monkeypatch):
    rng = np.random.default_rng(0)
    label = np.asfortranarray(rng.choice([0, 0.5, 4, 255], size=(5, 6, 23)).astype(np.float32))
    whole, counts = class_indices(label, PLAN), count_values(label)
    monkeypatch.setattr("medseg_supcon.scans.volume.SLAB", 64)
    assert np.array_equal(class_indices(label, PLAN), whole)
    assert count_values(label) == counts == {float(v): int((label == v).sum()) for v in (0, 0.5, 4, 255)}
    label[-1, -1, -1] = 9
    with pytest.raises(DataError, match="holds 9"):
        class_indices(label, PLAN)
