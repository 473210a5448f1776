"""A recipe that starts from another one."""

from __future__ import annotations

import pytest
import yaml

from medseg_supcon.bundle import describe_recipe, read_recipe
from medseg_supcon.errors import ConfigError


def write(folder, **recipes):
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in recipes}


def test_a_recipe_goes_over_its_base_and_its_bases_base(tmp_path):
    files = write(
        tmp_path,
        one="base: semi\ncontrast_weight: 0.0\n",
        two="base: one.yaml\nconfidence: 0.5\nview_1: {_target_: x}\n",
    )
    semi = read_recipe("semi")
    two = read_recipe(files["two"])
    assert two == semi | {"contrast_weight": 0.0, "confidence": 0.5, "view_1": {"_target_": "x"}}
    assert list(two)[-2:] == ["confidence", "view_1"], "what a recipe says itself comes last"
    assert yaml.safe_load(files["two"].read_text())["base"] == "one.yaml"


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    """PyYAML reads 1e-3 as a string."""
    text = "learning_rate: 1e-3\noptimizer: {_target_: torch.optim.SGD, betas: [9E-1, +.5e0], name: 1e-x}\n"
    recipe = read_recipe(write(tmp_path, a=text)["a"])
    optimizer = {"_target_": "torch.optim.SGD", "betas": [0.9, 0.5], "name": "1e-x"}
    assert recipe == {"learning_rate": 0.001, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("comment", "says"),
    [
        ("# mine: Contrast late: less\n# noise. More text.\n", "Contrast late: less noise."),
        ("# Contrast late: less noise\n", "Contrast late: less noise"),
        ("", ""),
    ],
)
def test_a_recipe_describes_itself(tmp_path, comment, says):
    assert describe_recipe(write(tmp_path, mine=comment + "seed: 1\n")["mine"]) == says


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: a.yaml\n", "is based on itself"),
        ("base: nothing\n", "recipe 'nothing' does not exist"),
        ("seed: 1\nbase: [\n", r"a\.yaml is not valid YAML: .* line 3"),
    ],
)
def test_a_recipe_that_leads_nowhere_is_a_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(write(tmp_path, a=text)["a"])


@pytest.mark.parametrize("value", ["!!binary aGVsbG8=", "!!set {a, b}", "2020-01-01", "!!omap [a: 1]"])
def test_what_json_does_not_have_is_a_sentence(tmp_path, value):
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_recipe(write(tmp_path, a=f"seed: {value}\n")["a"])


def test_a_key_that_is_not_a_text_becomes_one(tmp_path):
    assert read_recipe(write(tmp_path, a="~: 3\n7: 4\n")["a"]) == {"None": 3, "7": 4}
