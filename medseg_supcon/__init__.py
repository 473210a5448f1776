"""Segmentation of 3-D medical scans from few labels, with a supervised contrastive loss per voxel."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Rooms load when they are first named: a bundle's config says ``import medseg_supcon`` alone."""
    if find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
