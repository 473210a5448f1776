"""Recipes and --set: the commented config keeps its comments and stays what PyYAML reads."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.bundle import (
    dump_commented,
    load_commented,
    merge,
    parse_setting,
    read_recipe,
    recipe_names,
    set_key,
    settings_at_fault,
    shared_folder,
)
from medseg_supcon.errors import ConfigError

TEMPLATE = shared_folder("bundles") / "segmentation" / "configs" / "train.yaml"


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_as_floats(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "rate.yaml"
    path.write_text("learning_rate: 1e-3 # of AdamW\n")
    tree = load_commented(path)
    set_key(tree, "learning_rate", value, "train.yaml")
    assert yaml.safe_load(dump_commented(tree))["learning_rate"] == value


def test_writing_changes_nothing_and_keeps_comments():
    text = dump_commented(load_commented(TEMPLATE))
    assert yaml.safe_load(text) == yaml.safe_load(TEMPLATE.read_text())
    assert text.count("#") >= TEMPLATE.read_text().count("# ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=1e-4", ("learning_rate", 1e-4)),
        ("a=3", ("a", 3)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=[1, 2.5]", ("a", [1, 2.5])),
        ("a={_target_: DynUNet, k: 1}", ("a", {"_target_": "DynUNet", "k": 1})),
        ("a={_target_: SGD, lr: 1e-3}", ("a", {"_target_": "SGD", "lr": 1e-3})),
        ("a=$@b * 2", ("a", "$@b * 2")),
        ("a=@b", ("a", "@b")),
        ("a=x=y", ("a", "x=y")),
    ],
)
def test_values_of_set(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["learning_rate", "=3", "a=[1,"])
def test_malformed_set_is_a_sentence(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(text)


def test_unknown_key_offers_the_near_one():
    with pytest.raises(ConfigError, match="learning_rate"):
        set_key({"learning_rate": 1}, "learning_rat", 2, "train.yaml")
    with pytest.raises(ConfigError, match="no key"):
        set_key({"train": {"trainer": {}}}, "train::trainer::nothing", 2, "train.yaml")
    with pytest.raises(ConfigError, match="3 entries"):
        set_key({"a": [1, 2, 3]}, "a::3", 2, "train.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_lies_over_the_template(name):
    tree = load_commented(TEMPLATE)
    merge(tree, read_recipe(name), name)
    assert yaml.safe_load(dump_commented(tree))


def test_unknown_recipe_names_the_known():
    with pytest.raises(ConfigError, match="joint"):
        read_recipe("join")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            ValueError("strategy must be one of a, b, got 'foo'"),
            "ValueError: strategy must be one of a, b, got 'foo'. ",
        ),
        (TypeError("not this.\nand more"), "TypeError: not this. "),
        (KeyError(), "KeyError. "),
    ],
)
def test_a_fault_of_the_settings_is_a_sentence(fault, says):
    with pytest.raises(ConfigError) as caught, settings_at_fault():
        raise fault
    assert str(caught.value).startswith(f"The settings are invalid: {says}Check --set")
