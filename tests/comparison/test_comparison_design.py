"""Which cases train, validate and test in a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_supcon.comparison import design_comparison, read_comparison, unequal_recipes
from medseg_supcon.datasets import Case, Dataset
from medseg_supcon.errors import ConfigError, DataError

PAIR = ["dice_ce", "joint"]


def dataset(number=12, bare=2, patients=None):
    cases = [
        Case(f"c{i:02d}", (Path(f"c{i:02d}.nii"),), Path(f"l{i:02d}.nii"), patients[i] if patients else None)
        for i in range(number)
    ]
    cases += [Case(f"u{i}", (Path(f"u{i}.nii"),)) for i in range(bare)]
    return Dataset(Path("data"), "toy", tuple(cases), ("MRI",), {"background": 0, "organ": 1})


def designed(dataset, recipes, seeds, labels, **chosen):
    return design_comparison(dataset, read_comparison(recipes=recipes, seeds=seeds, labels=labels), **chosen)


def names(cases):
    return {case.name for case in cases}


def learnt(split):
    return names(split.training) | names(split.validation)


def apart(design):
    """No run sees a test scan, with or without its label."""
    for split in design.splits.values():
        assert not names(design.test) & (learnt(split) | names(split.unlabelled))
        assert not names(split.training) & names(split.validation)


def test_budgets_are_nested_and_the_rest_tests():
    design = designed(dataset(), PAIR, [0, 1], [6, 3])
    assert list(design.splits) == [3, 6]
    assert learnt(design.splits[3]) < learnt(design.splits[6])
    assert len(design.test) == 6 and all(case.label is not None for case in design.test)
    apart(design)
    assert {"u0", "u1"} <= names(design.splits[3].unlabelled)
    assert len(design.cells) == 8 and len({cell.name for cell in design.cells}) == 8


def test_a_recipe_without_its_unlabelled_scans_is_refused_at_once():
    with pytest.raises(ConfigError, match="--test-cases"):
        designed(dataset(bare=0), ["dice_ce", "semi"], [0], [4])  # the other 8 are tested on
    design = designed(dataset(bare=0), ["dice_ce", "semi"], [0], [4], test_cases=["c01", "c05"])
    assert len(design.splits[4].unlabelled) == 6
    assert designed(dataset(bare=2), ["dice_ce", "semi"], [0], [4]).splits[4].unlabelled


def test_named_test_cases_leave_the_pool():
    design = designed(dataset(), PAIR, [0], [4, "all"], test_cases=["c01", "c05"])
    assert names(design.test) == {"c01", "c05"}
    assert list(design.splits) == [4, 10]
    apart(design)
    assert len(design.splits[4].unlabelled) == 8


def test_what_the_pool_leaves_out_tests():
    design = designed(dataset(), PAIR, [0], ["all"], cases=[f"c{i:02d}" for i in range(8)])
    assert names(design.test) == {"c08", "c09", "c10", "c11"}
    apart(design)


def test_some_cases_are_put_aside_where_all_would_train():
    design = designed(dataset(), PAIR, [0], ["all"])
    assert len(design.test) == 3 and list(design.splits) == [9]
    assert "chosen at random" in design.tested_on
    apart(design)


def test_the_training_seed_does_not_change_the_split():
    first, second = (designed(dataset(), PAIR, [s], [5]) for s in (0, 7))
    assert first.splits == second.splits and first.test == second.test
    other = designed(dataset(), PAIR, [0], [5], split_seed=3)
    assert learnt(other.splits[5]) != learnt(first.splits[5])


def test_a_patient_is_on_one_side():
    patients = [f"p{i // 2}" for i in range(12)]
    design = designed(dataset(patients=patients), PAIR, [0], [3])
    trained = {case.patient for s in design.splits.values() for case in (*s.training, *s.validation)}
    assert not trained & {case.patient for case in design.test}
    with pytest.raises(DataError, match="patient 'p0'"):
        designed(dataset(patients=patients), PAIR, [0], [3], test_cases=["c00"])


def test_a_recipe_may_stand_twice_and_is_trained_once(tmp_path):
    design = designed(dataset(), ["joint", "joint"], [0], [4])
    assert list(design.recipes) == ["joint"] and len(design.config.recipes) == 2 and len(design.cells) == 1
    (tmp_path / "joint.yaml").write_text("contrast_weight: 0.7\n")
    with pytest.raises(ConfigError, match="different recipes with the same name"):
        designed(dataset(), ["joint", str(tmp_path / "joint.yaml")], [0], [4])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"recipes": ["joint"]}, ConfigError, "at least two"),
        ({"recipes": ["joint", "jiont"]}, ConfigError, "Did you mean joint"),
        (
            {"recipes": {"a/b": {"recipe": "joint"}, "joint": {"recipe": "joint"}}},
            ConfigError,
            "'a/b' cannot be used in the name of a folder",
        ),
        ({"seeds": []}, ConfigError, "--seeds"),
        ({"seeds": [0, 1, 0]}, ConfigError, "--seeds: 0 is given twice"),
        ({"labels": [5, 5]}, ConfigError, "--labels: 5 is given twice"),
        ({"labels": ["all", "all"]}, ConfigError, "--labels: all is given twice"),
        ({"labels": [0]}, ConfigError, "--labels must be a list of whole numbers from 1, or 'all'; found"),
        ({"recipes": ["dice_ce", "joint", "joint"]}, ConfigError, "--recipes: joint is given twice"),
        ({"labels": [99]}, DataError, "--labels 99: in addition to 3 test cases, .* has 9 labelled cases"),
        ({"test_cases": ["nobody"]}, DataError, "nobody"),
        ({"test_cases": ["u0"]}, DataError, "no label map"),
        ({"test_cases": ["c00"], "cases": ["c00", "c01"]}, DataError, "in --cases and in --test-cases"),
        ({"test_cases": [f"c{i:02d}" for i in range(12)]}, DataError, "no case has a label map"),
    ],
)
def test_faults_are_sentences(change, error, says):
    arguments = {"recipes": PAIR, "seeds": [0], "labels": ["all"]} | change
    with pytest.raises(error, match=says):
        designed(dataset(), **arguments)


def test_what_is_not_equal_is_said():
    wide = {"recipe": "joint", "network_def": "$torch.nn.Conv3d(1, 2, 1)", "plan::batch_size": 4}
    design = designed(dataset(), {"joint": {"recipe": "joint"}, "wide": wide}, [0, 1], [4])
    assert unequal_recipes(design) == [
        "wide sets its own batch_size, so its budget differs from the baseline's.",
        "wide has its own network.",
    ]


def test_one_labelled_case_cannot_be_compared_on():
    with pytest.raises(DataError, match="two labelled patients"):
        designed(dataset(number=1), PAIR, [0], ["all"])
