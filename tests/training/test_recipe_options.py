"""The options that every recipe has, and the recipe of one's own that docs/recipes.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from medseg_supcon.training import parse_setting, read_recipe
from medseg_supcon.training._overlay import load_commented, merge, set_key

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def parser_of(run, overlay=None, settings=()):
    """The run's train.yaml under an overlay and --set options."""
    tree = load_commented(run / "configs" / "train.yaml")
    merge(tree, overlay or {}, "train.yaml")
    for text in settings:
        set_key(tree, *parse_setting(text), "train.yaml")
    parser = ConfigParser()
    parser.read_config(tree)
    parser["bundle_root"], parser["device"] = str(run), "$torch.device('cpu')"
    return parser


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam"])
def test_the_optimiser_is_a_setting(trained_run, name):
    optimizer = parser_of(
        trained_run, settings=[f"optimizer::_target_=torch.optim.{name}"]
    ).get_parsed_content("optimizer")
    assert type(optimizer) is getattr(torch.optim, name)


def rates(parser, steps):
    optimizer, schedule = (parser.get_parsed_content(key) for key in ("optimizer", "lr_scheduler"))
    found = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_learning_rate_decays_or_stays(trained_run):
    settings = ["epochs=10", "steps_per_epoch=10", "learning_rate=0.5"]
    decayed = rates(parser_of(trained_run, settings=settings), 100)
    fixed = rates(parser_of(trained_run, settings=[*settings, "lr_decay=false"]), 100)
    assert decayed[-1] == pytest.approx(0) and decayed[:9] == fixed[:9]
    assert fixed[10:] == [0.5] * 90


def test_without_augmentation_both_views_are_the_patch(trained_run):
    parser = parser_of(trained_run, settings=["augmentation=false"])
    policies = parser.get_parsed_content("train::two_views").policies
    assert [len(p.transforms) for p in policies] == [1, 1]
    augmented = parser_of(trained_run).get_parsed_content("train::two_views").policies
    assert all(len(p.transforms) > 5 for p in augmented)


def test_the_recipe_in_the_documentation_is_one(trained_run, tmp_path):
    recipe = tmp_path / "my_recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    parser = parser_of(trained_run, read_recipe(recipe))
    optimizer = parser.get_parsed_content("optimizer")
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD
    assert group["momentum"] == 0.9 and group["nesterov"] and group["lr"] == 0.01
    names = [type(p.transforms[0]).__name__ for p in parser.get_parsed_content("train::two_views").policies]
    assert names == ["RandAffined", "CenterSpatialCropd"]


def test_every_key_that_the_documentation_sets_exists(trained_run):
    shown = re.findall(r"--set ((?!KEY)[\w:]+)=", PAGE.read_text())
    assert len(shown) > 8
    everything = {}
    for name in ("joint", "two_stage", "semi"):
        tree = load_commented(trained_run / "configs" / "train.yaml")
        merge(tree, read_recipe(name), "train.yaml")
        everything[name] = tree

    def known(tree, key):
        for part in key.split("::"):
            if not isinstance(tree, dict) or part not in tree:
                return False
            tree = tree[part]
        return True

    for key in shown:
        assert any(known(tree, key) for tree in everything.values()), key
