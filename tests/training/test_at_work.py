"""Two commands in one run's folder at once: the second is refused, and changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_supcon.bundle import at_work_in
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.training import prepare_run, train_run

LOCKED = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); sys.stdin.read()"


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".medseg.lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_run_is_trained_by_one_command_at_a_time(trained_run: Path, tmp_path: Path, medseg) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "eval" / "metrics.json").unlink()  # there is something left to do
    before = contents(run)
    command = [sys.executable, "-c", LOCKED, str(run / ".medseg.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        dataset = read_dataset_of(run)
        code, _, said = medseg("train", dataset, "--out", run, "--resume", "--device", "cpu")
        assert code == 2
        assert f"Another medseg is working in {run}" in " ".join(said.split())
        with pytest.raises(RunError, match="is working in"):
            train_run(run, device="cpu", resume=True, quiet=True)
        assert contents(run) == before
        os.kill(other.pid, signal.SIGKILL)
    train_run(run, device="cpu", resume=True, quiet=True)
    assert (run / "eval" / "metrics.json").exists()


def read_dataset_of(run: Path) -> str:
    from medseg_supcon.bundle import read_config

    return str(read_config(run / "configs" / "train.yaml")["dataset_dir"])


def test_a_folder_is_planned_by_one_command_at_a_time(phantoms: Path, tmp_path: Path) -> None:
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    (run / ".planning").mkdir(parents=True)
    (run / ".planning" / "of the other.txt").write_text("half a run")
    with at_work_in(run), pytest.raises(RunError, match="Another medseg is working in"):
        prepare_run(dataset, split_cases(dataset), run, epochs=1, device="cpu")
    assert list(contents(run)) == [".planning/of the other.txt"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads
def test_processes_forked_meanwhile_keep_nobody_out(tmp_path: Path) -> None:
    """As a data loader's workers, which end a little later."""
    fork = multiprocessing.get_context("fork")
    end = fork.Event()
    with at_work_in(tmp_path):
        worker = fork.Process(target=end.wait)
        worker.start()
    with at_work_in(tmp_path):
        assert worker.is_alive()
    end.set()
    worker.join()
