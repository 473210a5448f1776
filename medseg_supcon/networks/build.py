"""A network from its definition in plan.json, and the patch sizes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.func import functional_call

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks.definition import definition_problem, instantiate
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
    (background included) are checked if given.

    Raises:
        ConfigError: the definition names no class, is code without ``trust``, has wrong arguments or other channels.

    Example:
        >>> build_network({"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1})
        Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    shown = f"network_def {network_def!r:.200}"
    plain = isinstance(network_def, Mapping) and "_target_" in network_def
    if not plain and not str(network_def).startswith("$"):
        raise ConfigError(f"{shown} must be a dict with _target_, the network's class, or begin with $.")
    problem = definition_problem(network_def)
    if problem is not None and not trust:
        raise ConfigError(f"{problem}. It may run any code: pass --trust (trust=True) if you trust its author.")
    definition: Any = dict(network_def) if isinstance(network_def, Mapping) else network_def
    try:
        parser = ConfigParser({"network_def": definition})
        network = instantiate(definition) if problem is None else parser.get_parsed_content("network_def")
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
        got = f"takes {taken} channel(s), but the scans have {in_channels}"
        raise ConfigError(f"{shown} {got}: set in_channels to {in_channels}.")
    given = network.get_submodule(classifier_name(network)).out_channels if num_classes is not None else None
    if given != num_classes:
        got = f"gives {given} channel(s), but the plan has {num_classes} classes, background included"
        raise ConfigError(f"{shown} {got}: set its out_channels to {num_classes}.")
    return network


def size_divisor(network: nn.Module, in_channels: int, spatial_dims: int = 3) -> tuple[int, ...]:
    """The number that a patch's extent must be divisible by, a power of two per axis.

    Found by running shapes through the network with weights that hold nothing (PyTorch's meta device). A network that
    pads for itself (BasicUNet) gives 1. In training an instance norm needs two voxels or more: let some axis have at
    least twice its divisor.

    Raises:
        ConfigError: the network takes no patch of 128 and 256 voxels per axis.

    Example:
        >>> size_divisor(torch.nn.Conv3d(1, 2, 3, padding=1), in_channels=1)
        (1, 1, 1)
    """
    divisors = []
    for axis in range(spatial_dims):
        for divisor in DIVISORS:
            shape = [BASE] * spatial_dims
            shape[axis] += divisor  # an odd multiple, about as large as the base, is divisible by nothing more
            failure = _failure(network, in_channels, tuple(shape))
            if failure is None:
                divisors.append(divisor)
                break
        else:
            raise ConfigError(
                f"{type(network).__name__} does not run on a patch of {shape} voxels with {in_channels} channel(s): "
                f"{failure}. Give a network that takes any patch size, with in_channels as the scans have."
            )
    return tuple(divisors)


def round_patch(patch_size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """The patch size, rounded up to a multiple of the divisor on each axis.

    >>> round_patch((40, 50, 33), (8, 8, 8))
    (40, 56, 40)
    """
    return tuple(-(-n // d) * d for n, d in zip(patch_size, divisor, strict=True))


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
