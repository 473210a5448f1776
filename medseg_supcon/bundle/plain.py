"""Configs read as plain data: nothing is evaluated, and a file cannot expand into more than it holds."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from medseg_supcon.errors import RunError

MOST_BYTES = 2**20
SEPARATOR = "::"
CODE_SIGNS = ("$", "@", "%")  # MONAI's expressions, references and macros
PATHS = ("dataset_dir", "output_dir", "init_weights")  # a person's paths, which may hold such signs


class _Loader(yaml.SafeLoader):
    """Refuses aliases: nested ones expand a small file into billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name), which medseg never writes")
        return super().compose_node(parent, index)


def read_plain(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON config.

    Raises:
        RunError: it is larger than 1 MiB, not a mapping, or not YAML or JSON.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RunError(f"{path} is larger than 1 MiB: it is not a config that medseg wrote. Restore it.")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise RunError(f"{path} is not valid {kind}: {' '.join(str(error).split())[:300]}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} must be a mapping of keys to values, found {type(content).__name__}.")
    return content


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config that is not a container, or is an empty one, with its key in MONAI's notation.

    >>> dict(leaves({"a": {"b": [1, "$x"]}, "c": {}}))
    {'a::b::0': 1, 'a::b::1': '$x', 'c': {}}
    """
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            part = str(name).replace("#", SEPARATOR)
            yield from leaves(value, f"{key}{SEPARATOR}{part}" if key else part)
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from leaves(value, f"{key}{SEPARATOR}{index}" if key else str(index))
    else:
        yield key, node


def is_code(key: str, value: Any) -> bool:
    """Whether a leaf of a config makes MONAI call, evaluate or look up something.

    >>> is_code("seed", 1), is_code("seed", "$1/0"), is_code("view_1::_target_", "os.system")
    (False, True, True)
    """
    parts = key.split(SEPARATOR)
    if any(part.startswith(("_", "+", "~")) or part.startswith(CODE_SIGNS) for part in parts):
        return True
    if not (isinstance(value, str) and value.startswith(CODE_SIGNS)):
        return False
    return key not in PATHS or plain_text(value) is None


def plain_text(value: Any) -> str | None:
    """A text as it stands, or the one that `medseg_supcon.plan.literal` wrote as an expression; None for all else.

    >>> plain_text("/data"), plain_text("$'/data/site\\x232'"), plain_text("$open('x')")
    ('/data', '/data/site#2', None)
    """
    if not isinstance(value, str) or not value.startswith(CODE_SIGNS):
        return value if isinstance(value, str) else None
    try:
        text = ast.literal_eval(value[1:]) if value.startswith("$") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return text if isinstance(text, str) else None
