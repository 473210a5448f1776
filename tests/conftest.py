"""What tests of all rooms share: one thread each (two run at once), and one small run that was trained."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import TINY

torch.set_num_threads(1)
# The record of runs that were made here: not the developer's own.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="medseg-state-")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds Task04_Hippocampus and LeftAtrium_1p5mm, from MEDSEG_DATA."""
    folder = os.environ.get("MEDSEG_DATA")
    if not folder:
        pytest.skip("MEDSEG_DATA is not set: tests on real scans are skipped")
    return Path(folder)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled phantoms of about 24 voxels a side, and two unseen ones."""
    from medseg_supcon.datasets import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "data", cases=6, unseen=2, size=24.0)


@pytest.fixture(scope="session")
def trained_run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for two epochs of three steps: whole, not good. Do not change it."""
    from medseg_supcon.datasets import read_dataset, split_cases
    from medseg_supcon.training import prepare_run, train_run

    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("runs") / "run"
    prepare_run(dataset, split_cases(dataset), run, epochs=2, settings=TINY, device="cpu")
    train_run(run, device="cpu", quiet=True)
    return run


@pytest.fixture(scope="session")
def rated_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with a quality model, for which its training is really too short. Do not change it."""
    from medseg_supcon.quality import model
    from medseg_supcon.training import fit_quality
    from medseg_supcon.training import quality as fitting

    run = tmp_path_factory.mktemp("rated") / "run"
    shutil.copytree(trained_run, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "WINDOWS_PER_STEP", 10_000)
        patch.setattr(fitting, "MOST", 36)
        patch.setattr(model, "TREES", 20)
        assert fit_quality(run, "cpu") is not None
    return run


@pytest.fixture
def medseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call ``medseg`` in this process: (exit code, stdout, stderr)."""

    from medseg_supcon.cli import commands as cli

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, args)])
        monkeypatch.setattr(cli, "_quieten", lambda: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out, shown.err
        return stop.value.code, shown.out, shown.err

    return call
