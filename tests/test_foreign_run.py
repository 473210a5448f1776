"""A run from elsewhere is data: what was planted in it runs in no command, unless the person trusts it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import TINY, TINY_NETWORK

from medseg_supcon.bundle import check_configs_trusted, recipe_names, trust
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.training import prepare_run

Medseg = Callable[..., tuple[int, str, str]]


class Malice:
    """Its pickle writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def code(mark: Path) -> str:
    return f"$__import__('pathlib').Path({str(mark)!r}).touch()"


def in_config(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    """Sets top-level keys of a config; CODE stands for the payload."""

    def plant(run: Path, mark: Path) -> None:
        file = run / "configs" / name
        content = yaml.safe_load(file.read_text())
        text = json.dumps(content | changes, indent=1).replace("CODE", code(mark))
        file.write_text(text.replace("MARK", str(mark)).replace("RUN", str(run)))

    return plant


def in_python(*names: str) -> Callable[[Path, Path], None]:
    def plant(run: Path, mark: Path) -> None:
        for name in names:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")

    return plant


def macro(run: Path, mark: Path) -> None:
    (run / "other.yaml").write_text(yaml.safe_dump({"key": code(mark)}))
    in_config("inference.yaml", amp="%RUN/other.yaml::key")(run, mark)


def logging_conf(run: Path, mark: Path) -> None:
    file = run / "configs" / "logging.conf"
    file.write_text(file.read_text().replace("(sys.stderr,)", f"(open({str(mark)!r}, 'w'),)"))


def pickled(name: str, wrap: bool) -> Callable[[Path, Path], None]:
    def plant(run: Path, mark: Path) -> None:
        if wrap:
            torch.save({"state": Malice(mark), "finished": False}, run / "models" / name)
        else:
            (run / "models" / name).write_bytes(pickle.dumps(Malice(mark)))

    return plant


def literal_json(run: Path, mark: Path) -> None:
    """A value of dataset_dir is passed as a text in quotes; this one only looks like it."""
    in_config("train.yaml", dataset_dir=f"$'{run}' + str({code(mark)[1:]})")(run, mark)


TOUCH = {"_target_": "os.mkdir", "path": "MARK"}
PLACES: dict[str, Callable[[Path, Path], None]] = {
    "inference.yaml, a value": in_config("inference.yaml", device="CODE"),
    "inference.yaml, a macro": macro,
    "inference.yaml, network_def": in_config("inference.yaml", network_def="CODE"),
    "evaluate.yaml, network_def": in_config("evaluate.yaml", network_def=TINY_NETWORK | {"act": "CODE"}),
    "inference.json": in_config("inference.json", amp="CODE"),
    "plan.json, network_def": in_config("plan.json", network_def="CODE"),
    "plan.json, an argument": in_config("plan.json", network_def=TINY_NETWORK | {"act": "CODE"}),
    "plan.json, intensity": in_config(
        "plan.json", intensity=[{"_target_": "NormalizeIntensityd", "keys": "image", "divisor": "CODE"}]
    ),
    "evaluate.yaml": in_config("evaluate.yaml", initialize=["CODE"]),
    "train.yaml, a value": in_config("train.yaml", seed="CODE"),
    "train.yaml, imports": in_config("train.yaml", imports=["$import json", "CODE"]),
    "train.yaml, a target": in_config("train.yaml", initialize=[TOUCH]),
    "train.yaml, the head": in_config("train.yaml", projection="CODE"),
    "train.yaml, nested key": in_config("train.yaml", **{"train::handlers::0::dtype": "CODE"}),
    "train.yaml, dataset_dir": literal_json,
    "train.json": in_config("train.json", quiet="CODE"),
    "multi_gpu_train.yaml": in_config("multi_gpu_train.yaml", finalize=["CODE"]),
    "logging.conf": logging_conf,
    "scripts": in_python("scripts/__init__.py"),
    "metadata.json": in_config("metadata.json", task="CODE"),
    "datalist.json": in_config("datalist.json", training=[{"name": "CODE", "image": "CODE", "label": "CODE"}]),
    "model.pt": pickled("model.pt", wrap=True),
    "model.pt, bare pickle": pickled("model.pt", wrap=False),
    "checkpoint.pt": pickled("checkpoint.pt", wrap=True),
}
# What nothing but the gate looks at, or what comes right after it, takes too long for every pair.
READ_BY = {
    "embed": ("plan", "train.yaml", "inference", "model", "checkpoint"),
    "init": ("plan", "model"),
    "resume": tuple(PLACES),
    "export": ("plan", "inference", "model"),
    "predict": ("plan", "inference", "model"),
    "evaluate": ("plan", "inference", "model", "evaluate"),
}


@pytest.fixture
def foreign(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, which --resume has still an epoch to do of."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    plan = run / "configs" / "plan.json"
    plan.write_text(plan.read_text().replace('"epochs": 2', '"epochs": 3'))
    return run


def arguments(command: str, run: Path, phantoms: Path, out: Path) -> list[object]:
    one = out / "one.txt"
    one.write_text("phantom_01\n")
    scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    cpu = ["--device", "cpu"]
    new = ["--out", out / "new", "--device", "cpu", "--epochs", 1, "--set", "plan::steps_per_epoch=1"]
    return {
        "predict": ["predict", run, scan, "--out", out / "masks", "--device", "cpu"],
        "evaluate": ["evaluate", run, phantoms, "--out", out / "scores", "--cases", one, "--device", "cpu"],
        "embed": ["embed", run, phantoms, "--out", out / "e", "--cases", one, "--voxels", 20, "--overwrite", *cpu],
        "export": ["export", run, "--out", out / "model.ts", "--overwrite"],
        "init": ["plan", phantoms, "--init", run, *new],
        "resume": ["train", phantoms, "--out", run, "--resume", "--device", "cpu"],
    }[command]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "place"), [(c, p) for c, read in READ_BY.items() for p in PLACES if p.startswith(read)]
)
def test_nothing_planted_runs(
    medseg: Medseg, foreign: Path, phantoms: Path, tmp_path: Path, command: str, place: str
) -> None:
    mark = tmp_path / "mark"
    PLACES[place](foreign, mark)
    status, shown, error = medseg(*arguments(command, foreign, phantoms, tmp_path))
    assert status in (0, 2) and not mark.exists()
    assert "weights_only" not in shown + error
    if status == 2:
        assert "--trust" in error or ".pt" in error or place == "datalist.json", error


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("predict", "inference.yaml, a macro"),
        ("export", "inference.yaml, network_def"),
        ("evaluate", "plan.json, intensity"),
        ("embed", "train.yaml, the head"),
        ("resume", "train.yaml, a target"),
        ("resume", "train.yaml, a value"),
    ],
)
def test_the_same_runs_where_it_is_trusted(
    medseg: Medseg, foreign: Path, phantoms: Path, tmp_path: Path, command: str, place: str
) -> None:
    """Else the test above would pass whatever the gate did."""
    mark = tmp_path / "mark"
    if place == "inference.yaml, a macro":
        (foreign / "other.yaml").write_text(yaml.safe_dump({"key": code(mark)}))
        in_config("inference.yaml", preprocessing="%RUN/other.yaml::key")(foreign, mark)
    elif command == "export":
        in_config("inference.yaml", network_def="CODE")(foreign, mark)
    else:
        PLACES[place](foreign, mark)
    medseg(*arguments(command, foreign, phantoms, tmp_path), "--trust")
    assert mark.exists()


def test_modules_in_the_run_and_the_working_folder(foreign: Path, phantoms: Path, tmp_path: Path) -> None:
    """Whoever unpacks a run and works inside it does not import what lies there in place of libraries."""
    mark = tmp_path / "mark"
    names = (
        "json",
        "monai",
        "medseg_supcon",
        "tensorboard",
        "matplotlib",
        "nibabel",
        "sitecustomize",
        "sklearn",
    )
    in_python(*(f"{name}.py" for name in names))(foreign, mark)
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment["XDG_STATE_HOME"] = str(tmp_path / "state")
    program = Path(sys.executable).with_name("medseg")
    given = [str(a) for a in arguments("resume", foreign, phantoms, tmp_path)]
    done = subprocess.run(
        [str(program), *given], cwd=foreign, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
    # The processes of a comparison: with -m Python would look into the working folder first.
    from medseg_supcon.comparison import WITHOUT_WORKING_FOLDER

    command_line = [sys.executable, "-c", WITHOUT_WORKING_FOLDER, "no.json", "cpu", "1", str(os.getpid())]
    done = subprocess.run(command_line, cwd=foreign, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 2 and b"no.json does not exist" in done.stderr and not mark.exists(), done.stderr


def test_a_received_comparison_is_not_gone_on_with(
    medseg: Medseg, foreign: Path, phantoms: Path, tmp_path: Path
) -> None:
    for place in ("evaluate.yaml", "train.yaml, a value", "train.json", "logging.conf"):
        out, mark = tmp_path / "comparison", tmp_path / "mark"
        shutil.rmtree(out, ignore_errors=True)
        run = Path(shutil.copytree(foreign, out / "runs" / "joint-all-0"))
        (out / "comparison.json").write_text("{}")
        PLACES[place](run, mark)
        given = ("compare", phantoms, "--out", out, "--recipes", "joint,dice_ce", "--device", "cpu")
        status, _, error = medseg(*given)
        assert status == 2 and "--trust" in error and not mark.exists()
    shutil.rmtree(out / "runs")
    (out / "plans").mkdir()
    shutil.copy(foreign / "configs" / "plan.json", out / "plans" / "labels6.json")
    (tmp_path / "fake" / "configs").mkdir(parents=True)
    shutil.copy(foreign / "configs" / "plan.json", tmp_path / "fake" / "configs")
    PLACES["plan.json, network_def"](tmp_path / "fake", mark)
    shutil.copy(tmp_path / "fake" / "configs" / "plan.json", out / "plans" / "labels6.json")
    status, _, error = medseg(*given)
    assert status == 2 and "labels6.json: network_def" in error and not mark.exists()


@pytest.fixture
def no_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another machine: nothing was recorded on it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_written", set())
    return tmp_path / "state"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_shipped_recipe_needs_neither_trust_nor_record(
    phantoms: Path, tmp_path: Path, no_record: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, run = read_dataset(phantoms), tmp_path / "run #1"
    given = [*TINY, ("learning_rate", 0.01), ("plan::steps_per_epoch", 1), ("view_1::rotation_degrees", 10.0)]
    prepare_run(dataset, split_cases(dataset, labels=4), run, recipe=recipe, epochs=3, settings=given, device="cpu")
    shutil.rmtree(no_record)
    monkeypatch.setattr(trust, "_written", set())
    check_configs_trusted(run, trust=False)


def test_a_recipe_of_ones_own_works_without_ceremony(
    medseg: Medseg, phantoms: Path, tmp_path: Path, no_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, run = tmp_path / "own.yaml", tmp_path / "run"
    network = "$torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Conv3d(8, 6, 1))"
    own.write_text(
        yaml.safe_dump(
            {
                "network_def": network,
                "plan::patch_size": [16, 16, 16],
                "plan::steps_per_epoch": 1,
                "contrast_warmup": "$1 + 1",
                "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01},
            }
        )
    )
    given = ("train", phantoms, "--out", run, "--recipe", own, "--epochs", 1, "--device", "cpu")
    assert medseg(*given)[0] == 0
    monkeypatch.setattr(trust, "_written", set())  # the next commands are other processes
    moved = run.rename(tmp_path / "moved")
    plan = moved / "configs" / "plan.json"
    plan.write_text(plan.read_text().replace('"epochs": 1', '"epochs": 2'))
    for command in ("resume", "predict", "evaluate", "embed", "export", "init"):
        status, _, error = medseg(*arguments(command, moved, phantoms, tmp_path))
        assert status == 0, (command, error)
    config = moved / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("$1 + 1", "$1 + 2"))
    with pytest.raises(RunError, match=r"train\.yaml: contrast_warmup is '\$1 \+ 2'.*--trust"):
        check_configs_trusted(moved, trust=False)
    shutil.rmtree(no_record)
    monkeypatch.setattr(trust, "_written", set())
    for command in ("resume", "predict", "evaluate", "embed", "export", "init"):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        plan.write_text(plan.read_text().replace('"epochs": 2', '"epochs": 3'))
        status, _, error = medseg(*arguments(command, moved, phantoms, tmp_path))
        assert status == 2 and "--trust" in error, command
