"""Building networks from a plan, and rounding patches to what they divide by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import build_network, round_patch, size_divisor

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


def test_size_divisor_of_definitions_and_other_ranks() -> None:
    assert size_divisor(CONV, 2) == (1, 1, 1)
    flat = {**UNET, "spatial_dims": 2, "channels": [4, 8, 16], "strides": [[2, 1], 2]}
    assert size_divisor(flat, 1, spatial_dims=2) == (4, 2)
    with pytest.raises(ConfigError, match="4 channel"):
        size_divisor(CONV, 4)
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
        size_divisor(fixed, 1)


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from([1, 2, 3, 8, 16, 32])), min_size=1, max_size=3
    ),
    mode=st.sampled_from(["up", "down", "nearest"]),
)
@hypothesis_settings(deadline=None, max_examples=60, derandomize=True)
def test_round_patch(sizes: list[tuple[int, int]], mode: str) -> None:
    patch, divisor = zip(*sizes, strict=True)
    rounded = round_patch(patch, divisor, mode)
    for size, d, got in zip(patch, divisor, rounded, strict=True):
        multiples = list(range(d, 700, d))
        below = [m for m in multiples if m <= size] or [d]
        expected = {
            "up": min(m for m in multiples if m >= size),
            "down": below[-1],
            "nearest": min(multiples, key=lambda m: (abs(m - size), -m)),
        }[mode]
        assert got == expected


def test_round_patch_refuses() -> None:
    with pytest.raises(ValueError, match="as many"):
        round_patch((3, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="sideways"):
        round_patch((3, 4), 2, "sideways")
    with pytest.raises(ValueError, match="positive"):
        round_patch((3, 0), 2)
