"""A comparison as one YAML file: recipes, a grid of variants, seeds, labels, length, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medseg_supcon.bundle import read_yaml, shared_folder
from medseg_supcon.errors import ConfigError

KEYS = {
    "recipes": "a list of names or .yaml files, or a mapping NAME: {recipe: NAME or file, KEY: VALUE, ...}",
    "variants": "a mapping AXIS: {LEVEL: {KEY: VALUE, ...}, ...}",
    "seeds": "a list of whole numbers",
    "labels": "a list of whole numbers, or 'all'",
    "validation": "a share from 0 to 0.9",
    "epochs": "a whole number from 1",
    "settings": "a mapping KEY: VALUE",
    "robustness": "true or false",
    "training_score": "true or false",
}
MOST_VALIDATION = 0.9  # as the command line


@dataclass(frozen=True)
class ComparisonConfig:
    """What a comparison's file says; what it leaves out has the command line's defaults.

    Attributes:
        recipes: (name, recipe), the baseline first; a recipe is a name or a file.
        own: name -> settings of that recipe alone.
        variants: axis -> level -> settings.
        settings: of all runs.
        seeds, labels: None: not said. A label budget of None is "all".
        validation: share of the labelled scans that validates; None: not said.
        epochs: None: not said.
        robustness: test on corrupted scans, too; None: not said.
        training_score: Dice on the scans trained on, too.
    """

    recipes: tuple[tuple[str, str | Path], ...] = ()
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    labels: tuple[int | None, ...] | None = None
    validation: float | None = None
    epochs: int | None = None
    robustness: bool | None = None
    training_score: bool = False


def read_comparison(name: str | Path) -> ComparisonConfig:
    """A comparison's file, or one that comes with the package (``article``, of ``configs/comparisons``).

    Recipe files in it are relative to its own folder.

    Raises:
        ConfigError: no such file, an unknown key, or a value of the wrong kind.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = shared_folder("configs") / "comparisons" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (shared_folder("configs") / "comparisons").glob("*.yaml"))
        raise ConfigError(f"--config {name}: there is no such file. Known by name: {', '.join(known)}.")
    given = read_yaml(path.read_text(), str(path)) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must be a mapping of {', '.join(KEYS)}; found a {type(given).__name__}.")
    for key in given:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(KEYS)}."
            raise ConfigError(f"{path} has an unknown key {key!r}. {hint}")
    recipes, own = _recipes(given.get("recipes", []), path)
    variants = _mapping(given, "variants", path)
    for axis, levels in variants.items():
        if not isinstance(levels, dict) or not all(isinstance(s, dict | None) for s in levels.values()):
            raise _wrong(path, "variants", f"{axis}: {levels!r}")
    return ComparisonConfig(
        recipes,
        own,
        {str(a): {str(n): s or {} for n, s in levels.items()} for a, levels in variants.items()},
        _mapping(given, "settings", path),
        None
        if "seeds" not in given
        else tuple(_whole(n, "seeds", path) for n in _list(given, "seeds", path)),
        None
        if "labels" not in given
        else tuple(None if n == "all" else _whole(n, "labels", path) for n in _list(given, "labels", path)),
        _share(given, "validation", path),
        None if given.get("epochs") is None else _whole(given["epochs"], "epochs", path, least=1),
        _flag(given, "robustness", path),
        bool(_flag(given, "training_score", path)),
    )


def _recipes(value: Any, path: Path) -> tuple[tuple[tuple[str, str | Path], ...], dict[str, dict[str, Any]]]:
    if isinstance(value, list) and all(isinstance(r, str) for r in value):
        return tuple((Path(recipe).stem, _beside(recipe, path)) for recipe in value), {}
    if not (
        isinstance(value, dict) and all(isinstance(of, dict) and "recipe" in of for of in value.values())
    ):
        raise _wrong(path, "recipes", repr(value))
    files = tuple((str(name), _beside(str(of["recipe"]), path)) for name, of in value.items())
    own = {str(name): {k: v for k, v in of.items() if k != "recipe"} for name, of in value.items()}
    return files, own


def _beside(recipe: str, path: Path) -> str | Path:
    return path.parent / recipe if recipe.endswith((".yaml", ".yml")) else recipe


def _mapping(given: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(path, key, repr(value))
    return value


def _list(given: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = given[key]
    found = value if isinstance(value, list) else [value]
    if not found:
        raise _wrong(path, key, repr(value))
    return found


def _whole(value: Any, key: str, path: Path, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(path, key, repr(value))
    return value


def _share(given: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = given.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_VALIDATION:
        raise _wrong(path, key, repr(value))
    return float(value)


def _flag(given: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path, key, repr(value))
    return value


def _wrong(path: Path, key: str, found: str) -> ConfigError:
    return ConfigError(f"{path}: {key} must be {KEYS[key]}; found {found}.")
