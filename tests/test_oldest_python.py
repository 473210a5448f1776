"""The package needs no newer Python than the oldest that pyproject.toml allows."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medseg_supcon"
OLDEST = (3, 10)
LATER = {  # of the standard library, since 3.11; the linter and the type checker see the rest
    "tomllib", "Self", "StrEnum", "ReprEnum", "UTC", "ExceptionGroup", "BaseExceptionGroup", "TaskGroup", "Never",
    "LiteralString", "Required", "NotRequired", "Unpack", "TypeVarTuple", "assert_never", "assert_type", "override",
    "reveal_type", "dataclass_transform", "chdir", "add_note", "file_digest", "batched", "TypeAliasType", "cbrt",
    "walk_up", "delete_on_close", "onexc", "case_sensitive",
}  # fmt: skip


def later_names(source: str) -> Iterator[str]:
    """Names since 3.11 that a source imports, takes from a module, or gives as a keyword."""
    for node in ast.walk(ast.parse(source, feature_version=OLDEST)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", None) or ""
            if not origin.startswith("typing_extensions"):
                yield from {name.name for name in node.names} & LATER
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {node.attr} & LATER if node.value.id in sys.stdlib_module_names else ()
        elif isinstance(node, ast.keyword):
            yield from {node.arg or ""} & LATER


def test_the_package_keeps_to_the_oldest_python() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in text
    assert f'target-version = "py{OLDEST[0]}{OLDEST[1]}"' in text
    found = {file.name: [*later_names(file.read_text("utf-8"))] for file in PACKAGE.rglob("*.py")}
    assert len(found) > 60
    assert {name: later for name, later in found.items() if later} == {}


@pytest.mark.parametrize(
    "source",
    ["import tomllib", "from typing import Self", "import enum\nenum.StrEnum", "shutil.rmtree(x, onexc=f)"],
)
def test_what_is_newer_is_found(source: str) -> None:
    assert [*later_names(source)]


def test_newer_syntax_is_found() -> None:
    with pytest.raises(SyntaxError):
        [*later_names("try:\n    pass\nexcept* ValueError:\n    pass")]
