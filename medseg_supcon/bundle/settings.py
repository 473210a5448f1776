"""Recipes and ``--set``: changes of a commented YAML config that keep its comments."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from medseg_supcon.bundle.configs import SEPARATOR, read_yaml, read_yaml_file
from medseg_supcon.bundle.folder import shared_folder
from medseg_supcon.errors import ConfigError


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in shared_folder("configs").glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe's overlay on ``train.yaml``: a name from ``configs/``, or a YAML file of your own.

    A recipe with a key ``base`` starts from that recipe (a name, or the path of a file, relative to the recipe's
    folder) and overrides it.

    Raises:
        ConfigError: the recipe does not exist, does not map keys to values, or is based on itself.
    """
    return _read_recipe(str(name), ())


def _read_recipe(name: str, above: tuple[Path, ...]) -> dict[str, Any]:
    path = _recipe_file(name)
    if not path.is_file():
        near = get_close_matches(str(name), recipe_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"The recipe {str(name)!r} does not exist.{hint} Use one of {', '.join(recipe_names())}, or the path of a "
            ".yaml file."
        )
    overlay = read_yaml_file(path, f"Recipe {path}") or {}
    if not isinstance(overlay, dict):
        raise ConfigError(f"Recipe {path} must map keys of train.yaml to values, found {type(overlay).__name__}.")
    overlay = {str(key): value for key, value in overlay.items()}
    base = overlay.pop("base", None)
    if base is None:
        return overlay
    if path.resolve() in above:
        raise ConfigError(f"Recipe {path} is based on itself through {base!r}. Remove one of the bases.")
    below = path.parent / str(base) if Path(str(base)).suffix in (".yaml", ".yml") else base
    inherited = _read_recipe(str(below), (*above, path.resolve()))
    return {key: value for key, value in inherited.items() if key not in overlay} | overlay


def describe_recipe(name: str | Path) -> str:
    """The first sentence of a recipe's first comment, without its name. Empty if it has no comment.

    >>> describe_recipe("dice_ce").split(",")[0]
    'Dice + cross-entropy alone'
    """
    path, comment = _recipe_file(name), []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:].strip())
    return re.split(r"(?<=[.!?])\s", " ".join(comment).removeprefix(f"{path.stem}: "))[0]


def _recipe_file(name: str | Path) -> Path:
    path = Path(name)
    return path if path.suffix in (".yaml", ".yml") else shared_folder("configs") / f"{name}.yaml"


class _Representer(RoundTripRepresenter):
    """Writes floats so that PyYAML reads them as floats: 1e-05 would come back as a string."""

    def represent_short_float(self, value: float) -> Any:
        text = repr(value)
        text = text.replace("e", ".0e") if "e" in text and "." not in text else text
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _Representer.represent_short_float)


def _yaml() -> YAML:
    tool = YAML()
    tool.Representer = _Representer
    tool.preserve_quotes = True
    tool.width = 4096
    tool.indent(mapping=2, sequence=2, offset=0)
    return tool


def load_commented(path: Path) -> dict[str, Any]:
    """A YAML file as a tree that remembers its comments."""
    tree: dict[str, Any] = _yaml().load(path.read_text(encoding="utf-8"))
    return tree


def dump_commented(tree: Mapping[str, Any]) -> str:
    """The text of a tree, comments included, as PyYAML and MONAI read it."""
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return stream.getvalue()


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

    If a part belongs to a reference (``view_2: "@view_1"``), the section that it names is copied first, so that only
    this use of it changes.

    Args:
        config: the config's tree.
        key: path with ``::`` (or MONAI's ``#``) between the parts.
        value: the new value.
        where: the config's name for messages.
        create: allow a new last part.

    Raises:
        ConfigError: the config does not have the key; similar names are listed.
    """
    parts = key.replace("#", SEPARATOR).split(SEPARATOR)
    node = config
    for depth, part in enumerate(parts):
        last, above = depth == len(parts) - 1, SEPARATOR.join(parts[:depth])
        index: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{where} has no entry {part!r} in {above} ({len(node)} entries).")
            index = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(
                f"{where}: {above} is the value {node!r} and has no key {part!r}. Set {above} as a whole."
            )
        # a component takes arguments that the template does not spell out
        elif part not in node and not (last and (create or "_target_" in node)):
            near = get_close_matches(part, [str(k) for k in node], n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Keys here: {', '.join(map(str, node))}."
            raise ConfigError(f"{where} has no key {key!r}. {hint}")
        if not last:
            section = _referred(config, node[index])
            if section is not None:
                _put_copy(node, index, section)
            node = node[index]
        elif depth and isinstance(node, CommentedMap) and index not in node:
            node.insert(min(1, len(node)), index, value)  # at the end it would follow the next section's comment
        else:
            node[index] = value


def _put_copy(node: Any, key: str, section: dict[str, Any]) -> None:
    """Put a copy of a section in place of a value; the comment that follows the value stays after it."""
    copied = copy.deepcopy(section)
    if isinstance(node, CommentedMap) and isinstance(copied, CommentedMap) and key in node.ca.items:
        copied.ca.items[list(copied)[-1]] = node.ca.items.pop(key)
    node[key] = copied


def _referred(config: Any, value: Any) -> Any:
    """The section that ``"@a::b"`` names, or None if the value does not refer to a section."""
    if not (isinstance(value, str) and value.startswith("@")):
        return None
    node = config
    for part in value[1:].split(SEPARATOR):
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else _referred(config, node)


def merge(config: dict[str, Any], overlay: Mapping[str, Any], where: str) -> None:
    """Lay an overlay over a config, in place: ``a::b`` keys set a part, plain keys replace the whole value."""
    for key, value in overlay.items():
        set_key(config, str(key), value, where, create=True)
