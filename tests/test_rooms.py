"""The structure of the package: arrows between rooms point downwards, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import medseg_supcon

PACKAGE = Path(medseg_supcon.__file__).parent
# from high to low: a room imports from lower ones only
ROOMS = (
    "cli", "comparison", "embedding", "training", "inference", "quality", "bundle", "plan", "evaluation", "datasets",
    "views", "networks", "scans", "losses",
)  # fmt: skip
EVERYWHERE = ("errors", "files", "slurm", "text")


def _modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import from the package, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "medseg_supcon":
            found |= {(node.module.partition(".")[2], alias.name) for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def test_a_room_imports_from_lower_rooms_only():
    wrong = []
    for name, path in _modules().items():
        room = name.split(".")[0]
        for module, _ in _imports(path):
            other = module.split(".")[0]
            if room not in ROOMS or other in ("", *EVERYWHERE):
                continue
            if other != room and ROOMS.index(other) <= ROOMS.index(room):
                wrong.append(f"{name} -> {module}")
    assert not wrong


def test_losses_import_torch_alone():
    allowed = {"torch", "medseg_supcon", *sys.stdlib_module_names}
    for path in (PACKAGE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_no_modules_import_each_other_in_a_circle():
    modules = _modules()
    graph = {}
    for name, path in modules.items():
        if path.name == "__init__.py":
            continue
        targets = set()
        for module, imported in _imports(path):
            if f"{module}.{imported}" in modules:
                targets.add(f"{module}.{imported}")
            elif module in modules and modules[module].name != "__init__.py":
                targets.add(module)
            else:  # a public name of a room: the module that defines it
                init = _imports(modules[module]) if module in modules else set()
                targets |= {source for source, public in init if public == imported}
        graph[name] = targets - {name}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_modules_have_plain_names():
    names = [path.stem for path in PACKAGE.rglob("*.py")]
    assert not [name for name in names if name.startswith("_") and name not in ("__init__", "__main__")]


def test_every_room_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(ROOMS)
