"""Building networks from a plan, and rounding patches to what they divide by."""

from __future__ import annotations

import importlib
import inspect
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import build_network, chain, definition_problem, round_patch, size_divisor

UNET = {"_target_": "monai.networks.nets.UNet", "in_channels": 1, "out_channels": 2}
CONV = {"_target_": "torch.nn.Conv3d", "in_channels": 2, "out_channels": 3, "kernel_size": 1}


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ({"_target_": "monai.networks.nets.UNnet", "spatial_dims": 3}, "UNnet"),
        ({"_target_": "NoSuchNetwork"}, "NoSuchNetwork"),
        ({**CONV, "filters": 3}, "filters"),
        ({"_target_": "torch.nn.Conv3d", "in_channels": 2}, "out_channels"),
        ({"in_channels": 2}, "_target_"),
        ("UNet", "begin with"),
        ("$torch.nn.Conv9d(1, 2, 1)", "Conv9d"),
        ("$1 + 1", "not a torch.nn.Module"),
    ],
)
def test_a_wrong_definition_is_a_sentence(definition: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_network(definition, trust=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_an_expression_needs_trust() -> None:
    expression = "$torch.nn.Conv3d(2, 3, 1)"
    with pytest.raises(ConfigError, match="--trust"):
        build_network(expression)
    assert isinstance(build_network(expression, trust=True), torch.nn.Conv3d)


def test_channels_must_fit_the_plan() -> None:
    assert isinstance(build_network(CONV, in_channels=2, num_classes=3), torch.nn.Conv3d)
    with pytest.raises(ConfigError, match="out_channels to 4"):
        build_network(CONV, num_classes=4)
    for scans, takes in ((1, 2), (4, 1)):
        with pytest.raises(ConfigError, match=f"in_channels to {scans}"):
            build_network({**CONV, "in_channels": takes}, in_channels=scans)


def test_the_definition_is_left_as_it_was() -> None:
    definition = dict(CONV)
    build_network(definition)
    assert definition == CONV


def test_size_divisor_of_other_ranks_and_networks_that_do_not_run() -> None:
    assert size_divisor(build_network(CONV), 2) == (1, 1, 1)
    flat = {**UNET, "spatial_dims": 2, "channels": [4, 8, 16], "strides": [[2, 1], 2]}
    assert size_divisor(build_network(flat), 1, spatial_dims=2) == (4, 2)
    with pytest.raises(ConfigError, match="4 channel"):
        size_divisor(build_network(CONV), 4)
    fixed = {
        "_target_": "UNETR",
        "in_channels": 1,
        "out_channels": 2,
        "img_size": [32, 32, 32],
        "feature_size": 4,
        "hidden_size": 12,
        "num_heads": 2,
    }
    with pytest.raises(ConfigError, match="any patch size"):
        size_divisor(build_network(fixed), 1)


@given(sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 33)), min_size=1, max_size=3))
@hypothesis_settings(deadline=None, max_examples=60, derandomize=True)
def test_round_patch(sizes: list[tuple[int, int]]) -> None:
    rounded = round_patch(*zip(*sizes, strict=True))
    for (size, d), got in zip(sizes, rounded, strict=True):
        assert got == min(m for m in range(d, 700, d) if m >= size)


def test_round_patch_refuses_another_number_of_axes() -> None:
    with pytest.raises(ValueError, match="longer"):
        round_patch((3, 4), (2, 2, 2))


NETS, BLOCKS = "monai.networks.nets", "monai.networks.blocks"
DANGEROUS = {
    "downloads when asked": {"_target_": "DenseNet121", "spatial_dims": 2, "pretrained": True},
    "downloads by default": {"_target_": "EfficientNetBN", "model_name": "efficientnet-b0"},
    "downloads by default, a block": {"_target_": f"{BLOCKS}.FCN"},
    "downloads by default, inside": chain({"_target_": f"{BLOCKS}.MCFCN"}),
    "downloads an embedding": {"_target_": f"{BLOCKS}.TextEncoder", "out_channels": 2},
    "downloads from an address": {"_target_": "HoVerNet", "pretrained_url": "https://example.org/weights.pth"},
    "calls a function of torchvision": {"_target_": "TorchVisionFCModel", "model_name": "get_model"},
    "calls a function of torchvision, too": {"_target_": "MILModel", "num_classes": 2, "pretrained": False},
    "loads torchvision's weights": {"_target_": f"{NETS}.TorchVisionFCModel", "weights": "DEFAULT"},
    "loads a file": {"_target_": f"{NETS}.cell_sam_wrapper.CellSamWrapper", "checkpoint": None},
    "loads a model of a hub": {"_target_": f"{NETS}.transchex.Transchex", "path_or_repo_id": None},
    "is not a network": {"_target_": "torch.nn.utils.parametrize.ParametrizationList"},
    "starts processes' talk": {"_target_": "torch.nn.parallel.DistributedDataParallel", "module": CONV},
    "by way of another package": {"_target_": f"{NETS}.vista3d.monai.networks.nets.UNet"},
    "by way of a private name": {"_target_": "torch.nn.modules.conv._ConvNd"},
    "hides in an argument": {**UNET, "act": ["prelu", {"pretrained": "weights.pt"}]},
    "a key that is a path": {**UNET, "act::_target_": "os.system"},
    "a number beyond memory": {**CONV, "out_channels": 10**12},
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_stock_class_that_loads_or_calls_is_refused(name: str) -> None:
    assert definition_problem(DANGEROUS[name]) is not None
    with pytest.raises(ConfigError, match="--trust"):
        build_network(DANGEROUS[name])


def test_what_loads_nothing_is_built() -> None:
    quiet = {"_target_": "EfficientNetBN", "model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2}
    assert isinstance(build_network(quiet), torch.nn.Module)
    with pytest.raises(ConfigError, match="--trust"):
        build_network({**quiet, "pretrained": 1.5})


def test_no_stock_class_that_passes_names_a_source_of_weights() -> None:
    """Every class that a definition can name without arguments, against the words for weights in its signature."""
    words = {"pretrained", "pretrained_url", "weights", "checkpoint", "path_or_repo_id", "filename"}
    for package in ("torch.nn", NETS, BLOCKS, "monai.networks.layers"):
        for name, found in vars(importlib.import_module(package)).items():
            target = f"{package}.{name}"
            if not isinstance(found, type) or definition_problem({"_target_": target}) is not None:
                continue
            for parameter in words & set(inspect.signature(found).parameters):
                assert not inspect.signature(found).parameters[parameter].default, target
                assert definition_problem({"_target_": target, parameter: "weights.pt"}) is not None, target


DEEP = {**UNET, "spatial_dims": 3, "channels": [4, 8], "strides": [2], "num_res_units": 10**8}
LARGE = [
    {**CONV, "in_channels": 1000, "out_channels": 1000, "kernel_size": 15},  # 13 GB of weights
    chain({"_target_": "torch.nn.ReLU"}, DEEP),
    {"_target_": "torch.nn.RNN", "input_size": 1, "hidden_size": 1, "num_layers": 10**8},
]


@pytest.mark.parametrize("definition", LARGE, ids=["wide", "deep", "long"])
def test_a_definition_cannot_fill_the_memory(definition: dict[str, object]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"more than 2,000,000,000 weights or 20,000 parts|allocate memory"):
        build_network(definition)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB
    assert isinstance(build_network(CONV), torch.nn.Conv3d)  # nothing is left of the limit's count
