"""Recipes and ``--set``: changes of a commented YAML config that keep its comments."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from medseg_supcon.bundle.folder import PlainLoader, parse, read_small, shared_folder
from medseg_supcon.errors import ConfigError, MedsegError
from medseg_supcon.text import suggestion

SEPARATOR = "::"
# What the classes and expressions of a config raise.
CONFIG_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ModuleNotFoundError)


class _SettingsLoader(PlainLoader):
    """Reads 1e-3 as a number, like YAML 1.2; PyYAML and MONAI read it as text."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, source: str) -> Any:
    return parse(text, source, ConfigError, _SettingsLoader)


def read_yaml_file(path: Path, source: str) -> Any:
    """A recipe or another YAML file of the user's; ``source`` is its name in a ConfigError."""
    return _parse(read_small(path, source, ConfigError), source)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in shared_folder("configs").glob("*.yaml"))


def read_recipe(name: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's overlay on ``train.yaml``: a name from ``configs/``, or a YAML file of your own.

    A recipe with a key ``base`` starts from that recipe (a name, or the path of a file, relative to the recipe's
    folder) and overrides it. ``above`` are the recipes that have this one as their base.
    """
    path = _recipe_file(name)
    if not path.is_file():
        hint = suggestion(name, recipe_names())
        raise ConfigError(f"The recipe {str(name)!r} does not exist. {hint} A recipe of your own is a .yaml file.")
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
    inherited = read_recipe(below, (*above, path.resolve()))
    return {key: value for key, value in inherited.items() if key not in overlay} | overlay


def describe_recipe(name: str | Path) -> str:
    """The first sentence of a recipe's first comment, without its name. Empty if it has no comment.

    >>> describe_recipe("dice_ce").split(",")[0]
    'Dice + cross-entropy alone'
    """
    path = _recipe_file(name)
    comment = takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8-sig").splitlines())
    text = " ".join(line[2:].strip() for line in comment)
    return re.split(r"(?<=[.!?])\s", text.removeprefix(f"{path.stem}: "))[0]


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
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set expects KEY=VALUE, got {text!r}. Example: --set learning_rate=1e-3")
    return key, value if value[:1] in ("$", "@") else _parse(value, f"--set {key}: {value!r}")


def set_key(config: Any, key: str, value: Any, where: str, create: bool = False) -> None:
    """Set ``a::b::0`` (or MONAI's ``a#b#0``) in nested dicts and lists, in place.

    If a part belongs to a reference (``view_2: "@view_1"``), the section that it names is copied first, so that only
    this use of it changes. ``where`` names the config in a ConfigError, raised if it does not have the key; ``create``
    allows a new last part.
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
            raise ConfigError(f"{where}: {above} is {node!r} and has no key {part!r}. Set {above} as a whole.")
        # a component takes arguments that the template does not spell out
        elif part not in node and not (last and (create or "_target_" in node)):
            raise ConfigError(f"{where} has no key {key!r}. {suggestion(part, node)}")
        if not last:
            if (section := _referred(config, node[index])) is not None:
                copied = copy.deepcopy(section)
                if isinstance(node, CommentedMap) and isinstance(copied, CommentedMap) and index in node.ca.items:
                    copied.ca.items[list(copied)[-1]] = node.ca.items.pop(index)  # the comment after it stays there
                node[index] = copied
            node = node[index]
        elif depth and isinstance(node, CommentedMap) and index not in node:
            node.insert(min(1, len(node)), index, value)  # at the end it would follow the next section's comment
        else:
            node[index] = value


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


def innermost(error: BaseException) -> BaseException:
    """The error that began a chain, or the first of ours in it."""
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None and following not in chain:
        chain.append(following)
    return next((e for e in chain if isinstance(e, MedsegError)), chain[-1])


@contextmanager
def settings_at_fault() -> Iterator[None]:
    """Turn the errors of a config's classes and expressions, except out of memory, into a ConfigError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except CONFIG_ERRORS as error:
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        reason = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0].rstrip(" .:")
        cure = "Check --set, the recipe, and the run's configs/train.yaml and configs/plan.json."
        raise ConfigError(f"The settings are invalid: {reason}. {cure}") from error
