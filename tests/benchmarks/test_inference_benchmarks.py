"""The benchmarks of inference run, on a scan that takes no time, and measure what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import large_scan
from benchmarks._scan import make_run, make_scan

ROOT = Path(__file__).parents[2]


def benchmark(name: str, *arguments: object) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


SMALL = ("--shape", 30, 26, 20, "--organs", 3, "--cases", "as planned")


def test_the_contest_says_that_masks_are_the_same(tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    nowhere = "--nnunet-python", tmp_path / "python"
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    benchmark("inference", *SMALL, "--rounds", 1, "--result", result, *nowhere)
    rows = {line.split("|")[1].strip(): line for line in result.read_text().splitlines() if "|" in line}
    assert {"medseg predict", "stock bundle"} < set(rows)
    assert "nnU-Net was left out: python cannot import nnunetv2" in result.read_text()
    differ = int(rows["stock bundle"].split("|")[5].split()[0].replace(",", ""))
    assert differ <= 5  # of 15,600: ties
    peak = float(rows["medseg predict"].split("|")[3].replace(",", ""))
    assert 200 < peak < 2000  # MiB: torch and MONAI are in it


def test_the_large_scan_is_predicted_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has its own process; the scan and its run are made in this one."""

    def make(scan: Path, run: Path, shape: Any, spacing: Any, organs: int, changes: dict[str, Any]) -> dict[str, Any]:
        make_scan(scan, shape, spacing, organs)
        return make_run(run, scan, shape, spacing, organs, changes)

    monkeypatch.setattr(large_scan, "make", make)
    given = ("large_scan", *SMALL, "--threads", 1, "--result", tmp_path / "result.md")
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    large_scan.main()
    assert "| as planned |" in (tmp_path / "result.md").read_text()


def test_a_peak_is_that_of_the_command() -> None:
    """150 MiB more there are 150 MiB more here; asked from a small process, as Linux counts the asker's peak too."""
    ask = (
        "import sys; from benchmarks._process import run; "
        "print(*[run([sys.executable, '-c', f'x = bytearray(b\"x\") * {n} * 2**20'], 1).peak for n in (1, 151)])"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert large - small == pytest.approx(150, abs=15)
