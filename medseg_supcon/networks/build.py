"""A network from its definition in plan.json, and the patch sizes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.func import functional_call

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks.definition import definition_problem, instantiate, short
from medseg_supcon.networks.features import CONVOLUTIONS, classifier_name

DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
BASE = 128  # divisible by all of them


def build_network(
    network_def: Mapping[str, Any] | str,
    *,
    in_channels: int | None = None,
    num_classes: int | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network that a plan's ``network_def`` describes.

    It is a dict with ``_target_`` (a network of torch or MONAI) and plain arguments, which may be such dicts; with
    ``trust`` anything that MONAI's config parser can evaluate. ``in_channels`` of the scans and ``num_classes``
    (background included) are checked if given.

    Raises:
        ConfigError: the definition names no class, is code without ``trust``, an argument is wrong, the result is
            not a network, or has other channels.

    Example:
        >>> build_network({"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1})
        Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    shown = f"network_def {short(network_def, 200)}"
    if isinstance(network_def, str) and not network_def.startswith("$"):
        raise ConfigError(f"{shown} is text: it must be a dict with _target_, or begin with $.")
    if isinstance(network_def, Mapping) and "_target_" not in network_def:
        raise ConfigError(f"{shown} has no _target_: name the network's class there.")
    problem = definition_problem(network_def)
    if problem is not None and not trust:
        raise ConfigError(f"{problem}. It may run any code: pass --trust (trust=True) if you trust its author.")
    definition: Any = dict(network_def) if isinstance(network_def, Mapping) else network_def
    try:
        if problem is None:
            network = instantiate(definition)
        else:
            network = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
    except Exception as error:  # whatever a class or an expression raises; the innermost cause says what is wrong
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{type(cause).__name__}: {_first_line(cause)}".removesuffix(": ")
        cure = "Correct the class name or its arguments in configs/plan.json."
        raise ConfigError(f"The network of the plan cannot be built from {shown}: {text}. {cure}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{shown} gives a {type(network).__name__}, not a torch.nn.Module.")
    # every network of MONAI defines the layer that reads the scan first
    taken = next((m.in_channels for m in network.modules() if isinstance(m, CONVOLUTIONS)), in_channels)
    if in_channels not in (None, taken):
        had = f"takes {taken} channel(s), but the scans have {in_channels}"
        raise ConfigError(f"{shown} {had}: set in_channels to {in_channels}.")
    given = network.get_submodule(classifier_name(network)).out_channels if num_classes is not None else None
    if given != num_classes:
        had = f"gives {given} channel(s), but the plan has {num_classes} classes, background included"
        raise ConfigError(f"{shown} {had}: set its out_channels to {num_classes}.")
    return network


def size_divisor(network: nn.Module | Mapping[str, Any], in_channels: int, spatial_dims: int = 3) -> tuple[int, ...]:
    """The number that a patch's extent must be divisible by, a power of two per axis.

    Found by running shapes through the network (or its plain ``network_def``) with weights that hold nothing
    (PyTorch's meta device). A network that pads for itself (BasicUNet) gives 1. In training an instance norm needs two
    voxels or more: let some axis have at least twice its divisor.

    Raises:
        ConfigError: the network takes no patch of 128 voxels per axis.

    Example:
        >>> size_divisor(torch.nn.Conv3d(1, 2, 3, padding=1), in_channels=1)
        (1, 1, 1)
    """
    network = network if isinstance(network, nn.Module) else build_network(network)
    name, base, divisors = type(network).__name__, (BASE,) * spatial_dims, []
    failure = _failure(network, in_channels, base)
    if failure is not None:
        raise ConfigError(
            f"{name} does not run on a patch of {base} voxels with {in_channels} channel(s): {failure}. Give a "
            "network that takes any patch size, with in_channels as the scans have."
        )
    for axis in range(spatial_dims):
        # an odd multiple, about as large as the base, is divisible by nothing more
        sizes = ((d, (*base[:axis], BASE + d, *base[axis + 1 :])) for d in DIVISORS)
        divisor = next((d for d, size in sizes if _failure(network, in_channels, size) is None), None)
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


@torch.no_grad()
def _failure(network: nn.Module, in_channels: int, shape: tuple[int, ...]) -> str | None:
    """Why the network does not map ``shape`` to itself, or None; no weight of it is read, copied or changed."""
    weightless: dict[str, Tensor] = {}
    for path, module in network.named_modules():  # each module once, under whichever of its names
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        weightless |= {f"{path}.{name}".lstrip("."): tensor.to("meta") for name, tensor in own}
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        scan = torch.empty(1, in_channels, *shape, device="meta")
        output = functional_call(network, weightless, scan, tie_weights=False)
    except Exception as error:  # networks refuse a shape in whatever way the layer that meets it first does
        return _first_line(error) or type(error).__name__
    finally:
        for module in training:
            module.training = True
    first = output[0] if isinstance(output, list | tuple) else output
    voxels = tuple(first.shape[-len(shape) :])
    return None if voxels == shape else f"its output has {voxels} voxels"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
