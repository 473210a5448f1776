"""The precision of a training: when a CPU computes in bfloat16, and that a resumed run keeps it."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY
from torch import nn

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError
from medseg_supcon.training import Precision, has_bfloat16, pass_seconds, prepare_run, run_config
from medseg_supcon.training import precision as module

SHAPE = (4, 1, 8, 8, 8)
F32, B16 = torch.float32, torch.bfloat16


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1))


def timed(monkeypatch: pytest.MonkeyPatch, able: bool, seconds: Sequence[float]) -> list[Any]:
    """A CPU with or without the instructions, and what its passes take; the calls of the timing."""
    calls: list[Any] = []

    def measure(*given: Any) -> list[float]:
        calls.append(given)
        return list(seconds)

    monkeypatch.setattr(module, "has_bfloat16", lambda: able)
    monkeypatch.setattr(module, "pass_seconds", measure)
    return calls


@pytest.mark.parametrize(
    ("able", "seconds", "expected"),
    [
        (True, [0.30, 0.20], "bfloat16"),
        (True, [0.20, 0.20], "float32"),  # not faster
        (True, [0.20, 0.90], "float32"),
        (True, [0.01], "float32"),  # too short to be timed
        (False, [0.30, 0.20], "float32"),
    ],
)
def test_the_faster_precision_is_chosen_once(
    monkeypatch: pytest.MonkeyPatch, able: bool, seconds: list[float], expected: str
) -> None:
    calls = timed(monkeypatch, able, seconds)
    precision = Precision(small_network(), SHAPE)
    for _ in range(2):
        precision.choose()
    assert precision.name == expected and len(calls) == able and not precision.by_trainer
    if able:
        assert calls[0][1:] == ((2, 1, 8, 8, 8), (F32, B16))
    out = precision(torch.ones(SHAPE), nn.Conv3d(1, 2, 1))
    assert out.dtype == (B16 if expected == "bfloat16" else F32)


def test_a_resumed_training_keeps_its_precision_unless_the_machine_has_no_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = timed(monkeypatch, True, [0.3, 0.2])
    for half in (True, False):
        precision = Precision(small_network(), SHAPE)
        precision.load_state_dict({"half": half})
        precision.choose()
        assert precision.state_dict() == {"half": half} and not calls
    chosen = Precision(small_network(), SHAPE, amp=False)
    chosen.load_state_dict({"half": True})
    assert chosen.name == "float32"
    timed(monkeypatch, False, [0.3, 0.2])
    elsewhere = Precision(small_network(), SHAPE)
    elsewhere.load_state_dict({"half": True})
    elsewhere.choose()
    assert elsewhere.name == "float32"


def test_on_a_gpu_mixed_precision_is_monais() -> None:
    for amp, name in (("auto", "float16"), (True, "float16"), (False, "float32")):
        precision = Precision(small_network(), SHAPE, amp, torch.float16, "cuda")
        assert (precision.name, precision.by_trainer) == (name, name == "float16")


def test_timing_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network, threads = small_network().eval(), torch.get_num_threads()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert len(pass_seconds(network, SHAPE, (F32, B16))) == 1  # far too short
    monkeypatch.setattr(module, "SHORT", 0.0)
    assert all(seconds > 0 for seconds in pass_seconds(network, SHAPE, (F32, B16)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_wrong_settings_are_sentences() -> None:
    with pytest.raises(ConfigError, match="amp must be auto, true or false, got 'on'"):
        Precision(small_network(), SHAPE, "on")
    with pytest.raises(ConfigError, match="amp_dtype must be bfloat16 on a CPU"):
        Precision(small_network(), SHAPE, True, torch.float16)


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2"])
def test_either_variable_forbids_bfloat16(variable: str) -> None:
    """torch reads them once in a process, so this is one with torch alone."""
    code = f"import torch\n{inspect.getsource(has_bfloat16)}\nprint(has_bfloat16())"
    name, value = variable.split("=")
    env = {**os.environ, name: value}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False"]


@pytest.fixture(scope="module")
def planned(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of three steps; on a CPU so small a step stays in float32."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("precision") / "run"
    prepare_run(dataset, split_cases(dataset), run, epochs=2, settings=TINY, device="cpu")
    return run


def trained(planned: Path, to: Path, **options: Any) -> dict[str, Any]:
    run = Path(shutil.copytree(planned, to))
    run_config(run, device="cpu", quiet=True, run_id="train_only", train_only=["$@train::trainer.run()"], **options)
    saved: dict[str, Any] = load_tensors(run / "models" / "checkpoint.pt")
    return saved


def test_a_short_training_is_as_without_mixed_precision(planned: Path, tmp_path: Path) -> None:
    plain, default, half = (
        trained(planned, tmp_path / name, **options)
        for name, options in (("plain", {"amp": False}), ("default", {}), ("half", {"amp": True}))
    )
    assert [saved["state"]["precision"]["half"] for saved in (plain, default, half)] == [False, False, True]
    for name, value in plain["model"].items():
        assert torch.equal(value, default["model"][name]), name
        assert half["model"][name].dtype == F32  # the weights are float32 in either case
        torch.testing.assert_close(half["model"][name], value, rtol=0, atol=0.05)
    assert any(not torch.equal(value, half["model"][name]) for name, value in plain["model"].items())


@pytest.mark.skipif(not has_bfloat16(), reason="needs a CPU with bfloat16")
def test_bfloat16_is_faster_here_at_the_planned_size() -> None:
    network = nn.Sequential(nn.Conv3d(1, 48, 3, padding=1), nn.Conv3d(48, 48, 3, padding=1), nn.Conv3d(48, 2, 1))
    full, half = pass_seconds(network, (2, 1, 40, 56, 40), (F32, B16))
    assert half < full
