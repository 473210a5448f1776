"""Networks as plain data: a `_target_` of torch or MONAI with plain arguments, built without evaluating it.

The gate for definitions from elsewhere: what `definition_problem` lets pass reads no file, downloads nothing, calls
nothing that an argument names, and builds no more than `MOST_WEIGHTS` and `MOST_PARTS`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import monai.networks.nets  # noqa: F401
import torch
from torch import nn
from torch.nn.modules import module as registry

STOCK = ("torch.nn.modules.", "monai.networks.nets.", "monai.networks.blocks.", "monai.networks.layers.")
# Their arguments name a function of torchvision to call, or a file or a model on the internet to load.
REFUSED = ("torchvision_fc", "milmodel", "transchex", "cell_sam_wrapper")
LOADS_FILES = ("pretrained", "checkpoint", "weights", "path", "filename")  # arguments that load weights, begin so
# torch.nn.Sequential takes its modules by position, which a config cannot say; this method returns the container.
CHAIN, EMPTY_CHAIN = "torch.nn.Sequential.extend", {"_target_": "torch.nn.Sequential"}
MOST_LEVELS, MOST_WEIGHTS, MOST_PARTS = 50, 2_000_000_000, 20_000  # or a line of text would fill the memory


def chain(*definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of modules that run one after another, as MONAI's config parser can build it, too.

    >>> conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    >>> len(instantiate(chain(conv, {"_target_": "torch.nn.ReLU"})))
    2
    """
    return {"_target_": CHAIN, "self": dict(EMPTY_CHAIN), "sequential": [dict(d) for d in definitions]}


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


def instantiate(definition: Mapping[str, Any]) -> nn.Module:
    """The network of a definition without `definition_problem`; raises what the class raises for its arguments.

    A construction that grows too large is ended before its weights are written to memory.
    """
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
    stock = _stock_class(node["_target_"])
    if stock is None:
        raise ValueError(definition_problem(node))
    return stock(**arguments)


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
        return f"network_def holds the expression {node!r:.100}"
    if isinstance(node, int | float) and abs(node) > MOST_WEIGHTS:
        return f"network_def holds the number {node!r:.100}"
    return None


def _stock_class(target: Any) -> type[nn.Module] | None:
    """The class that a name stands for: with its package or module, or a bare name of MONAI's networks."""
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
