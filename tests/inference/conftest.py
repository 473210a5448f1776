"""Runs made by hand, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy_runs import threshold_weights, write_run

torch.set_num_threads(1)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name="run", weights=None, seed=0, **plan): a run folder; weights None: random ones."""
    return lambda name="run", **options: write_run(tmp_path / name, **options)


@pytest.fixture
def threshold_run(tmp_path: Path) -> Path:
    """A run whose mask is known: 0 below intensity 1, 4 in 1..2, 255 above 2."""
    return write_run(tmp_path / "run", weights=threshold_weights())
