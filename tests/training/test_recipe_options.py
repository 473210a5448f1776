"""The options that every recipe has, and the user-written recipe that docs/recipes.md shows."""

from __future__ import annotations

import copy
import functools
import inspect
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import medseg_supcon.views
from medseg_supcon.bundle import dump_commented, load_commented, merge, parse_setting, read_recipe, set_key
from medseg_supcon.errors import ConfigError

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
    optimizer = parser_of(trained_run, settings=[f"optimizer::_target_=torch.optim.{name}"]).get_parsed_content(
        "optimizer"
    )
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
    recipe.write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    parser = parser_of(trained_run, read_recipe(recipe))
    optimizer = parser.get_parsed_content("optimizer")
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD
    assert group["momentum"] == 0.9 and group["nesterov"] and group["lr"] == 0.01
    names = [[type(t).__name__ for t in p.transforms] for p in parser.get_parsed_content("train::two_views").policies]
    assert names == [["AffinePatchd"], ["AffinePatchd", "SomeOf"]]


VIEWS = ("identity", "crop_resize", "simclr", "randaugment", "standard")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("recipe", ["joint", "two_stage"])
def test_a_view_policy_is_swapped_by_its_name_alone(trained_run, recipe, name):
    setting = f"view_2::_target_=medseg_supcon.views.{name}_view"
    parser = parser_of(trained_run, read_recipe(recipe), [setting])
    two_views = parser.get_parsed_content("train::two_views").set_random_state(0)
    first, second = two_views.policies
    assert len(first.transforms) > 5  # view 1 stays as it was
    patch = parser.get_parsed_content("plan")["patch_size"]
    shifts = medseg_supcon.views.usual_scanner_shifts(["MRI"])
    alone = getattr(medseg_supcon.views, f"{name}_view")(patch, bias_field=0.3, scanner_shifts=shifts)
    kinds = [type(t).__name__ for t in second.transforms]
    assert kinds == [type(t).__name__ for t in alone.transforms]
    scan = {"image": torch.rand(1, 30, 30, 30), "label": torch.ones(1, 30, 30, 30)}
    assert two_views(scan)["image"].shape == (2, 1, *patch)


def test_a_part_of_a_reference_is_set_in_a_copy_and_comments_stay_where_they_were(trained_run):
    tree = load_commented(trained_run / "configs" / "train.yaml")
    before = dump_commented(tree)
    set_key(tree, "view_2::_target_", "medseg_supcon.views.randaugment_view", "train.yaml")
    set_key(tree, "view_2::magnitude", 0.7, "train.yaml")
    after = dump_commented(tree)
    section = """view_2:
  _target_: medseg_supcon.views.randaugment_view
  magnitude: 0.7
  patch_size: "$@plan['patch_size']"
  flip_axes: "$@plan['flip_axes']"
  spacing: "$@plan['spacing']"
  bias_field: "@bias_field"
  scanner_shifts: "@scanner_shifts"
"""
    assert after == before.replace('view_2: "@view_1"\n', section)
    with pytest.raises(ConfigError, match="has no key"):
        set_key(tree, "device::index", 1, "train.yaml")


TUNED = {
    "no normalisation before the projector": ["projection::normalise_input=false"],
    "wider projector": ["projection::hidden_channels=96", "projection::out_channels=48"],
    "euclidean": ["contrastive_loss::loss::similarity=euclidean", "projection::normalise_output=false"],
    "balanced by default": [],
    "unweighted": ["class_weights=null"],
    "class-weighted": ["sampling=uniform", "class_weights=$@plan['class_weights']"],
}


@pytest.mark.parametrize("recipe", ["joint", "two_stage"])
@pytest.mark.parametrize("case", TUNED)
def test_the_article_s_other_choices_are_settings(trained_run, recipe, case):
    parser = parser_of(trained_run, read_recipe(recipe), TUNED[case])
    loss, head = (parser.get_parsed_content(key) for key in ("contrastive_loss", "projection"))
    if case.startswith("no normalisation"):
        assert not head.normalise_input
    elif case == "wider projector":
        assert [layer.out_features for layer in head.layers if hasattr(layer, "out_features")] == [96, 48]
    elif case == "euclidean":
        assert loss.loss.similarity == "euclidean"
    elif case == "balanced by default":
        assert loss.loss.class_weights == "balanced"
    elif case == "unweighted":
        assert loss.loss.class_weights is None
    else:
        plan = parser.get_parsed_content("plan")
        assert list(loss.loss.class_weights) == pytest.approx(plan["class_weights"])
        assert loss.sampler.strategy == "uniform"
    features = torch.randn(2, head.in_channels, 6, 6, 6, requires_grad=True)
    value = loss(features, torch.randint(0, 6, (2, 1, 6, 6, 6)))
    value.backward()
    assert value > 0 and features.grad.abs().sum() > 0


def losses_per_class(z, y, temperature):
    """L_i of every voxel by a float64 loop: {class: [L_i, ...]}."""
    z, losses = z / np.linalg.norm(z, axis=1, keepdims=True), {}
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        scores = z @ z[i] / temperature
        top = scores[others].max()
        lse = top + np.log(np.exp(scores[others] - top).sum())
        losses.setdefault(int(y[i]), []).append(lse - scores[others & (y == y[i])].mean())
    return losses


@pytest.mark.parametrize("recipe", ["joint", "two_stage", "semi"])
@pytest.mark.parametrize("rare", [12, 150])  # voxels of class 2; with 300 samples, a third of them is its quota
def test_the_share_of_a_rare_class(trained_run, recipe, rare):
    generator = torch.Generator().manual_seed(rare)
    labels = torch.randint(2, (2, 1, 12, 12, 12), generator=generator)
    labels.view(-1)[torch.randperm(labels.numel(), generator=generator)[:rare]] = 2
    values = {}
    for settings in ([], ["class_weights=null"]):
        parser = parser_of(trained_run, read_recipe(recipe), ["contrast_samples=300", "projection=null", *settings])
        loss = parser.get_parsed_content("contrastive_loss")
        features = torch.randn(2, 8, 12, 12, 12, generator=torch.Generator().manual_seed(0))
        features += 2.0 * (labels == 0)  # class 0 is compact, the others are scattered
        torch.manual_seed(1)
        voxels = loss.sampler(labels[:, 0]).indices
        torch.manual_seed(1)
        values["null" if settings else "default"] = loss(features, labels).item()
    z, y = features.movedim(1, -1).reshape(-1, 8)[voxels].double().numpy(), labels.flatten()[voxels].numpy()
    losses = losses_per_class(z, y, parser.get_parsed_content("temperature"))
    mean = {c: sum(values) / len(values) for c, values in losses.items()}
    others = (mean[0] + mean[1]) / 2  # both fill their quotas: equal weights either way
    share = {name: (value - others) / (mean[2] - others) for name, value in values.items()}
    assert [len(losses[c]) for c in range(3)] == ([144, 144, 12] if rare == 12 else [100, 100, 100])
    assert abs(mean[2] - others) > 0.5
    assert share["default"] == pytest.approx(1 / 3, abs=1e-4)
    assert share["null"] == pytest.approx(12 / 300 if rare == 12 else 1 / 3, abs=1e-4)
    if rare > 12:
        assert values["default"] == pytest.approx(values["null"], rel=1e-6)


TARGETS = {  # what the page sets a component to, before it sets an argument of it
    "optimizer": "torch.optim.SGD",
    "view_2": "medseg_supcon.views.randaugment_view",
}


def test_every_key_that_the_documentation_sets_exists(trained_run):
    shown = re.findall(r"--set ((?!KEY)[\w:]+)=", PAGE.read_text(encoding="utf-8"))
    assert len(shown) > 8
    everything = {}
    for name in ("joint", "two_stage", "semi"):
        tree = load_commented(trained_run / "configs" / "train.yaml")
        merge(tree, read_recipe(name), "train.yaml")
        everything[name] = tree

    def known(tree, key):
        tree = copy.deepcopy(tree)
        try:
            set_key(tree, key, 0, "train.yaml")
        except ConfigError:
            return False
        *path, last = key.split("::")
        section = functools.reduce(lambda node, part: node[part], path, tree)
        if last == "_target_" or "_target_" not in section:
            return True
        made = pydoc.locate(TARGETS.get(key.rpartition("::")[0], section["_target_"]))
        return last in inspect.signature(made).parameters

    for key in shown:
        assert any(known(tree, key) for tree in everything.values()), key
