"""A network from its definition in plan.json, and the patch sizes that it takes.

`definition_problem` is the gate for definitions from elsewhere: what it lets pass reads no file, downloads nothing, calls
nothing that an argument names, and builds no more than `MOST_WEIGHTS` and `MOST_PARTS`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import monai.networks.nets  # noqa: F401
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as registry

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks.features import CONVOLUTIONS, classifier_name

DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
BASE = 128  # divisible by all of them
Definition = Mapping[str, Any] | str
STOCK = ("torch.nn.modules.", "monai.networks.nets.", "monai.networks.blocks.", "monai.networks.layers.")
# Their arguments name a function of torchvision to call, or a file or a model on the internet to load.
REFUSED = ("torchvision_fc", "milmodel", "transchex", "cell_sam_wrapper")
LOADS_FILES = ("pretrained", "checkpoint", "weights", "path", "filename")  # arguments that load weights, begin so
# torch.nn.Sequential takes its modules by position, which a config cannot say; this method returns the container.
CHAIN, EMPTY_CHAIN = "torch.nn.Sequential.extend", {"_target_": "torch.nn.Sequential"}
MOST_LEVELS, MOST_WEIGHTS, MOST_PARTS = 50, 2_000_000_000, 20_000  # or a line of text would fill the memory
_divisors: dict[str, tuple[int, ...]] = {}


def chain(*definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of modules that run one after another, as MONAI's config parser can build it, too."""
    return {"_target_": CHAIN, "self": dict(EMPTY_CHAIN), "sequential": [dict(d) for d in definitions]}


def build_network(
    network_def: Definition, *, in_channels: int | None = None, num_classes: int | None = None, trust: bool = False
) -> nn.Module:
    """The network that a plan's ``network_def`` describes; ConfigError if it cannot be built, or has other channels.

    With ``trust`` the definition is anything that MONAI's config parser can evaluate, and not only plain data.
    """
    shown = f"network_def {network_def!r:.200}"
    plain = isinstance(network_def, Mapping) and "_target_" in network_def
    if not plain and not str(network_def).startswith("$"):
        raise ConfigError(f"{shown} must be a dict with _target_, the network's class, or begin with $.")
    problem = definition_problem(network_def)
    if problem is not None and not trust:
        raise ConfigError(f"{problem}. It may run any code: pass --trust (trust=True) if you trust its author.")
    try:
        parser = ConfigParser({"network_def": dict(network_def) if isinstance(network_def, Mapping) else network_def})
        network = _instantiate(network_def) if problem is None else parser.get_parsed_content("network_def")
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
        got = (
            f"gives {given} channel(s), but the plan needs {num_classes}: one per class with background, or per region"
        )
        raise ConfigError(f"{shown} {got}: set its out_channels to {num_classes}.")
    return network


def size_divisor(
    network: nn.Module, in_channels: int, spatial_dims: int = 3, *, definition: Definition | None = None
) -> tuple[int, ...]:
    """The number that a patch's extent must be divisible by, a power of two per axis; 1 if the network pads for itself.

    Found by running shapes through the network with weights that hold nothing (PyTorch's meta device), for up to a second:
    only once per process if the ``definition`` that the network was built from is given. In training an instance norm
    needs two voxels or more: let some axis have at least twice its divisor.
    """
    if definition is None:
        return _find_divisors(network, in_channels, spatial_dims)
    key = json.dumps([definition, in_channels, spatial_dims])
    if key not in _divisors:
        _divisors[key] = _find_divisors(network, in_channels, spatial_dims)
    return _divisors[key]


def _find_divisors(network: nn.Module, in_channels: int, spatial_dims: int) -> tuple[int, ...]:
    divisors = []
    for axis in range(spatial_dims):
        for divisor in DIVISORS:
            shape = [BASE] * spatial_dims
            shape[axis] += divisor  # an odd multiple, about as large as the base, is divisible by nothing more
            if (failure := _failure(network, in_channels, tuple(shape))) is None:
                divisors.append(divisor)
                break
        else:
            found = f"does not run on a patch of {shape} voxels with {in_channels} channel(s): {failure}"
            cure = "Use a network that takes any patch size and has as many in_channels as the scans have channels."
            raise ConfigError(f"{type(network).__name__} {found}. {cure}")
    return tuple(divisors)


def round_patch(patch_size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """The patch size, rounded up to a multiple of the divisor on each axis."""
    return tuple(-(-n // d) * d for n, d in zip(patch_size, divisor, strict=True))


def definition_problem(node: Any, level: int = 0) -> str | None:
    """Why a ``network_def`` is not plain data that names a stock network; None if it is."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return f"network_def is {node!r:.100}, not a mapping with _target_"
    target, arguments = node["_target_"], {key: value for key, value in node.items() if key != "_target_"}
    if target == CHAIN:
        if set(arguments) != {"self", "sequential"} or node["self"] != EMPTY_CHAIN:
            return f"network_def has {CHAIN} with other arguments than an empty container and a list"
        return _arguments_problem(arguments, level)
    stock = _stock_class(target)
    if stock is None:
        return f"network_def names {target!r:.100}, which is not a network of torch.nn or monai.networks"
    for name, parameter in inspect.signature(stock).parameters.items():
        loads = name.startswith(LOADS_FILES) and parameter.default not in (False, None, parameter.empty)
        if loads and name not in arguments:
            return f"network_def names {target!r}, which loads weights unless {name} is false"
    return _arguments_problem(arguments, level)


def _instantiate(definition: Definition) -> nn.Module:
    """A network without `definition_problem`; one that grows too large ends before its weights are written to memory."""
    weights = parts = 0

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal weights, parts
        weights, parts = weights + (value.numel() if isinstance(value, torch.Tensor) else 0), parts + 1
        if weights > MOST_WEIGHTS or parts > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_WEIGHTS:,} weights or {MOST_PARTS:,} parts")

    kinds = ("module", "parameter", "buffer")
    hooks = [getattr(registry, f"register_module_{kind}_registration_hook")(count) for kind in kinds]
    try:
        network: nn.Module = _build(definition)
    finally:
        for hook in hooks:
            hook.remove()
    return network


def _build(node: Any) -> Any:
    """Parts are built in the order of the text, so that a seed gives the weights that MONAI's parser gives."""
    if isinstance(node, list):
        return [_build(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {key: _build(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    if node["_target_"] == CHAIN:
        return nn.Sequential(*arguments["sequential"])
    return _stock_class(node["_target_"])(**arguments)


def _arguments_problem(node: Any, level: int) -> str | None:
    if level > MOST_LEVELS:
        return f"network_def is nested more than {MOST_LEVELS} levels deep"
    if isinstance(node, Mapping) and "_target_" in node:
        return definition_problem(node, level + 1)
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
                return f"network_def sets {key!r:.100}"
            if key.startswith(LOADS_FILES) and value not in (False, None):
                return f"network_def sets {key!r}, which loads weights"
        node = list(node.values())
    if isinstance(node, list | tuple):
        return next((p for p in (_arguments_problem(value, level + 1) for value in node) if p), None)
    if isinstance(node, str) and node[:1] in ("$", "@", "%"):
        return f"network_def contains the expression {node!r:.100}"
    if isinstance(node, int | float) and abs(node) > MOST_WEIGHTS:
        return f"network_def contains the number {node!r:.100}"
    return None


def _stock_class(target: Any) -> Any:
    """The class that a name stands for, None if none: with its package or module, or a bare name of MONAI's networks."""
    if not isinstance(target, str):
        return None
    module, _, name = (f"monai.networks.nets.{target}" if target.isidentifier() else target).rpartition(".")
    # only what those packages hold themselves: no way through them into other packages
    if name.startswith("_") or not f"{module}.".startswith(("torch.nn.", *STOCK)) or module not in sys.modules:
        return None
    stock: Any = vars(sys.modules[module]).get(name)
    if not (inspect.isclass(stock) and issubclass(stock, nn.Module) and stock.__module__.startswith(STOCK)):
        return None
    return None if stock.__module__.rpartition(".")[2] in REFUSED else stock


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
