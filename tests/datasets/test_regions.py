"""Overlapping regions: nnU-Net's declaration of them, and label map to masks and back, against loops over voxels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_supcon.datasets import Regions, check_dataset, fingerprint, mask_labels, read_dataset
from medseg_supcon.errors import ConfigError, DataError
from medseg_supcon.plan import make_plan, validate_plan

BRATS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": 3}


def plan_of(regions: dict[str, list[int]], order: list[int]) -> dict:
    values = sorted({value for held in regions.values() for value in held})
    labels = {"background": 0} | {f"label {value}": value for value in values}
    return {"labels": labels, "regions": regions, "regions_class_order": order}


@st.composite
def plans(draw):
    sets = draw(st.lists(st.sets(st.integers(1, 5), min_size=1), min_size=1, max_size=4, unique_by=frozenset))
    plan = plan_of({f"r{number}": sorted(held) for number, held in enumerate(sets)}, [])
    values = list(plan["labels"].values())[1:]
    return plan | {"regions_class_order": [draw(st.sampled_from(values)) for _ in sets]}


def written(value: int, plan: dict) -> int:
    """nnU-Net's rule for one voxel whose label is known."""
    result = 0
    for held, own in zip(plan["regions"].values(), plan["regions_class_order"], strict=True):
        if value in held:
            result = own
    return result


@given(plans(), st.integers(0, 2**32 - 1))
def test_label_map_to_masks_and_back(plan, seed):
    regions, values = Regions.of(plan), list(plan["labels"].values())
    classes = np.random.default_rng(seed).integers(-1, len(values), (3, 2, 2))
    masks = regions.masks(classes)
    back = regions.paint(masks.astype(float))
    for place in np.ndindex(classes.shape):
        value = None if classes[place] < 0 else values[classes[place]]
        for number, held in enumerate(plan["regions"].values()):
            assert masks[(number, *place)] == (value in held)
        assert values[back[place]] == (0 if value is None else written(value, plan))


@given(plans())
def test_which_regions_a_written_mask_loses(plan):
    values = list(plan["labels"].values())

    def within(value):
        return {name for name, held in plan["regions"].items() if value in held}

    expected = {
        values.index(v): values.index(written(v, plan)) for v in values if within(v) != within(written(v, plan))
    }
    assert Regions.of(plan).lost() == expected


@given(plans(), st.data())
def test_what_leaves_a_region_leaves_those_inside_it(plan, data):
    values, held = list(plan["labels"].values()), list(plan["regions"].values())
    r = data.draw(st.integers(0, len(held) - 1))
    for c, found in enumerate(Regions.of(plan).without(r)):
        left = 0
        for other, own in zip(held, plan["regions_class_order"], strict=True):
            if values[c] in other and not set(other) <= set(held[r]):
                left = own
        assert values[found] == (0 if left in held[r] else left)


def test_brats_as_nnunet_declares_it(tmp_path, disk):
    labels = {**BRATS, "ignore": 4}
    root = disk.nnunet(tmp_path, labels=labels, regions_class_order=[2, 1, 3])
    dataset = read_dataset(root)
    assert dataset.labels == {"background": 0, "label 1": 1, "label 2": 2, "enhancing tumor": 3}
    assert dataset.regions == {"whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}
    assert dataset.regions_class_order == (2, 1, 3) and dataset.ignore_label == 4 and dataset.warnings == ()
    assert list(mask_labels(dataset.label_plan)) == ["background", "whole tumor", "tumor core", "enhancing tumor"]
    assert Regions.of(dataset.label_plan).lost() == {}


def test_lists_of_one_value_are_classes(tmp_path, disk):
    root = disk.nnunet(tmp_path, labels={"background": [0], "a": [1], "b": 2}, regions_class_order=[1, 2])
    dataset = read_dataset(root)
    assert dataset.labels == {"background": 0, "a": 1, "b": 2} and not dataset.regions
    assert "regions" not in dataset.label_plan


@pytest.mark.parametrize(
    ("labels", "order", "error", "words"),
    [
        ({"background": 0, "a": [1, 2], "b": 2}, None, ConfigError, r"regions_class_order.*\(a, b\).*it is missing"),
        ({"background": 0, "a": [1, 2], "b": 2}, [1], ConfigError, r"regions_class_order.*found \[1\]"),
        ({"background": 0, "a": [1, 2], "b": 2}, [1, 7], ConfigError, "each one of 1, 2"),
        ({"background": 0, "a": [1, 2], "b": 2}, [0, 1], ConfigError, "each one of 1, 2"),
        ({"background": 0, "a": [1, "x"]}, [1], DataError, "'a' must be a list of label values"),
        ({"background": 0, "a": [1, 2], "b": []}, [1, 2], DataError, "'b' must be a list of label values"),
        ({"background": 0, "a": [0, 1]}, [1], DataError, "'a' contains the value of 'background'"),
        ({"a": [0, 1]}, [1], DataError, "'a' contains the value of 'background'"),
        ({"background": 0, "a": [1, 2], "ignore": 2}, [1], DataError, "'a' contains the value of 'ignore'"),
        ({"background": 0, "a": [1, 2], "b": [2, 1]}, [1, 2], DataError, "'a' and 'b' are the same values"),
        ({"background": 0, "a": [1, 2], "label 1": 2}, [1, 2], DataError, "called like another label"),
    ],
)
def test_regions_that_cannot_be(tmp_path, disk, labels, order, error, words):
    root = disk.nnunet(tmp_path, labels=labels, regions_class_order=order)
    with pytest.raises(error, match=words):
        read_dataset(root)


def test_check_warns_if_a_mask_cannot_give_back_the_regions(tmp_path, disk):
    labels = {"background": 0, "left": [1, 2], "right": 2}
    for order, expected in (([1, 2], []), ([2, 1], ["lost_regions"])):
        root = disk.nnunet(tmp_path / str(order[0]), labels=labels, regions_class_order=order)
        found = [finding for finding in check_dataset(read_dataset(root)).findings if "regions" in finding.code]
        assert [finding.code for finding in found] == expected
    assert "a voxel of 2 (in left, right) is written as 1 (in left)" in found[0].message
    assert found[0].severity == "warning"


def test_the_plan_has_an_output_and_a_volume_per_region(tmp_path, disk):
    labels = {"background": 0, "kidney": [1, 2], "tumor": 2}
    dataset = read_dataset(disk.nnunet(tmp_path, labels=labels, regions_class_order=[1, 2]))
    found = fingerprint(dataset)
    plan = make_plan(found, dataset)
    validate_plan(plan)
    assert plan["network_def"]["out_channels"] == 2
    assert list(plan["segments"]) == ["kidney", "tumor"] == list(plan["fingerprint"]["volume_ml"])
    assert len(plan["class_weights"]) == 3
    counts = np.array([case.class_voxels for case in found.cases])
    ml = counts[:, 1:].sum(axis=1) * np.prod([case.spacing for case in found.cases], axis=1) / 1000
    volume = plan["fingerprint"]["volume_ml"]["kidney"]
    assert [volume["min"], volume["max"]] == pytest.approx([ml.min(), ml.max()], rel=1e-3)
    wrong = {
        "regions": [
            {},
            {"a": [1, 9], "b": [2]},
            {"a": [1]},
            {"a": [1, 2], "b": [2, 1]},
            {"a": [0, 1, 2]},
            {"a": []},
            3,
        ],
        "regions_class_order": [[1], [1, 9], [0, 1], "12"],
        "keep_largest": [["background"], ["label 1"]],
        "segments": [{"label 1": {}}],
    }
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(ConfigError, match=f'"{key}" must be'):
                validate_plan(plan | {key: value})
    validate_plan(plan | {"keep_largest": ["tumor"]})
    del plan["regions_class_order"]
    with pytest.raises(ConfigError, match="belong together"):
        validate_plan(plan)
