"""Configs are code. What a run may contain for `medseg predict` to use it without being told to trust it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import pydoc
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.transforms.intensity import dictionary

from medseg_supcon.errors import RunError

PER_CHANNEL = ("SplitDimd", "ConcatItemsd", "DeleteItemsd")  # how a plan normalises channels one by one
# `Predictor` does not evaluate these (network_json: not where there is a plan), so a run may set them.
FREE = ("bundle_root", "dataset_dir", "output_dir", "device", "amp", "network_json")
# SHA-256 of what inference.yaml said in earlier runs: before it carried network_json, before a mask with -1 took int8
EARLIER = (
    "d0b2ed0a1e4b1b85abe9ea955533e570102278886758eec4d41801a7eeaf6ef3",
    "9fda9de53e142bf3807a5af41a5b4a7dfb8a8be43d559c321dede56335f66cbb",
)


def is_shipped_config(config: Path) -> bool:
    """Whether an inference config says what the shipped one says, or an earlier one."""
    content = _content(config)
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() in EARLIER:
        return True
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_share", package.parent):
        shipped = root / "bundles" / "segmentation" / "configs" / "inference.yaml"
        if shipped.is_file():
            return bool(content == _content(shipped))
    return False


def check_trusted(run: Path, config: Path, plan: dict[str, Any]) -> None:
    """Raises RunError where a run's config or plan could run code of its maker's choice."""
    cure = (
        "It may run any code on this computer. Read it, and pass --trust (trust=True) if you trust its maker."
    )
    if not is_shipped_config(config):
        raise RunError(f"{config} is not the inference config that medseg writes. {cure}")
    problem = _network_problem(plan["network_def"]) or _intensity_problem(plan["intensity"])
    if problem:
        raise RunError(f"{run / 'configs' / 'plan.json'}: {problem}. {cure}")


def _content(path: Path) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict):
        return None
    return {key: value for key, value in content.items() if key not in FREE}


def _network_problem(node: Any) -> str | None:
    """Only stock layers and networks, with plain values as arguments."""
    if isinstance(node, str) and node.startswith("$"):
        try:
            expression = ast.parse(node[1:].strip(), mode="eval").body
        except SyntaxError:
            return f"network_def is not an expression: {node!r}"
        return _expression_problem(expression)
    if not isinstance(node, dict) or not _is_stock_network(str(node.get("_target_"))):
        return f"network_def is not a stock network of monai.networks or torch.nn: {node!r}"
    return _argument_problem({key: value for key, value in node.items() if key != "_target_"})


def _argument_problem(node: Any) -> str | None:
    if isinstance(node, dict):
        if "_target_" in node:
            return _network_problem(node)
        for key, value in node.items():
            if str(key).startswith("_") or str(key).startswith("pretrained"):
                return f"network_def sets {key!r}"
            if problem := _argument_problem(value):
                return problem
    if isinstance(node, list):
        return next((p for p in map(_argument_problem, node) if p), None)
    if isinstance(node, str) and node[:1] in ("$", "@", "%"):
        return _network_problem(node) if node[0] == "$" else f"network_def refers to {node!r}"
    return None


def _expression_problem(node: ast.expr) -> str | None:
    """Calls of stock modules on literals; nothing that could reach another name."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if not _is_stock_network(name):
            return f"network_def calls {name}, which is no stock network"
        if any(keyword.arg is None or keyword.arg.startswith("pretrained") for keyword in node.keywords):
            return "network_def unpacks arguments or loads other weights"
        children = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.List | ast.Tuple):
        children = list(node.elts)
    elif isinstance(node, ast.Dict):
        children = [child for child in (*node.keys, *node.values) if child is not None]
    elif isinstance(node, ast.UnaryOp):
        children = [node.operand]
    elif isinstance(node, ast.Constant):
        children = []
    else:
        return f"network_def holds {ast.unparse(node)!r}"
    return next((p for p in map(_expression_problem, children) if p), None)


def _is_stock_network(target: str) -> bool:
    if not target.startswith(
        ("monai.networks.nets.", "monai.networks.blocks.", "monai.networks.layers.", "torch.nn.")
    ):
        # MONAI looks a bare class name up among its own.
        target = f"monai.networks.nets.{target}" if target.isidentifier() else ""
    if not target or any(part.startswith("_") or not part.isidentifier() for part in target.split(".")):
        return False
    found = pydoc.locate(target)
    return inspect.isclass(found) and issubclass(found, torch.nn.Module)


def _intensity_problem(transforms: Any) -> str | None:
    """Only MONAI's deterministic intensity transforms, with plain values as arguments."""
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        name = str(transform.get("_target_") if isinstance(transform, dict) else transform).rsplit(".", 1)
        known = getattr(dictionary, name[-1], None)
        stock = name[-1] in PER_CHANNEL or (
            inspect.isclass(known) and known.__module__ == dictionary.__name__
        )
        if (
            not stock
            or name[-1].startswith("Rand")
            or (name[1:] and not name[0].startswith("monai.transforms"))
        ):
            return f"intensity holds {transform!r}, which is no intensity transform of MONAI"
        arguments = {key: value for key, value in transform.items() if key != "_target_"}
        if any(str(key).startswith("_") for key in arguments) or any(c in str(arguments) for c in "$@%"):
            return f"intensity holds an expression: {transform!r}"
    return None
