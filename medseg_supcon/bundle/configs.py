"""Configs read as plain data: nothing is evaluated, and a file cannot expand into more than it contains."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from medseg_supcon.datasets import read_datalist
from medseg_supcon.errors import ConfigError, MedsegError, RunError

MOST_BYTES = 2**20
SEPARATOR = "::"
CODE_SIGNS = ("$", "@", "%")  # MONAI's expressions, references and macros
PATHS = ("dataset_dir", "output_dir", "init_weights")  # the user's paths, which may contain such signs
# What the classes and expressions of a config raise.
CONFIG_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ModuleNotFoundError)


class _Loader(yaml.SafeLoader):
    """Refuses aliases (nested ones expand a small file into billions of values) and keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains an alias (*name). Write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag in ("binary", "omap", "pairs", "set", "timestamp"):  # JSON, and so a config's twin, does not have them
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]


class _SettingsLoader(_Loader):
    """Reads 1e-3 as a number, like YAML 1.2; PyYAML and MONAI read it as text."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON config, as MONAI would read it, without evaluating anything.

    Raises:
        RunError: it cannot be read, is larger than 1 MiB, not YAML or JSON, or not a mapping.
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
        raise RunError(f"{path} must map keys to values, found {type(content).__name__}. Restore the file.")
    return content


def cases_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases in ``configs/datalist.json`` of a run: section -> items; empty if the file does not exist."""
    path = run / "configs" / "datalist.json"
    return read_datalist(path) if path.is_file() else {}


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML text, for recipes and ``--set``; 1e-3 is a number.

    Raises:
        ConfigError: the text is not YAML; ``source`` names it.

    >>> read_yaml("{lr: 1e-3, name: 1e}", "this")
    {'lr': 0.001, 'name': '1e'}
    """
    try:
        return yaml.load(text, _SettingsLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())[:300]}.") from None


def read_yaml_file(path: Path, source: str) -> Any:
    """The content of a recipe or another YAML file of the user's, in UTF-8.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or is not YAML; ``source`` names it.
    """
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{source} is larger than 1 MiB: it is not a config.")
        return read_yaml(content.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not in UTF-8 (byte {error.start + 1}). Save it in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror}).") from None


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
    """A text as it is, or the one that `medseg_supcon.plan.literal` wrote as an expression; None for all else.

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


def innermost(error: BaseException) -> BaseException:
    """The error that began a chain, or the first of ours in it."""
    chain, current = [error], error
    while (following := current.__cause__ or current.__context__) is not None and following not in chain:
        chain.append(following)
        current = following
    return next((e for e in chain if isinstance(e, MedsegError)), chain[-1])


@contextmanager
def settings_at_fault() -> Iterator[None]:
    """Turn the errors of a config's classes and expressions into a ``ConfigError`` that says what is wrong.

    Out of memory and interruptions pass as they are.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except CONFIG_ERRORS as error:
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        reason = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0].rstrip(" .:")
        raise ConfigError(
            f"The settings are invalid: {reason}. Check --set, the recipe, and the run's configs/train.yaml and "
            "configs/plan.json."
        ) from error
