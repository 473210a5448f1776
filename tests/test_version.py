"""The version is written in one place, and the changelog's newest release is this version."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import medseg_supcon

ROOT = Path(__file__).parents[1]


def test_the_version_is_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and 'path = "medseg_supcon/__init__.py"' in project
    assert not re.search(r"^version\s*=", project, re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", medseg_supcon.__version__)
    written = f'"{medseg_supcon.__version__}"'
    files = [
        path for path in (ROOT / "medseg_supcon").rglob("*.py") if f"__version__ = {written}" in path.read_text("utf-8")
    ]
    assert [path.name for path in files] == ["__init__.py"] and files[0].parent.name == "medseg_supcon"


def test_the_changelog_has_it_with_its_date() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    version, _, day = heads[0].partition(" - ")
    assert version == medseg_supcon.__version__ and date.fromisoformat(day)
