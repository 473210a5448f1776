"""README and docs: links lead somewhere, commands parse, Python runs, and every page starts with a command."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from medseg_supcon.cli import app

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [page for page in [*PAGES, *DOCS] if page.exists()]
COMMANDS = typer.main.get_command(app).commands
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of the blocks of a page, fenced or indented; an indented one is "sh"."""
    found: list[tuple[str, str]] = []
    language, indented, before = None, False, ""
    lines: list[str] = []
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:].strip() or "text", []
            else:
                found.append((language, "\n".join(lines)))
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    ") and (indented or not before.strip()):
            lines = [*lines, line[4:]] if indented else [line[4:]]
            indented = True
        elif indented:
            found.append(("sh", "\n".join(lines)))
            indented = False
        before = line
    return found


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", code)
    return [text for line in joined.splitlines() if (text := re.sub(r"(^|\s)#.*", "", line).strip())]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its fenced blocks, in which # and []() have other meanings."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and GitLab make them."""
    heads = [re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", head) for head in re.findall(r"^#+ +(.*)$", prose(page), re.M)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^]]*]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in slugs(other), f"{name(page)} links to {target}; {sorted(slugs(other))}"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"]\((\w+\.md)", index))
    assert linked == {page.name for page in DOCS} - {"README.md"}


def check_command(line: str) -> None:
    """A `medseg` command has the options that it is shown with; a module, a target of make and an extra exist."""
    program, *arguments = shlex.split(line)
    if program == "medseg":
        COMMANDS[arguments[0]].make_context(f"medseg {arguments[0]}", arguments[1:])
    elif program == "python":
        assert importlib.util.find_spec(arguments[1]), line
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif program == "pip":
        extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        for extra in re.findall(r"medseg-supcon\[(.*?)]", line):
            assert all(re.search(rf"^{part} = ", extras, re.M) for part in extra.split(",")), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist_with_their_options(page: Path) -> None:
    for language, code in blocks(page):
        for line in commands(code) if language == "sh" else ():
            if re.match(r"(medseg|make|python -m|pip install) ", line):
                check_command(line)


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_every_page_starts_with_a_command(page: Path) -> None:
    title, _, first = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert first == "```python" or re.match(r"    (medseg|python -m|make|pip install|docker build) ", first), first


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # MONAI's, of every bundle that it loads
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_runs(
    page: Path, rated_run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder that has RUN, DATASET, SCANS and scan.nii.gz, all blocks of a page one after the other."""
    shutil.copytree(rated_run, tmp_path / "RUN")
    shutil.copytree(rated_run, tmp_path / "hippocampus")
    shutil.copytree(phantoms, tmp_path / "DATASET")
    shutil.copytree(phantoms / "imagesTs", tmp_path / "SCANS")
    shutil.copy(next((phantoms / "imagesTs").iterdir()), tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page.stem}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, name(page), "exec"), scope)
