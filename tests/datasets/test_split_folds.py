"""Folds: every labelled case is held out once, patients stay together, declared folds are honoured or refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_supcon.datasets import Case, Dataset, Folds, read_dataset, split_cases, split_folds
from medseg_supcon.errors import DataError


def dataset_of(patients, unlabelled=0, folds=None):
    cases = [Case(f"c{i}", (Path(f"i{i}"),), Path(f"l{i}"), patient) for i, patient in enumerate(patients)]
    cases += [Case(f"u{i}", (Path(f"u{i}"),)) for i in range(unlabelled)]
    return Dataset(Path("data"), "toy", tuple(cases), ("MRI",), {"background": 0, "a": 1}, folds=folds)


def parts(*held_out, names):
    return tuple((frozenset(names) - set(part), frozenset(part)) for part in held_out)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=24), st.integers(2, 5), st.integers(0, 3))
def test_every_case_is_held_out_once_and_patients_stay_together(patients, number, seed):
    if len(set(patients)) < number:
        with pytest.raises(DataError, match="labelled patient"):
            split_folds(dataset_of(list(map(str, patients))), number, seed=seed)
        return
    dataset = dataset_of(list(map(str, patients)), unlabelled=2)
    splits = split_folds(dataset, number, seed=seed)
    assert len(splits) == number
    assert Counter(c.name for s in splits for c in s.validation) == Counter(f"c{i}" for i in range(len(patients)))
    for split in splits:
        assert split.training and split.validation
        assert {c.name for c in (*split.training, *split.validation)} == {f"c{i}" for i in range(len(patients))}
        assert not {c.patient for c in split.training} & {c.patient for c in split.validation}
        assert {c.name for c in split.unlabelled} == {"u0", "u1"}
    turned = split_folds(replace(dataset, cases=dataset.cases[::-1]), number, seed=seed)
    assert [s.validation for s in turned] == [s.validation for s in splits]


def test_folds_of_single_scans_are_of_equal_size():
    sizes = [len(split.validation) for split in split_folds(dataset_of([None] * 11), 3)]
    assert sorted(sizes) == [3, 4, 4]
    with pytest.raises(ValueError, match="at least 2"):
        split_folds(dataset_of([None] * 11), 1)


def test_a_budget_has_the_cases_of_a_single_run():
    dataset = dataset_of([None] * 10)
    one = split_cases(dataset, labels=6, seed=3)
    for split in split_folds(dataset, 3, labels=6, seed=3):
        assert {*split.training, *split.validation} == {*one.training, *one.validation}
        assert len(split.unlabelled) == 4 and not any(case.label for case in split.unlabelled)


NAMES = [f"c{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("held_out", "patients", "sentence"),
    [
        ([["c0", "c1"], ["c2", "c3"]], None, "has 2 folds, but 3"),
        ([["c0"], ["c0", "c1"], ["c2", "c3", "c4", "c5"]], None, "'c0' is in the validation part of fold 1"),
        ([["c0", "c1"], ["c2", "c3"], ["c4", "c5"]], "abbcdd", "patient 'b' is used both"),
        ([["c0", "c1", "c2"], [], ["c3", "c4", "c5"]], None, "fold 1 has no labelled case for validation"),
    ],
)
def test_declared_folds_that_do_not_hold(held_out, patients, sentence):
    folds = Folds("list.json", parts(*held_out, names=NAMES))
    with pytest.raises(DataError, match=sentence):
        split_folds(dataset_of(list(patients) if patients else [None] * 6, folds=folds), 3)


def test_a_case_that_is_only_trained_on_is_said():
    everyone = frozenset(NAMES)
    folds = Folds("s.json", tuple((everyone - {a, b}, frozenset({a, b})) for a, b in (("c0", "c1"), ("c2", "c3"))))
    splits = split_folds(dataset_of([None] * 6, folds=folds), 2)
    assert {c.name for c in splits[0].training} == {"c2", "c3", "c4", "c5"}
    assert "2 cases (such as 'c" in splits[0].warnings[0] and "no score" in splits[0].warnings[0]


def with_folds(root, values):
    content = json.loads((root / "dataset.json").read_text())
    for item, value in zip(content["training"], values, strict=True):
        item |= {} if value is None else {"fold": value}
    (root / "dataset.json").write_text(json.dumps(content))
    return read_dataset(root)


def test_the_fold_key(tmp_path, disk):
    splits = split_folds(with_folds(disk.decathlon(tmp_path, cases=6), [2, 0, 1, 0, 10, 2]), 4)
    held_out = [{c.name[-1] for c in split.validation} for split in splits]
    assert held_out == [{"1", "3"}, {"2"}, {"0", "5"}, {"4"}]
    assert all({c.name[-1] for c in s.training} == set("012345") - own for s, own in zip(splits, held_out, strict=True))


def test_a_case_without_a_fold(tmp_path, disk):
    dataset = with_folds(disk.decathlon(tmp_path), [0, 1, None, 1])
    with pytest.raises(DataError, match=r'"fold" has 1 labelled case \(such as \'case_2\'\) in no fold'):
        split_folds(dataset, 2)
    assert len(split_folds(dataset.select(["case_0", "case_1", "case_3"]), 2)) == 2


def nnunet_splits(*held_out, cases=4):
    names = {f"case_{n}" for n in range(cases)}
    return json.dumps([{"train": sorted(names - set(part)), "val": list(part)} for part in held_out])


@pytest.mark.parametrize("place", ["nnUNet_raw/Dataset001_Toy", "nnUNet_preprocessed/Dataset001_Toy"])
def test_nnunets_splits(tmp_path, disk, place):
    root = disk.nnunet(tmp_path / "nnUNet_raw" / "Dataset001_Toy")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "splits_final.json").write_text(nnunet_splits(("case_3", "case_1"), ("case_0", "case_2")))
    dataset = read_dataset(root)
    held_out = [{c.name for c in split.validation} for split in split_folds(dataset, 2)]
    assert held_out == [{"case_1", "case_3"}, {"case_0", "case_2"}]
    assert {c.name for c in split_cases(dataset).validation} == held_out[0]  # as nnU-Net's fold 0
    with pytest.raises(DataError, match=r"splits_final.json has 2 folds, but 5 were asked for"):
        split_folds(dataset, 5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "must be a list of splits"),
        ("{}", "must be a list of splits"),
        ("[", "is not a readable JSON file"),
        ('[{"train": ["case_0"]}]', "entry 0 must be"),
        ('[{"train": ["case_0"], "val": ["case_1", 3]}]', "entry 0 must be"),
        ('[{"train": ["case_0"], "val": ["case_11"]}]', "no case is called 'case_11' .*Did you mean 'case_1'"),
    ],
)
def test_a_damaged_splits_file(tmp_path, disk, text, sentence):
    root = disk.nnunet(tmp_path)
    (root / "splits_final.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_dataset(root)


def test_the_data_list_comes_before_nnunets_splits(tmp_path, disk):
    root = disk.decathlon(tmp_path)
    (root / "splits_final.json").write_text(nnunet_splits(("case_3", "case_1"), ("case_0", "case_2")))
    dataset = with_folds(root, [0, 0, 1, 1])
    assert dataset.validation == {"case_0", "case_1"} and "is not used" in dataset.warnings[0]
    assert [c.name for c in split_folds(dataset, 2)[1].training if c.name == "case_0"]
