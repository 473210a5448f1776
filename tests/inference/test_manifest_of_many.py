"""manifest.json: several processes in one folder, and a file that a person has edited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_runs import blobs, save_nifti

from medseg_supcon.inference import Predictor

ADDER = """
import sys
from pathlib import Path
from medseg_supcon.inference._manifest import Manifest

manifest = Manifest(Path(sys.argv[1]), {"models": [{"name": "run", "sha256": "0"}], "settings": "0"})
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    manifest.add({"name": f"{sys.argv[2]}{number}", "status": "done", "warnings": []})
"""


def test_two_processes_lose_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ADDER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    written = json.loads(path.read_text())
    names = sorted(entry["name"] for entry in written["scans"])
    assert names == sorted(f"{name}{number}" for name in "ab" for number in range(20))
    assert written["summary"]["done"] == 40
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


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
