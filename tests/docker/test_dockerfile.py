"""The container's files: pinned, unprivileged, from the base image and the checkout alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = load("steps").instructions((DOCKER / "Dockerfile").read_text())
    return found


def arguments(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [argument for found, argument in steps if found == name]


def test_one_base_with_a_version(steps: list[tuple[str, str]]) -> None:
    base, *of_pip = arguments(steps, "ARG")
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d", base)
    assert set(of_pip) == {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"}, "no default: what is not passed is pip's own matter"
    bases = [argument.split()[0] for argument in arguments(steps, "FROM")]
    assert bases[0] == "${BASE}" and set(bases[1:]) == {"system"}


def test_an_edit_of_the_code_keeps_the_dependencies(steps: list[tuple[str, str]]) -> None:
    """The stages that the large layer comes from copy nothing but the two files that name versions."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for name, argument in steps:
        if name == "FROM":
            stage = stages.setdefault(argument.partition(" AS ")[2], [])
        elif name != "ARG":
            stage.append((name, argument))
    copied = {name: arguments(stage, "COPY") for name, stage in stages.items()}
    assert copied["system"] == []
    assert copied["requirements"] == ["pyproject.toml docker/requirements.py ./"]
    assert copied["dependencies"] == ["constraints.txt ./", "--from=requirements /src/requirements.txt ./"]
    assert copied[""] == ["--from=dependencies /opt/medseg /opt/medseg"]


def test_it_runs_as_nobody_in_particular(steps: list[tuple[str, str]]) -> None:
    final = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    (user,) = arguments(final, "USER")
    assert user.isdigit() and int(user) >= 1000
    assert final.index(("USER", user)) > max(i for i, (name, _) in enumerate(final) if name == "RUN")
    assert arguments(final, "ENTRYPOINT") == ['["medseg"]']
    (environment,) = arguments(final, "ENV")
    values = dict(word.split("=", 1) for word in environment.split())
    assert all(values[name].startswith("/tmp") for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"))


def test_every_install_is_pinned_and_leaves_no_cache(steps: list[tuple[str, str]]) -> None:
    for command in arguments(steps, "RUN"):
        for part in command.split("&&"):
            if "pip install" in part:
                assert "--no-cache-dir" in part
                assert any(word in part for word in ("--constraint", "--no-index", "==")), part
            if "apt-get install" in part:
                assert "--no-install-recommends" in part and "rm -rf /var/lib/apt/lists" in command
        assert "curl" not in command and "wget" not in command and "ADD" not in command


def test_no_address_but_the_base_images_short_name() -> None:
    for file in ("Dockerfile", "compose.yaml", "requirements.py", "steps.py", "check_without_docker.sh"):
        text = (DOCKER / file).read_text()
        addresses = re.findall(r"https?://\S+|--(?:extra-)?index-url|\b[\w-]+(?:\.[\w-]+)+/[\w/.-]+:\d", text)
        assert [a for a in addresses if "localhost" not in a] == [], file


def test_what_is_copied_exists_and_is_let_through() -> None:
    steps = load("steps").instructions((DOCKER / "Dockerfile").read_text())
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    for argument in arguments(steps, "COPY"):
        if "--from=" not in argument:
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in let_through, source


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_requirements_are_pyprojects() -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml"), "export", "dicom-seg"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pinned = {
        re.split("[=<> ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = {re.split("[=<>!~ ]", line)[0].lower().replace("_", "-") for line in lines}
    assert {"torch", "monai", "onnx", "highdicom"} <= names
    assert names <= pinned


def test_compose_is_shut_in() -> None:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = content["services"]
    assert {"train", "predict", "tensorboard"} <= set(services)
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert name == "tensorboard" or service["network_mode"] == "none"


def tool(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{names[0]} is not installed")


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing() -> None:
    script = str(DOCKER / "check_without_docker.sh")
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_reads_its_file(tmp_path: Path) -> None:
    """As docker compose does: variables filled in, sections merged."""
    command = [tool("docker-compose"), "-f", str(DOCKER / "compose.yaml"), "config"]
    places = {"DATA": "/some/data", "RUNS": "/some/runs"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True, check=True
    )
    services = yaml.safe_load(done.stdout)["services"]
    assert "/some/runs:/runs:rw" in str(services["train"]["volumes"])
    assert services["train"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert "deploy" not in services["tensorboard"]


def test_steps_become_a_shell_script(tmp_path: Path) -> None:
    steps = load("steps")
    text = "# x\nFROM a\nWORKDIR {w}\nCOPY one two ./\nRUN --mount=type=bind,from=p cat one \\\n && cat two > three\n"
    (tmp_path / "one").write_text("1\n")
    (tmp_path / "two").write_text("2\n")
    work = tmp_path / "work"
    script = "\n".join(steps.build(steps.instructions(text.replace("{w}", str(work))), str(tmp_path)))
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert (work / "three").read_text() == "2\n"


def test_the_script_is_valid_shell() -> None:
    shell = shutil.which("sh")
    assert shell is not None
    subprocess.run([shell, "-n", str(DOCKER / "check_without_docker.sh")], check=True)
