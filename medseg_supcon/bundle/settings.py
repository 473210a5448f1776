"""Changing a commented YAML config without losing its comments: recipes and --set."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from medseg_supcon.errors import ConfigError

SEPARATOR = "::"
MOST_BYTES = 2**20


class _Representer(RoundTripRepresenter):
    """Writes floats so that PyYAML reads them as floats: 1e-05 would come back as a string."""


def _float(representer: Any, value: float) -> Any:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _float)


def _yaml() -> YAML:
    tool = YAML()
    tool.Representer = _Representer
    tool.preserve_quotes = True
    tool.width = 4096
    tool.indent(mapping=2, sequence=2, offset=0)
    return tool


class _Loader(yaml.SafeLoader):
    """PyYAML's, but 1e-3 is a number (YAML 1.2), and aliases and keys that are given twice are errors.

    Nested aliases expand a small file into billions of values; of two equal keys PyYAML drops one without a word.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name); write the value out instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, what: str) -> Any:
    """The content of a YAML text.

    Raises:
        ConfigError: it is none; ``what`` names it.

    >>> read_yaml("{lr: 1e-3, name: 1e}", "this")
    {'lr': 0.001, 'name': '1e'}
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a 13th month, 5,000 digits, 10,000 levels
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())[:300]}.") from None


def read_yaml_file(path: Path, what: str) -> Any:
    """The content of a YAML file in UTF-8.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or is not YAML; ``what`` names it.
    """
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{what} is larger than 1 MiB: it is not a config.")
        return read_yaml(content.decode("utf-8-sig"), what)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not in UTF-8 (byte {error.start + 1}). Save it in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{what} cannot be read ({error.strerror}).") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line; the value is YAML, and 1e-4 is a number.

    >>> parse_setting("learning_rate=1e-4"), parse_setting("view_1::flip_axes=[0, 1]")
    (('learning_rate', 0.0001), ('view_1::flip_axes', [0, 1]))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set expects KEY=VALUE, got {text!r}. Example: --set learning_rate=1e-3")
    value = value.strip()
    if value[:1] in ("$", "@"):
        return key.strip(), value
    return key.strip(), read_yaml(value, f"--set {key}: {value!r}")


def set_key(config: Any, key: str, value: Any, where: str, create: bool = False) -> None:
    """Set ``a::b::0`` in nested dicts and lists, in place.

    Where a part belongs to a reference (``view_2: "@view_1"``), the section it names is copied first: the change is
    the one's alone.

    Args:
        config: the config's tree.
        key: path with ``::`` (or MONAI's ``#``) between the parts.
        value: what to put there.
        where: the config's name for messages.
        create: allow a new last part.

    Raises:
        ConfigError: the config has no such key; close names are offered.
    """
    parts = key.replace("#", SEPARATOR).split(SEPARATOR)
    node = config
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{where} has no entry {part!r} in {SEPARATOR.join(parts[:depth])} ({len(node)} entries)."
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            # a component takes arguments that the template does not spell out
            if part not in node and not (last and (create or "_target_" in node)):
                raise ConfigError(_unknown(config, node, key, part, where))
            index = part
        else:
            raise ConfigError(
                f"{where}: {SEPARATOR.join(parts[:depth])} is the value {node!r} and has no part {part!r}. "
                f"Set {SEPARATOR.join(parts[:depth])} as a whole."
            )
        if last and depth and isinstance(node, CommentedMap) and index not in node:
            node.insert(
                min(1, len(node)), index, value
            )  # at the end it would stand behind the next section's comment
        elif last:
            node[index] = value
        else:
            section = _referred(config, node[index])
            if section is not None:
                _put_copy(node, index, section)
            node = node[index]


def _put_copy(node: Any, key: str, section: dict[str, Any]) -> None:
    """A copy of a section in place of a value; the comment that follows the value stays behind it."""
    copied = copy.deepcopy(section)
    if isinstance(node, CommentedMap) and isinstance(copied, CommentedMap) and key in node.ca.items:
        copied.ca.items[list(copied)[-1]] = node.ca.items.pop(key)
    node[key] = copied


def _referred(config: Any, value: Any) -> Any:
    """The section that ``"@a::b"`` names, or None where the value is no reference to a section."""
    if not (isinstance(value, str) and value.startswith("@")):
        return None
    node = config
    for part in value[1:].split(SEPARATOR):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else _referred(config, node)


def _unknown(config: Any, node: Mapping[str, Any], key: str, part: str, where: str) -> str:
    near = get_close_matches(part, [str(k) for k in node], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else f" Known here: {', '.join(map(str, node))}."
    return f"{where} has no key {key!r}.{hint}"


def merge(config: dict[str, Any], overlay: Mapping[str, Any], where: str) -> None:
    """Lay an overlay over a config, in place: ``a::b`` keys set a part, plain keys replace the whole value."""
    for key, value in overlay.items():
        set_key(config, str(key), value, where, create=True)


def load_commented(path: Path) -> dict[str, Any]:
    """A YAML file as a tree that remembers its comments."""
    tree: dict[str, Any] = _yaml().load(path.read_text())
    return tree


def dump_commented(tree: Mapping[str, Any]) -> str:
    """The text of a tree, comments included, as PyYAML and MONAI read it."""
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return stream.getvalue()
