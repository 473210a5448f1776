"""A network from its definition in plan.json, and the patch sizes that it takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.bundle import ConfigParser
from torch import nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks.definition import definition_problem, instantiate, short
from medseg_supcon.networks.features import CONVOLUTIONS, classifier_name

DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
BASE = 128  # divisible by all of them
Definition = Mapping[str, Any] | str


def build_network(
    network_def: Definition, *, in_channels: int | None = None, num_classes: int | None = None, trust: bool = False
) -> nn.Module:
    """The network that a plan's ``network_def`` describes.

    It is a dict with ``_target_`` (a network of torch or MONAI) and plain arguments, which may be such dicts; with
    ``trust`` anything that MONAI's config parser can evaluate. ``in_channels`` of the scans and ``num_classes``
    (background included) are checked where they are given.

    Raises:
        ConfigError: the definition names no class, is code without ``trust``, an argument is wrong, the result is
            not a network, or has other channels.

    Example:
        >>> build_network({"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1})
        Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    shown = short(network_def, 200)
    if isinstance(network_def, str) and not network_def.startswith("$"):
        raise ConfigError(f"network_def is the text {shown}: it must be a dict with _target_, or begin with $.")
    if isinstance(network_def, Mapping) and "_target_" not in network_def:
        raise ConfigError(f"network_def {shown} has no _target_: name the network's class there.")
    problem = definition_problem(network_def)
    if problem is not None and not trust:
        raise ConfigError(f"{problem}. It may run any code: pass --trust (trust=True) if you trust its author.")
    definition: Any = dict(network_def) if isinstance(network_def, Mapping) else network_def
    try:
        if problem is None:
            network = instantiate(definition)
        else:
            network = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
    # whatever a class or an expression raises; the innermost cause says what is wrong with it
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{type(cause).__name__}: {_first_line(cause)}".removesuffix(": ")
        raise ConfigError(
            f"The network of the plan cannot be built from network_def {shown}: {text}. Correct the class name or "
            "its arguments in configs/plan.json."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network_def {shown} gives a {type(network).__name__}, not a torch.nn.Module.")
    # every network of MONAI defines the layer that reads the scan first
    taken = next((m.in_channels for m in network.modules() if isinstance(m, CONVOLUTIONS)), in_channels)
    if in_channels not in (None, taken):
        raise ConfigError(
            f"network_def {shown} takes {taken} channel(s), but the scans have {in_channels}: set in_channels to "
            f"{in_channels}."
        )
    given = network.get_submodule(classifier_name(network)).out_channels if num_classes is not None else None
    if given != num_classes:
        raise ConfigError(
            f"network_def {shown} gives {given} channel(s), but the plan has {num_classes} classes, background "
            f"included: set its out_channels to {num_classes}."
        )
    return network


def size_divisor(network: nn.Module | Mapping[str, Any], in_channels: int, spatial_dims: int = 3) -> tuple[int, ...]:
    """The number that a patch's extent must be divisible by, a power of two per axis.

    Found by running shapes through the network (or its plain ``network_def``) with weights that hold nothing
    (PyTorch's meta device), so it costs a second at most and no memory. A network that pads for itself (BasicUNet)
    gives 1. In training an instance norm needs two voxels or more: let some axis have at least twice its divisor.

    Raises:
        ConfigError: the network takes no patch of 128 voxels per axis, whose cure the message gives.

    Example:
        >>> size_divisor(torch.nn.Conv3d(1, 2, 3, padding=1), in_channels=1)
        (1, 1, 1)
    """
    if not isinstance(network, nn.Module):
        network = build_network(network)
    name, shadow, base = type(network).__name__, _weightless(network).eval(), (BASE,) * spatial_dims
    failure = _failure(shadow, in_channels, base)
    if failure is not None:
        raise ConfigError(
            f"{name} does not run on a patch of {base} voxels with {in_channels} channel(s): {failure}. Give a "
            "network that takes any patch size, with in_channels as the scans have."
        )
    divisors = []
    for axis in range(spatial_dims):
        # an odd multiple, about as large as the base, is divisible by nothing more
        sizes = ((d, (*base[:axis], BASE + d, *base[axis + 1 :])) for d in DIVISORS)
        divisor = next((d for d, size in sizes if _failure(shadow, in_channels, size) is None), None)
        if divisor is None:
            raise ConfigError(
                f"{name} takes 128 voxels along axis {axis} but no other size that was tried "
                f"({', '.join(str(BASE + d) for d in DIVISORS)}): give a network that takes any patch size."
            )
        divisors.append(divisor)
    return tuple(divisors)


def round_patch(
    patch_size: Sequence[int], divisor: Sequence[int] | int, mode: Literal["up", "down", "nearest"] = "up"
) -> tuple[int, ...]:
    """The patch size brought to multiples of ``divisor`` (per axis, or one for all), at least one multiple per axis.

    Raises:
        ValueError: a size or divisor is not positive, the lengths differ, or the mode is unknown ("nearest": a tie
            goes up).

    Example:
        >>> round_patch((40, 50, 33), 8)
        (40, 56, 40)
    """
    divisors = [divisor] * len(patch_size) if isinstance(divisor, int) else list(divisor)
    if len(divisors) != len(patch_size) or min([*divisors, *patch_size]) < 1:
        raise ValueError(f"patch_size and divisor must be as many positive numbers, got {patch_size}, {divisor}.")
    if mode not in ("up", "down", "nearest"):
        raise ValueError(f"mode is 'up', 'down' or 'nearest', got {mode!r}.")
    pairs = zip(patch_size, divisors, strict=True)
    return tuple(max((n + {"up": d - 1, "down": 0, "nearest": d // 2}[mode]) // d, 1) * d for n, d in pairs)


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


def _failure(network: nn.Module, in_channels: int, shape: tuple[int, ...]) -> str | None:
    """Why the network does not map ``shape`` to itself, or None."""
    try:
        with torch.no_grad():
            output = network(torch.empty(1, in_channels, *shape, device="meta"))
    # networks refuse a shape in whatever way the layer that meets it first does
    except Exception as error:
        return _first_line(error) or type(error).__name__
    first = output[0] if isinstance(output, list | tuple) else output
    voxels = tuple(first.shape[-len(shape) :])
    return None if voxels == shape else f"its output has {voxels} voxels"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
