"""The room as a whole: its examples run, its modules import in one direction, and NIfTI needs no further library."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medseg_supcon.scans as room
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import read_scan

FILES = sorted(Path(room.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_examples(file: Path) -> None:
    assert doctest.testmod(importlib.import_module(f"{room.__name__}.{file.stem}")).failed == 0


def test_no_circle_and_nothing_from_a_higher_room() -> None:
    arrows: dict[str, set[str]] = {}
    for file in FILES:
        imported = {n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}
        ours = {str(name) for name in imported if name and name.startswith("medseg_supcon")}
        arrows[f"{room.__name__}.{file.stem}"] = ours
    lower = set().union(*arrows.values()) - set(arrows)
    assert lower == {"medseg_supcon.errors", "medseg_supcon.files"}
    list(TopologicalSorter(arrows).static_order())  # raises for a circle


def test_nifti_needs_neither_simpleitk_nor_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SimpleITK", "pydicom"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), dtype=np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    os.mkfifo(tmp_path / "pipe")
    (scan,) = find_scans([tmp_path])
    assert read_scan(scan, 1).data.shape == (4, 5, 6)
