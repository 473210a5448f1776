"""What a first run on a GPU would show, on a machine without one: see pretend_cuda/pretend_cuda.py."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``walk.py`` found."""
    compiler = shutil.which("g++")
    if not sys.platform.startswith("linux") or torch.version.cuda is not None or compiler is None:
        pytest.skip("needs Linux, g++, and a torch without CUDA, whose place it takes")
    folder = tmp_path_factory.mktemp("pretend_cuda")
    library = folder / "libpretend_cuda.so"
    build = [
        compiler,
        "-std=c++20",
        "-O0",
        "-w",
        "-fPIC",
        "-shared",
        str(HERE / "pretend_cuda" / "device.cpp"),
    ]
    with_torch = [f"-isystem{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*build, "-o", str(library), *with_torch], check=True)
    paths = [str(HERE), str(HERE / "pretend_cuda"), os.environ.get("PYTHONPATH", "")]
    walk = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "pretend_cuda" / "walk.py"), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "MEDSEG_PRETEND_CUDA": str(library),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert walk.returncode == 0, walk.stderr[-5000:]
    told: dict[str, Any] = json.loads(walk.stdout.splitlines()[-1])
    return told


def test_tensors_of_two_devices_do_not_mix(found: dict[str, Any]) -> None:
    """Otherwise the tests that follow would show nothing."""
    assert "same device" in found["two devices"]


def test_every_recipe_trains(found: dict[str, Any]) -> None:
    for name in ("joint, second GPU", "semi", "two_stage"):
        assert found[name] and all(map(math.isfinite, found[name])), name


def test_the_device_changes_no_result(found: dict[str, Any]) -> None:
    assert found["joint"] == pytest.approx(found["joint on cpu"], rel=1e-4)
    assert found["masks differ in"] == [0, 0]


def test_a_resumed_training_waits_for_no_step_count(found: dict[str, Any]) -> None:
    assert found["steps"] == ["cpu"]
    assert found["checkpoint on a CPU"] == 2
