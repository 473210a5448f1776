"""manifest.json: several processes in one folder, and a file that a person has edited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_runs import blobs, save_nifti

from medseg_supcon.inference import Manifest, Predictor
from medseg_supcon.inference import manifest as manifest_module

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


def test_a_mask_of_a_killed_process_gets_its_entry_again(threshold_run: Path, tmp_path: Path) -> None:
    """SIGKILL between the mask and its entry: label voxels, volume and border are counted in the mask."""
    scan = save_nifti(tmp_path / "in" / "a.nii", blobs((9, 8, 7)), np.diag([0.5, 2, 3, 1.0]))
    out, predictor = tmp_path / "out", Predictor(threshold_run, device="cpu")
    (before,) = predictor.run([scan], out)["scans"]
    for left in ({"scans": []}, {"scans": [{"name": "b", "status": "done"}]}):
        (out / "manifest.json").write_text(json.dumps(left))
        (entry,) = predictor.run([scan], out)["scans"]
        assert entry["status"] == "skipped" and "does not say which model" in entry["warnings"][0]
        for key in ("labels", "shape", "spacing_mm"):
            assert entry[key] == before[key] != {}
        assert entry in json.loads((out / "manifest.json").read_text())["scans"]


KILLED = """
import os, signal, sys
from medseg_supcon.inference import Predictor, folder

def killed(path, mask, grid, write=folder.write_nifti):
    write(path, mask, grid)
    if path.name == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)

folder.write_nifti = killed
Predictor(sys.argv[1], device="cpu").run([sys.argv[2]], sys.argv[3])
"""


def test_sigkill_right_after_a_mask_loses_no_entry(threshold_run: Path, tmp_path: Path) -> None:
    for name in "abcd":
        save_nifti(tmp_path / "in" / f"{name}.nii", blobs((6, 5, 4)))
    out, places = tmp_path / "out", [str(threshold_run), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *places, "c.nii.gz"], timeout=200)
    assert done.returncode == -9
    entries = Predictor(threshold_run, device="cpu").run([tmp_path / "in"], out)["scans"]
    assert [entry["status"] for entry in entries] == ["skipped", "skipped", "skipped", "done"]
    assert all(entry["labels"]["organ"]["voxels"] == entries[3]["labels"]["organ"]["voxels"] for entry in entries)
    assert listed(out / "manifest.json") == list("abcd")


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of thousands of scans it would grow with their square; a few scans are listed at once."""
    now, spent = [0.0], [0.0]
    real = manifest_module.write_whole

    def write(path: Path, content: Any) -> None:
        cost = 0.001 * len(manifest.entries)
        now[0], spent[0] = now[0] + cost, spent[0] + cost
        real(path, content)

    monkeypatch.setattr(manifest_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(manifest_module, "write_whole", write)
    path = tmp_path / "manifest.json"
    manifest = Manifest(path, HEAD)
    for number in range(1000):
        now[0] += 0.1
        manifest.add({"name": str(number), "status": "done", "warnings": []})
        if number < 3:
            assert len(listed(path)) == number + 1
    assert 0 < spent[0] < 0.06 * now[0]
    manifest.write()
    assert len(listed(path)) == 1000


ODD: list[Any] = [
    {"warnings": None},
    {"warnings": [1]},
    {"status": None},
    {"status": "lost"},
    {"status": ["done"]},
    {"name": 3},
    {"seconds": float("inf")},
    {"labels": {"organ": {"volume_ml": float("nan")}}},
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
    assert "does not say which model made it" in entries[0]["warnings"][0]
    assert entries[1]["warnings"] == []
    assert "1 of its entries" in caplog.text
    assert len(json.loads((out / "manifest.json").read_text())["scans"]) == 2


WHOLE = {
    "infinity": '{"scans": Infinity}',
    "deep": "[" * 100_000,
    "deep list": '{"scans": [' + "[" * 5000 + "]" * 5000 + "]}",
    "digits": '{"scans": ' + "9" * 5000 + "}",
    "list": "[]",
    "text": '"x"',
    "mapping": '{"scans": {"a": 1}}',
    "empty": "",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
def test_a_manifest_that_cannot_be_read_is_written_again(
    threshold_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    out, predictor = tmp_path / "out", Predictor(threshold_run, device="cpu")
    scan = save_nifti(tmp_path / "a.nii", blobs((5, 4, 3)))
    predictor.run([scan], out)
    (out / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    (entry,) = predictor.run([scan], out)["scans"]
    assert entry["status"] == "skipped" and entry["labels"]
    assert "1 of its entries" in caplog.text
    assert listed(out / "manifest.json") == ["a"]


@pytest.mark.parametrize("levels", [100, 300, 450, 600, 900])
def test_nested_entries_end_no_prediction(threshold_run: Path, tmp_path: Path, levels: int) -> None:
    out, predictor = tmp_path / "out", Predictor(threshold_run, device="cpu")
    scan = save_nifti(tmp_path / "a.nii", blobs((5, 4, 3)))
    predictor.run([scan], out)
    nested = '{"name": "a", "status": "done", "x": ' + "[" * levels + "]" * levels + "}"
    (out / "manifest.json").write_text('{"scans": [' + nested + "]}")
    assert predictor.run([scan], out)["summary"]["skipped"] == 1
    assert listed(out / "manifest.json") == ["a"]
