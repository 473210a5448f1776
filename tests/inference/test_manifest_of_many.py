"""manifest.json: several processes in one folder, and a file that a person has edited."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toy_runs import blobs, save_nifti

from medseg_supcon.inference import Manifest, Predictor
from medseg_supcon.inference import manifest as _manifest

HEAD = {"models": [{"name": "run", "sha256": "0"}], "settings": "0"}

ADDER = """
import sys
from pathlib import Path
from medseg_supcon.inference import Manifest

manifest = Manifest(Path(sys.argv[1]), {"models": [{"name": "run", "sha256": "0"}], "settings": "0"})
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    manifest.add({"name": f"{sys.argv[2]}{number}", "status": "done", "warnings": []})
print("added", flush=True)
sys.stdin.readline()
manifest.write()
"""


def start(path: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ADDER, str(path), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def await_word(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None and process.stdout.readline() == f"{word}\n"


def listed(path: Path) -> list[str]:
    return sorted(entry["name"] for entry in json.loads(path.read_text())["scans"])


def test_two_processes_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    both = [start(path, name) for name in "ab"]
    for word in ("ready", "added"):
        for process in both:
            await_word(process, word)
        for process in both:
            go_on(process)
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert listed(path) == sorted(f"{name}{number}" for name in "ab" for number in range(20))
    assert json.loads(path.read_text())["summary"]["done"] == 40
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_a_process_that_is_killed_loses_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with start(path, "a") as process:
        await_word(process, "ready")
        go_on(process)
        await_word(process, "added")
        process.kill()
    assert len(listed(path)) < 20  # the rest is in the journal, whose last line may be half a line
    with (tmp_path / _manifest.JOURNAL).open("a") as journal:
        journal.write('\n{"name": "b", "sta')
    manifest = Manifest(path, HEAD)
    assert len(manifest.earlier) == 20  # what is finished is known to the next call
    manifest.due = time.monotonic() + 60
    manifest.add({"name": "c", "status": "failed", "error": "x"})
    assert "c" in Manifest(path, HEAD).earlier
    manifest.write()
    assert listed(path) == sorted([*(f"a{number}" for number in range(20)), "c"])
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_the_whole_file_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each scan: the time would be quadratic in the number of scans."""
    now, written = [0.0], []
    monkeypatch.setattr(_manifest.time, "monotonic", lambda: now[0])
    real = _manifest.write_whole
    monkeypatch.setattr(
        _manifest, "write_whole", lambda path, write: (written.append(now[0]), real(path, write))
    )
    manifest = Manifest(tmp_path / "manifest.json", HEAD)
    for number in range(1000):
        now[0] = number / 50
        manifest.add({"name": str(number), "status": "done", "warnings": []})
    assert written == [0.0, 5.0, 10.0, 15.0]
    manifest.write()
    assert len(listed(tmp_path / "manifest.json")) == 1000


ODD: list[Any] = [
    {"warnings": None},
    {"warnings": [1]},
    {"status": None},
    {"status": "lost"},
    {"status": ["done"]},
    {"name": 3},
    "text",
    None,
]


@pytest.mark.parametrize("change", ODD, ids=str)
def test_an_entry_that_is_odd_is_left_out_and_said(
    threshold_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    out, predictor = tmp_path / "out", Predictor(threshold_run, device="cpu")
    for name in "ab":
        save_nifti(tmp_path / "in" / f"{name}.nii", blobs((5, 4, 3)))
    predictor.run([tmp_path / "in"], out)
    content = json.loads((out / "manifest.json").read_text())
    content["scans"][0] = {**content["scans"][0], **change} if isinstance(change, dict) else change
    (out / "manifest.json").write_text(json.dumps(content))
    entries = predictor.run([tmp_path / "in"], out)["scans"]
    assert [entry["status"] for entry in entries] == ["skipped", "skipped"]
    assert "does not say what made it" in entries[0]["warnings"][0]
    assert entries[1]["warnings"] == []
    assert "1 of its entries" in caplog.text
    assert len(json.loads((out / "manifest.json").read_text())["scans"]) == 2
