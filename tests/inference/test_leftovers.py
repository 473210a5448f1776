"""Leftovers of a killed process are removed, and no other process's files: in a container its number says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_runs import blobs, save_nifti

from medseg_supcon import files
from medseg_supcon.inference import Predictor

HALF_WAY = """
import sys
from pathlib import Path
from medseg_supcon.files import write_whole

def write(file):
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b" whole")

write_whole(Path(sys.argv[1]), write)
"""


@pytest.fixture
def half_way(tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """A process that has written half of out/other.nii.gz and waits."""

    def start() -> subprocess.Popen[str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        command = [sys.executable, "-c", HALF_WAY, str(tmp_path / "out" / "other.nii.gz")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        return process

    return start


def test_whose_a_temporary_file_is(
    threshold_run: Path, tmp_path: Path, half_way: Callable[[], subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    users = [out / name for name in (".mine.999999.tmp", ".deadbeef.1.tmp", "my.tmp")]
    for file in users:
        file.write_text("a person's own")
    scan = save_nifti(tmp_path / "s.nii", blobs((6, 5, 4)))
    predictor = Predictor(threshold_run, device="cpu")
    with half_way() as killed:
        killed.kill()
    (left,) = set(out.iterdir()) - set(users)
    assert left.read_bytes() == b"half"
    with half_way() as writing:
        (busy,) = set(out.iterdir()) - {*users, left}
        predictor.run([scan], out)
        names = ["manifest.json", "quality.csv", "s.nii.gz", busy.name, *(file.name for file in users)]
        assert sorted(file.name for file in out.iterdir()) == sorted(names)
        writing.communicate("\n", timeout=30)
    assert writing.returncode == 0
    assert (out / "other.nii.gz").read_bytes() == b"half whole"
    assert not busy.exists()
    assert all(file.read_text() == "a person's own" for file in users)


@pytest.mark.parametrize(("age", "stays"), [(3600, True), (100_000, False)])
def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, stays: bool) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    left = files.temporary_name(tmp_path)
    left.touch()
    os.utime(left, (time.time() - age,) * 2)
    files.remove_leftovers(tmp_path)
    assert left.exists() == stays
    files.write_whole(tmp_path / "a", lambda file: file.write(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"
