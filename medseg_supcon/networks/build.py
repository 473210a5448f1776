"""A network from its definition in plan.json, and the patch sizes that it takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.bundle import ConfigParser
from torch import nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks.definition import definition_problem, instantiate
from medseg_supcon.networks.features import CONVOLUTIONS, FeatureTap


def build_network(
    network_def: Mapping[str, Any] | str,
    *,
    in_channels: int | None = None,
    num_classes: int | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network that a plan's ``network_def`` describes.

    Args:
        network_def: a dict with ``_target_`` (a network of torch or MONAI) and plain arguments, which may be such
            dicts; with ``trust`` anything that MONAI's config parser can evaluate.
        in_channels: channels of the scans; ``None``: not checked.
        num_classes: C, background included; ``None``: not checked.
        trust: evaluate a definition that is code.

    Raises:
        ConfigError: the definition names no class, is code without ``trust``, an argument is wrong, the result is
            not a network, or it does not take ``in_channels`` or give ``num_classes`` channels.

    Example:
        >>> build_network(
        ...     {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
        ... )
        Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    shown = _short(network_def)
    if isinstance(network_def, str) and not network_def.startswith("$"):
        raise ConfigError(
            f"network_def is the text {shown}: it must be a dict with _target_, or begin with $."
        )
    if isinstance(network_def, Mapping) and "_target_" not in network_def:
        raise ConfigError(f"network_def {shown} has no _target_: name the network's class there.")
    problem = definition_problem(network_def)
    if problem is not None and not trust:
        raise ConfigError(
            f"{problem}. It may run any code: pass --trust (trust=True) if you trust its author."
        )
    definition = dict(network_def) if isinstance(network_def, Mapping) else network_def
    try:
        if problem is None:
            network = instantiate(definition)
        else:
            network = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
    # whatever a class or an expression raises; the innermost cause says what is wrong with it
    except Exception as error:
        raise ConfigError(
            f"The network of the plan cannot be built from network_def {shown}: {_innermost(error)}. Correct "
            "the class name or its arguments in configs/plan.json."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network_def {shown} gives a {type(network).__name__}, not a torch.nn.Module.")
    _check_channels(network, shown, in_channels, num_classes)
    return network


def _check_channels(network: nn.Module, shown: str, in_channels: int | None, num_classes: int | None) -> None:
    # every network of MONAI defines the layer that reads the scan first
    taken = next((m.in_channels for m in network.modules() if isinstance(m, CONVOLUTIONS)), in_channels)
    if in_channels is not None and taken != in_channels:
        raise ConfigError(
            f"network_def {shown} takes {taken} channel(s), but the scans have {in_channels}: "
            f"set in_channels to {in_channels}."
        )
    if num_classes is None:
        return
    found = FeatureTap(network).out_channels
    if found != num_classes:
        raise ConfigError(
            f"network_def {shown} gives {found} channel(s), but the plan has {num_classes} classes, "
            f"background included: set its out_channels to {num_classes}."
        )


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(network_def: object) -> str:
    text = repr(network_def)
    return text if len(text) <= 200 else f"{text[:200]}..."


_DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
_BASE = 128  # divisible by all of them


def size_divisor(
    network: nn.Module | Mapping[str, Any], in_channels: int, spatial_dims: int = 3
) -> tuple[int, ...]:
    """The number that a patch's extent must be divisible by, per axis.

    Found by running shapes through the network with weights that hold nothing (PyTorch's meta device), so it
    costs a second at most and no memory. A network that pads for itself (BasicUNet) gives 1. In training an
    instance norm needs two voxels or more: let some axis have at least twice its divisor.

    Args:
        network: a network, or its plain ``network_def``.
        in_channels: channels of the scan.
        spatial_dims: axes of the scan.

    Returns:
        A power of two per axis.

    Raises:
        ConfigError: the network takes no patch of 128 voxels per axis, whose cure the message gives.

    Example:
        >>> size_divisor(torch.nn.Conv3d(1, 2, 3, padding=1), in_channels=1)
        (1, 1, 1)
    """
    if not isinstance(network, nn.Module):
        network = build_network(network)
    shadow = _weightless(network).eval()
    base = (_BASE,) * spatial_dims
    failure = _failure(shadow, in_channels, base)
    if failure is not None:
        raise ConfigError(
            f"{type(network).__name__} does not run on a patch of {base} voxels with {in_channels} "
            f"channel(s): {failure}. Give a network that takes any patch size, with in_channels as "
            "the scans have."
        )
    return tuple(_divisor_of_axis(shadow, in_channels, spatial_dims, axis) for axis in range(spatial_dims))


def round_patch(
    patch_size: Sequence[int], divisor: Sequence[int] | int, mode: Literal["up", "down", "nearest"] = "up"
) -> tuple[int, ...]:
    """The patch size brought to multiples of ``divisor``, at least one multiple per axis.

    Args:
        patch_size: voxels per axis.
        divisor: per axis, or one for all.
        mode: ``"up"``, ``"down"`` or ``"nearest"`` (a tie goes up).

    Raises:
        ValueError: a size or divisor is not positive, the lengths differ, or the mode is unknown.

    Example:
        >>> round_patch((40, 50, 33), 8)
        (40, 56, 40)
    """
    divisors = [divisor] * len(patch_size) if isinstance(divisor, int) else list(divisor)
    if len(divisors) != len(patch_size) or min([*divisors, *patch_size]) < 1:
        raise ValueError(
            f"patch_size and divisor must be as many positive numbers, got {patch_size}, {divisor}."
        )
    if mode not in ("up", "down", "nearest"):
        raise ValueError(f"mode is 'up', 'down' or 'nearest', got {mode!r}.")
    lift = {
        "up": [d - 1 for d in divisors],
        "down": [0] * len(divisors),
        "nearest": [d // 2 for d in divisors],
    }
    return tuple(
        max((n + extra) // d, 1) * d for n, d, extra in zip(patch_size, divisors, lift[mode], strict=True)
    )


def _weightless(network: nn.Module) -> nn.Module:
    """A copy on the meta device, of which no weight is ever copied."""
    memo: dict[int, object] = {}
    for module in network.modules():
        # DynUNet keeps its last side outputs, which cannot be copied while they belong to a graph
        kept = [tensor for value in vars(module).values() if isinstance(value, list) for tensor in value]
        for tensor in [*kept, *module.buffers(recurse=False)]:
            if isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor.detach().to("meta")
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(network, memo)


def _divisor_of_axis(network: nn.Module, in_channels: int, spatial_dims: int, axis: int) -> int:
    for divisor in _DIVISORS:
        shape = [_BASE] * spatial_dims
        # an odd multiple, about as large as the base, is divisible by nothing more
        shape[axis] = _BASE + divisor
        if _failure(network, in_channels, shape) is None:
            return divisor
    raise ConfigError(
        f"{type(network).__name__} takes 128 voxels along axis {axis} but no other size that was tried "
        f"({', '.join(str(_BASE + d) for d in _DIVISORS)}): give a network that takes any patch size."
    )


def _failure(network: nn.Module, in_channels: int, shape: Sequence[int]) -> str | None:
    """Why the network does not map ``shape`` to itself, or None."""
    x = torch.empty(1, in_channels, *shape, device="meta")
    try:
        with torch.no_grad():
            output = network(x)
    # networks refuse a shape in whatever way the layer that meets it first does
    except Exception as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    first = output[0] if isinstance(output, list | tuple) else output
    if tuple(first.shape[-len(shape) :]) != tuple(shape):
        return f"its output has {tuple(first.shape[-len(shape) :])} voxels"
    return None
