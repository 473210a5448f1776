"""Variants: the points of a grid of settings, under each of which every recipe is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from medseg_supcon.errors import ConfigError

Settings = Sequence[tuple[str, Any]]
Axes = Mapping[str, Mapping[str, Mapping[str, Any]]]  # axis -> level -> settings


@dataclass(frozen=True)
class Variant:
    """One point of a grid.

    Attributes:
        levels: axis -> level; empty where there is no grid.
        parts: axis -> what the level sets.
    """

    levels: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """(key, value) overrides of ``train.yaml``, laid over the recipe."""
        return tuple(setting for part in self.parts.values() for setting in part.items())

    @property
    def name(self) -> str:
        """The levels in words: ``SGD, fixed, with``."""
        return ", ".join(self.levels.values())

    @property
    def folder(self) -> str:
        """The name as a part of a folder's name."""
        return "-".join(re.sub(r"[^\w.]+", "_", level) for level in self.levels.values())


PLAIN = Variant()  # no grid


def make_variants(axes: Axes) -> tuple[Variant, ...]:
    """Every combination of one level from each axis, the last axis changing fastest; without axes the one variant.

    Raises:
        ConfigError: an axis without levels, or two combinations that would share a folder.

    Example:
        >>> axes = {"optimiser": {"SGD": {"learning_rate": 0.1}, "Adam": {}}, "decay": {"on": {}, "off": {}}}
        >>> [variant.name for variant in make_variants(axes)]
        ['SGD, on', 'SGD, off', 'Adam, on', 'Adam, off']
    """
    empty = [axis for axis, levels in axes.items() if not levels]
    if empty:
        raise ConfigError(f"variants: the axis {empty[0]!r} has no levels. Give it some, or leave it out.")
    found = []
    for chosen in product(*(levels.items() for levels in axes.values())):
        levels = dict(zip(axes, (level for level, _ in chosen), strict=True))
        found.append(Variant(levels, dict(zip(axes, (part for _, part in chosen), strict=True))))
    folders = [variant.folder.lower() for variant in found]
    twice = next((v for v in found if folders.count(v.folder.lower()) > 1), None)
    if twice is not None:
        raise ConfigError(f"variants: {twice.name!r} and another one would share a folder. Rename a level.")
    return tuple(found)


def level_settings(variants: Sequence[Variant]) -> dict[str, dict[str, dict[str, Any]]]:
    """The axes that variants were made from: axis -> level -> settings."""
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        for axis, level in variant.levels.items():
            axes.setdefault(axis, {})[level] = dict(variant.parts[axis])
    return axes
