"""Networks written as plain data: a ``_target_`` of torch or MONAI with plain arguments, built without evaluating it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import monai.networks.blocks
import monai.networks.layers
import monai.networks.nets
from torch import nn

STOCK = {
    "torch.nn": nn,
    "monai.networks.nets": monai.networks.nets,
    "monai.networks.blocks": monai.networks.blocks,
    "monai.networks.layers": monai.networks.layers,
}
# torch.nn.Sequential takes its modules by position, which a config cannot say; this method returns the container.
CHAIN, EMPTY_CHAIN = "torch.nn.Sequential.extend", {"_target_": "torch.nn.Sequential"}
LOADS_FILES = ("pretrained", "checkpoint")  # arguments that make a network read or download weights
MOST_LEVELS = 50


def chain(*definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definition of modules that run one after another, as MONAI's config parser can build it, too.

    >>> conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    >>> len(instantiate(chain(conv, {"_target_": "torch.nn.ReLU"})))
    2
    """
    return {"_target_": CHAIN, "self": dict(EMPTY_CHAIN), "sequential": [dict(d) for d in definitions]}


def definition_problem(node: Any, level: int = 0) -> str | None:
    """Why a ``network_def`` is not plain data that names a stock network; None where it is.

    >>> definition_problem({"_target_": "os.system", "command": "true"})
    "network_def names 'os.system', which is not a network of torch.nn or monai.networks"
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        return f"network_def is {_short(node)}, not a mapping with _target_"
    target = node["_target_"]
    if target == CHAIN:
        if set(node) != {"_target_", "self", "sequential"} or node["self"] != EMPTY_CHAIN:
            return f"network_def has {CHAIN} with other arguments than an empty container and a list"
    elif _stock_class(target) is None:
        return f"network_def names {target!r}, which is not a network of torch.nn or monai.networks"
    return _arguments_problem({key: value for key, value in node.items() if key != "_target_"}, level)


def instantiate(definition: Any) -> Any:
    """The network of a definition without `definition_problem`; the parts are made in the order in which they stand.

    Raises:
        whatever the class raises for its arguments.
    """
    if isinstance(definition, list):
        return [instantiate(value) for value in definition]
    if not isinstance(definition, Mapping):
        return definition
    arguments = {key: instantiate(value) for key, value in definition.items() if key != "_target_"}
    if "_target_" not in definition:
        return arguments
    if definition["_target_"] == CHAIN:
        return nn.Sequential(*arguments["sequential"])
    made = _stock_class(definition["_target_"])
    if made is None:
        raise ValueError(definition_problem(definition))
    return made(**arguments)


def _arguments_problem(node: Any, level: int) -> str | None:
    if level > MOST_LEVELS:
        return f"network_def is nested more than {MOST_LEVELS} levels deep"
    if isinstance(node, Mapping):
        if "_target_" in node:
            return definition_problem(node, level + 1)
        for key, value in node.items():
            if not isinstance(key, str) or key.startswith(("_", *LOADS_FILES)):
                return f"network_def sets {key!r}"
            if problem := _arguments_problem(value, level + 1):
                return problem
        return None
    if isinstance(node, list):
        return next((p for p in (_arguments_problem(value, level + 1) for value in node) if p), None)
    if isinstance(node, str) and node[:1] in ("$", "@", "%"):
        return f"network_def holds the expression {_short(node)}"
    return None


def _stock_class(target: Any) -> type[nn.Module] | None:
    """The class that a name stands for: with its module, or a bare name of MONAI's networks."""
    if not isinstance(target, str):
        return None
    name = f"monai.networks.nets.{target}" if target.isidentifier() else target
    package = next((package for package in STOCK if name.startswith(f"{package}.")), None)
    if package is None:
        return None
    found: Any = STOCK[package]
    for part in name.removeprefix(f"{package}.").split("."):
        if not part.isidentifier() or part.startswith("_"):
            return None
        found = getattr(found, part, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        return None
    return found if found.__module__.startswith(("torch.nn.", "monai.networks.")) else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
