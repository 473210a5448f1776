"""Several devices: the same masks, manifest and exit code as with one, and what a process that ends early costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg_supcon.errors import RunError
from medseg_supcon.inference import devices
from medseg_supcon.inference.devices import share_out
from medseg_supcon.scans import Scan

Report = Callable[[Scan, Any], None]


def scan(name: str) -> Scan:
    return Scan(name, (Path(f"{name}.nii"),))


def start(folder: Path, device: str) -> Callable[[Iterator[Scan], Report], None]:
    """A pretended predictor: each scan's name says what happens to it."""
    if device == "missing":
        raise RunError("device 'missing' cannot be used")

    def predict(scans: Iterator[Scan], report: Report) -> None:
        for one in scans:
            with (folder / device).open("a") as stream:
                stream.write(f"{one.name}\n")
            if one.name.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if one.name.startswith("raise"):
                raise ValueError("a fault of the program")
            try:
                sleep(60 if one.name.startswith("slow") else 0.01)
            except KeyboardInterrupt:
                report(one, {"finished": one.name})
                raise
            report(one, OSError("unreadable") if one.name.startswith("bad") else {"of": one.name})

    return predict


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once, because they import nothing."""
    monkeypatch.setattr(devices, "get_context", lambda how: get_context("fork"))


@pytest.fixture
def one_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process starts afresh, as all do outside tests; the second is forked, and so has nothing to import."""
    kinds = iter(("spawn", "fork"))

    def process(**options: Any) -> Any:
        context: Any = get_context(next(kinds))
        return context.Process(**options)

    monkeypatch.setattr(
        devices, "get_context", lambda how: SimpleNamespace(Pipe=get_context(how).Pipe, Process=process)
    )


def shared(folder: Path, names_of_devices: list[str], names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    share_out(
        names_of_devices, partial(start, folder), [scan(name) for name in names], lambda s, o: found.update({s.name: o})
    )
    return {name: o if isinstance(o, dict) else str(o) for name, o in found.items()}


@pytest.mark.usefixtures("forked")
def test_every_scan_goes_to_one_process(tmp_path: Path) -> None:
    names = [*(f"s{n}" for n in range(9)), "bad"]
    found = shared(tmp_path, ["one", "two"], names)
    assert found == {name: {"of": name} for name in names[:-1]} | {"bad": "unreadable"}
    one, two = ((tmp_path / device).read_text().split() for device in ("one", "two"))
    assert sorted([*one, *two]) == sorted(names) and min(len(one), len(two)) >= 3


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_names_its_scans_and_the_other_does_the_rest(tmp_path: Path) -> None:
    names = ["kill", "s1", "s2", "s3", "s4", "s5", "s6", "s7"]
    found = shared(tmp_path, ["one", "two"], names)
    lost = [name for name, outcome in found.items() if isinstance(outcome, str)]
    assert set(found) == set(names) and sorted(lost) == ["kill", "s2", "s4"]  # every other one of the first six
    for name in lost:
        assert found[name].startswith(
            f"{name}.nii: the process on one ended while it had this scan (it was stopped by SIGKILL"
        )


@pytest.mark.usefixtures("forked")
def test_if_all_processes_end_the_rest_is_named(tmp_path: Path) -> None:
    found = shared(tmp_path, ["one", "two"], ["kill", "raise", *(f"s{n}" for n in range(6))])
    assert len(found) == 8 and all(isinstance(outcome, str) for outcome in found.values())
    assert "on two ended while it had this scan (it failed: see above)" in found["raise"]
    assert found["s5"] == "s5.nii: not predicted, because the processes of all devices ended early."


@pytest.mark.usefixtures("forked")
def test_a_device_that_cannot_be_used_is_an_error_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="'missing' cannot be used"):
        shared(tmp_path, ["one", "missing"], ["slow", "s1"])


@pytest.mark.usefixtures("forked")
def test_after_ctrl_c_what_is_being_written_is_finished(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def report(one: Scan, outcome: Any) -> None:
        found[one.name] = outcome
        if one.name == "s1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out(
            ["one", "two"], partial(start, tmp_path), [scan(name) for name in ("slow", "s1", "s2", "slow2")], report
        )
    assert found["s1"] == {"of": "s1"}
    assert set(found) <= {"slow", "s1", "slow2"} and all("finished" in found[n] for n in found if n != "s1")


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


@pytest.mark.usefixtures("one_forked")
def test_two_devices_give_what_one_gives(
    trained_run: Path, phantoms: Path, tmp_path: Path, medseg: Callable[..., tuple[int, str, str]]
) -> None:
    for number, file in enumerate(sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:4]):
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "scans" / f"s{number}.nii.gz")
    (tmp_path / "scans" / "s1.nii.gz").write_bytes(b"no scan")
    outcomes, manifests = [], []
    for name, device in (("one", "cpu"), ("two", "cpu,cpu")):
        out = tmp_path / name
        options = ("--out", out, "--device", device, "--probabilities")
        code, shown, error = medseg("predict", trained_run, tmp_path / "scans", *options)
        assert code == 3 and "s1.nii.gz" in error
        outcomes.append((shown.replace(str(out), "OUT"), error, (out / "quality.csv").read_text()))
        manifests.append(json.loads((out / "manifest.json").read_text()))
        assert manifests[-1]["device"] == device
    assert outcomes[0] == outcomes[1] and "3 scans predicted, 1 failed" in outcomes[0][0]
    first, second = manifests
    assert without(first, "device", "scans") == without(second, "device", "scans")
    assert [without(entry, "seconds") for entry in first["scans"]] == [without(e, "seconds") for e in second["scans"]]
    files = sorted((tmp_path / "one").rglob("*.nii.gz"))
    assert len(files) == 6
    for file in files:
        same = (nib.load(folder) for folder in (file, tmp_path / "two" / file.relative_to(tmp_path / "one")))
        assert np.array_equal(*(np.asarray(image.dataobj) for image in same))


def test_an_unknown_device_in_the_list_is_refused(tmp_path: Path, medseg: Callable[..., tuple[int, str, str]]) -> None:
    for device, named in (("cpu,", "''"), ("cpu,cuda:99", "cuda:99"), ("gpu,cpu", "'gpu'")):
        code, _, error = medseg("predict", tmp_path, tmp_path, "--out", tmp_path / "out", "--device", device)
        assert code == 2 and named in error and not (tmp_path / "out").exists()
