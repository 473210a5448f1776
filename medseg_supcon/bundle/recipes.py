"""Recipes, and where they and the bundle template lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medseg_supcon.bundle.settings import read_yaml_file
from medseg_supcon.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(name: str) -> Path:
    """``bundles`` or ``configs``: in the wheel under ``_share``, in a checkout beside the package."""
    for root in (PACKAGE / "_share", PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"The folder {name!r} is missing from this installation. Install medseg-supcon again.")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in shared_folder("configs").glob("*.yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe's overlay on ``train.yaml``: a name from ``configs/``, or a YAML file of one's own.

    A recipe with a key ``base`` starts from that recipe (a name, or a file's path, seen from the recipe's folder)
    and goes over it.

    Raises:
        ConfigError: no such recipe, not a mapping of keys to values, or recipes that start from one another.
    """
    return _read(str(name), ())


def _read(name: str, above: tuple[Path, ...]) -> dict[str, Any]:
    path = _file_of(name)
    if not path.is_file():
        near = get_close_matches(str(name), recipe_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"There is no recipe {str(name)!r}.{hint} Known: {', '.join(recipe_names())}, or a path to a .yaml file."
        )
    overlay = read_yaml_file(path, f"Recipe {path}") or {}
    if not isinstance(overlay, dict):
        raise ConfigError(
            f"Recipe {path} must be a mapping of train.yaml's keys to values, found a {type(overlay).__name__}."
        )
    base = overlay.pop("base", None)
    if base is None:
        return overlay
    if path.resolve() in above:
        raise ConfigError(
            f"Recipe {path} starts from itself: its base is {base!r}. Take one of the bases out."
        )
    found = path.parent / str(base) if Path(str(base)).suffix in (".yaml", ".yml") else base
    inherited = _read(str(found), (*above, path.resolve()))
    return {key: value for key, value in inherited.items() if key not in overlay} | overlay


def describe_recipe(name: str | Path) -> str:
    """The first sentence of a recipe's first comment, without its name: what it is. Empty where there is none.

    >>> describe_recipe("dice_ce").split(",")[0]
    'Dice + cross-entropy alone'
    """
    path, comment = _file_of(name), []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:].strip())
    return re.split(r"(?<=[.!?])\s", " ".join(comment).removeprefix(f"{path.stem}: "))[0]


def _file_of(name: str | Path) -> Path:
    path = Path(name)
    return path if path.suffix in (".yaml", ".yml") else shared_folder("configs") / f"{name}.yaml"
