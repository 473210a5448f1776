"""Real faults with a real command in its own process: kills, a full disk, permissions, too little memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts and signals as on Linux")

SHAPE = (28, 26, 24)
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """start("predict", ..., prefix=[...]): ``medseg`` in a process of its own, one thread."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
        command = [
            *prefix,
            sys.executable,
            "-m",
            "medseg_supcon.cli",
            *map(str, arguments),
            "--device",
            "cpu",
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Twelve scans of noise, whose masks are not small."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(12):
        values = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"s{number:02d}.nii")
    return folder


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=300)
    assert "Traceback" not in said and "terminate called" not in said, said
    return process.returncode, said


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def whole(folder: Path) -> list[str]:
    """Names of the masks, each of them readable to its last voxel."""
    masks = sorted(folder.glob("*.nii.gz"))
    for mask in masks:
        assert np.asarray(nibabel.load(mask).dataobj).shape[:3] == SHAPE
    return [mask.name for mask in masks]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(
    start: Start, trained_run: Path, scans: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    process = start("predict", trained_run, scans, "--out", out, "--probabilities")
    wait_for(lambda: len(list(out.glob("*.nii.gz"))) >= 2, process)
    process.send_signal(number)
    returned, said = finish(process)
    assert returned == code, said
    assert "stopped" in said
    masks = whole(out)
    assert 2 <= len(masks) < 12
    done = [e["name"] for e in json.loads((out / "manifest.json").read_text())["scans"] if e["status"] == "done"]
    assert [f"{name}.nii.gz" for name in done] == masks
    assert not list(out.rglob(".*"))


def test_killed_while_it_writes(
    start: Start, medseg: Callable[..., tuple[int, str, str]], trained_run: Path, scans: Path, tmp_path: Path
) -> None:
    """kill -9: what is there is whole, and a second call completes it and leaves nothing else."""
    out = tmp_path / "out"
    process = start("predict", trained_run, scans, "--out", out, "--probabilities")
    wait_for(lambda: any(out.rglob(".*.tmp")) and len(list(out.glob("*.nii.gz"))) > 1, process)
    process.kill()
    process.communicate()
    finished = whole(out)
    assert 1 < len(finished) < 12
    (out / finished[0]).write_bytes((out / finished[0]).read_bytes()[:-30])  # as a copy cut short leaves it
    code, said, error = medseg("predict", trained_run, scans, "--out", out, "--probabilities", "--device", "cpu")
    assert code == 0 and "already exist" in said, error
    assert len(whole(out)) == len(whole(out / "probabilities")) == 12
    assert not list(out.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("60k"): a file system of this size; only root can make one."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        tool = shutil.which("mount")
        if (
            tool is None
            or subprocess.run(
                [tool, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
                capture_output=True,
                check=False,
            ).returncode
        ):
            pytest.skip("a small file system cannot be mounted here (not root, or in a container)")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    start: Start,
    medseg: Callable[..., tuple[int, str, str]],
    trained_run: Path,
    scans: Path,
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("32k")
    out = disk / "out"
    code, said = finish(start("predict", trained_run, scans, "--out", out))
    assert code in (2, 3), said
    assert "No space left on device" in said
    before = len(whole(out))
    assert 0 < before < 12
    json.loads((out / "manifest.json").read_text())
    hidden = {file.name for file in out.rglob(".*")}
    assert hidden <= {".medseg-manifest.jsonl"}  # entries that the manifest had no room for
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    code, said, error = medseg("predict", trained_run, scans, "--out", out, "--device", "cpu")
    assert code == 0 and f"{before} already exist" in said, error
    entries = json.loads((out / "manifest.json").read_text())["scans"]
    assert sorted(entry["status"] for entry in entries) == ["done"] * (12 - before) + ["skipped"] * before
    # what made a mask is known of all but the one whose entry met the full disk
    assert sum(entry["models"] is None for entry in entries) <= 1
    assert not list(out.rglob(".*"))


def test_export_to_a_full_disk(trained_run: Path, small_disk: Callable[[str], Path]) -> None:
    """In a process of its own: torch's own writer would end it."""
    disk = small_disk("16k")
    command = [
        sys.executable,
        "-m",
        "medseg_supcon.cli",
        "export",
        str(trained_run),
        "--out",
        str(disk / "model.ts"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "No space left on device" in done.stderr, done.stderr
    assert list(disk.iterdir()) == []


def test_permissions(start: Start, trained_run: Path, scans: Path, tmp_path: Path) -> None:
    """A scan and a folder that may not be read are named; the others are done."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may read everything, but not without these two capabilities
        if shutil.which("setpriv") is None:
            pytest.skip("this is root, and there is no setpriv to become less")
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    for path in sorted(scans.iterdir())[3:]:
        path.unlink()
    locked = tmp_path / "locked"
    locked.mkdir()
    shutil.copy(scans / "s00.nii", locked / "x.nii")
    (scans / "s01.nii").chmod(0)
    locked.chmod(0)
    try:
        arguments = ("predict", trained_run, scans, locked, locked / "x.nii", "--out", tmp_path / "out")
        code, said = finish(start(*arguments, prefix=prefix))
    finally:
        locked.chmod(0o700)
    assert code == 3, said
    assert whole(tmp_path / "out") == ["s00.nii.gz", "s02.nii.gz"]
    for path in (scans / "s01.nii", locked, locked / "x.nii"):
        assert any(f"{path}: " in line and "ermission" in line for line in said.splitlines()), said


def test_too_little_memory(start: Start, trained_run: Path, scans: Path, tmp_path: Path) -> None:
    """A scan larger than the memory that the process may have fails alone."""
    for path in sorted(scans.iterdir())[1:]:
        path.unlink()
    header = nibabel.Nifti1Header()
    header.set_data_shape((1600, 1600, 1200))
    header.set_data_dtype(np.uint8)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    with (scans / "large.nii").open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(352 + 1600 * 1600 * 1200)  # sparse: it takes no room on the disk
    limit = 6 * 2**30  # of addresses, of which torch alone takes a few
    arguments = ("predict", trained_run, scans, "--out", tmp_path / "out")
    code, said = finish(start(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))))
    assert code == 3, said
    assert whole(tmp_path / "out") == ["s00.nii.gz"]
    assert f"{scans / 'large.nii'}: not enough memory" in said
