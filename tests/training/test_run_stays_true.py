"""A run is never trained over by mistake, and what it says about itself is true after every way of training it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from tiny_run import TINY, training_of

from medseg_supcon.bundle import innermost, load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.training import (
    Checkpoint,
    begin_training,
    extend_training,
    is_finished,
    prepare_run,
    read_checkpoint,
    train_run,
)

OF_SCORES = ("eval/metrics.json", "eval/metrics.csv", "docs/curves.png", "logs/history.csv")


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def bundle_run(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--bundle_root", str(run)]
    command += ["--config_file", str(run / "configs" / "train.yaml"), "--device", "$torch.device('cpu')"]
    return subprocess.run([*command, *more], cwd=run.parent, capture_output=True, text=True, check=False)


def test_monai_does_not_train_over_a_run_without_being_told_to(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RuntimeError) as error:
        training_of(run).run()
    said = str(innermost(error.value))
    assert "already contains a trained run" in said and "--overwrite true" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_that_monai_trained_over_says_what_it_is_now(run: Path) -> None:
    metadata, metrics = run / "configs" / "metadata.json", run / "eval" / "metrics.json"
    weights = load_tensors(run / "models" / "model.pt")
    false = json.loads(metrics.read_text())
    false["summary"]["mean"]["dice"] = 0.791
    metrics.write_text(json.dumps(false))
    done = bundle_run(run, "--overwrite", "true", "--learning_rate", "1e-7", "--seed", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(not torch.equal(t, weights[n]) for n, t in load_tensors(run / "models" / "model.pt").items())
    dice = json.loads(metrics.read_text())["summary"]["mean"]["dice"]
    assert dice != 0.791
    assert json.loads(metadata.read_text())["eval_metrics"]["mean_dice"] == pytest.approx(dice, abs=5e-5)
    assert "0.791" not in (run / "docs" / "README.md").read_text(encoding="utf-8")


def test_scores_of_earlier_weights_go_before_a_new_training_begins(run: Path) -> None:
    """So a training that is killed leaves none; weights in the making depend on no document."""
    state = torch.get_rng_state()
    with pytest.raises(RunError, match="already contains a trained run"):
        begin_training(run)
    begin_training(run, resume=True)  # finished: nothing to train
    assert all((run / name).exists() for name in OF_SCORES)
    begin_training(run, overwrite=True)
    assert not any((run / name).exists() for name in OF_SCORES)
    assert "mean_dice" not in json.loads((run / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_finished_run_is_trained_longer(run: Path, phantoms: Path, medseg: Any) -> None:
    for epochs, code, words in ((1, 2, "cannot be shorter"), (2, 0, "finished"), (3, 0, "The run is in")):
        given = ("train", phantoms, "--out", run, "--resume", "--epochs", epochs, "--device", "cpu")
        returned, shown, error = medseg(*given)
        assert returned == code and words in " ".join((shown + error).split()), (shown, error)
    with (run / "logs" / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and is_finished(run)
    assert float(rows[1]["learning_rate"]) == 0  # the end of the planned two epochs
    # of 9 steps, 0 of warm-up: half a cosine over 9 ends at 0, which a restored schedule of 6 would not
    assert float(rows[2]["learning_rate"]) == pytest.approx(0, abs=1e-9)
    assert read_checkpoint(run / "models" / "checkpoint.pt")["state"]["lr_scheduler"]["t_total"] == 9
    assert "3 epochs, 9 steps" in (run / "docs" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="planned for 3 epochs"):
        extend_training(run, 2)


def test_a_folder_deleted_in_training_ends_it_at_the_epochs_end(run: Path) -> None:
    shutil.rmtree(run / "models")
    workflow = training_of(run, epochs=30)
    epochs = []

    @workflow.trainer.on(Events.EPOCH_STARTED)
    def delete(engine: Engine) -> None:
        epochs.append(engine.state.epoch)
        if engine.state.epoch == 2:
            shutil.rmtree(run)

    with pytest.raises(RuntimeError) as error:
        workflow.run()
    assert isinstance(innermost(error.value), RunError) and "deleted or moved" in str(innermost(error.value))
    assert epochs == [1, 2] and not run.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_one_weight_that_is_not_finite_is_refused(run: Path, name: str, value: float) -> None:
    path = run / "models" / name
    content = torch.load(path, weights_only=True)
    weights = content if name == "model.pt" else content["state"]["network"]
    key = next(iter(weights))
    weights[key].view(-1)[3] = value
    torch.save(content, path)
    with pytest.raises(RunError) as error:
        load_tensors(path)
    assert str(path) in str(error.value) and key in str(error.value)


BAD = {
    "no dictionary": lambda saved: [saved],
    "no state": lambda saved: {k: v for k, v in saved.items() if k != "state"},
    "no best": lambda saved: {k: v for k, v in saved.items() if k != "best"},
    "weights alone": lambda saved: saved["model"],
    "epoch as text": lambda saved: saved | {"epoch": "2"},
    "empty": lambda saved: {},
    "epoch below 0": lambda saved: saved | {"epoch": -5},
    "epoch after the end": lambda saved: saved | {"epoch": 10**6},
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_is_not_a_checkpoint_is_a_sentence(run: Path, phantoms: Path, medseg: Any, fault: str) -> None:
    path = run / "models" / "checkpoint.pt"
    torch.save(BAD[fault](torch.load(path, weights_only=True)), path)
    code, _, error = medseg("train", phantoms, "--out", run, "--resume", "--device", "cpu")
    assert code == 2 and "Traceback" not in error and "is not a checkpoint" in " ".join(error.split())


@pytest.mark.parametrize("part", ["network", "optimizer", "lr_scheduler"])
def test_a_checkpoint_whose_parts_do_not_fit_is_a_sentence(run: Path, part: str) -> None:
    path = run / "models" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"][part] = {"other": torch.ones(1)}
    saved["finished"] = False
    torch.save(saved, path)
    with pytest.raises(RunError, match=f"does not fit the {part} of the config"):
        train_run(run, device="cpu", resume=True, quiet=True)


def _odd_rate(state: Any) -> None:
    state["optimizer"]["param_groups"][0]["lr"] = "a"


def _odd_moment(state: Any) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def _odd_schedule(state: Any) -> None:
    state["lr_scheduler"]["last_epoch"] = "a"


@pytest.mark.parametrize("change", [_odd_rate, _odd_moment, _odd_schedule])
def test_a_checkpoint_with_one_odd_value_is_a_sentence(run: Path, change: Any) -> None:
    """torch loads these, and fails in the first step."""
    path = run / "models" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    change(saved["state"])
    saved |= {"finished": False, "epoch": 1}
    torch.save(saved, path)
    with pytest.raises(RunError, match="does not fit the"):
        train_run(run, device="cpu", resume=True, quiet=True)


def test_a_damaged_plan_is_a_sentence_in_resume(run: Path, phantoms: Path, medseg: Any) -> None:
    path = run / "configs" / "plan.json"
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": "many"'))
    code, _, error = medseg("train", phantoms, "--out", run, "--resume", "--device", "cpu")
    assert code == 2 and "plan.json" in error and "many" in error


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("text", ["epoch,loss\nx,y\n", "a,b\n\xff,1\n"])
def test_a_damaged_history_is_a_sentence(run: Path, text: str, scored: bool) -> None:
    (run / "logs" / "history.csv").write_bytes(text.encode("latin-1"))
    path = run / "models" / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"finished": False, "epoch": 1, "iteration": 3}, path)
    if not scored:  # then nothing is removed, and no document is rewritten, before training goes on
        shutil.rmtree(run / "eval")
        (run / "docs" / "curves.png").unlink()
    with pytest.raises(RunError, match=r"history\.csv is damaged"):
        train_run(run, device="cpu", resume=True, quiet=True)


@pytest.mark.parametrize(("key", "value"), [("train::trainer::max_epochs", 0), ("learning_rate", 1e99)])
def test_values_that_fail_only_in_training_are_refused(phantoms: Path, tmp_path: Path, key: str, value: float) -> None:
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    prepare_run(dataset, split_cases(dataset), run, epochs=1, settings=[*TINY, (key, value)], device="cpu")
    with pytest.raises(ConfigError, match=key.split("::")[-1]):
        train_run(run, device="cpu", quiet=True)


def test_a_checkpoint_cut_short_is_a_sentence(run: Path) -> None:
    path = run / "models" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"checkpoint\.pt"):
        train_run(run, device="cpu", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("plan::spacing", [1e9, 1, 1]), "from 0.0001 to 100"),
        (("plan::patch_size", [0, 0, 0]), "from 1 to 1024"),
        (("plan::patch_size", [1024, 1024, 1024]), "GiB free"),
        (("batch_size", 1_000_000), "from 1 to 1024"),
        (("batch_size", 10**12), "from 1 to"),
        (("steps_per_epoch", 10**9), "from 1 to"),
        (("device", "nonsense"), "nonsense"),
        (("device", "cuda:77"), "cuda:77"),
        (("bundle_root", "/etc"), "--out"),
        (("val_interval", 0), "val_interval"),
        (("early_stop", -1), "early_stop"),
        (("gradient_clip", -1), "gradient_clip"),
        (("memory_share", 7), "memory_share"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(
    phantoms: Path, tmp_path: Path, setting: tuple[str, Any], words: str
) -> None:
    dataset, run = read_dataset(phantoms), tmp_path / "run"
    given = [s for s in TINY if s[0] != setting[0]]
    with pytest.raises(ConfigError, match=words):
        prepare_run(dataset, split_cases(dataset), run, epochs=1, settings=[*given, setting], device="cpu")
    assert not run.exists()


def test_a_schedule_keeps_its_own_length(tmp_path: Path) -> None:
    """The saved one knows the length that was planned then."""
    rates = []
    for steps, resume in ((10, False), (20, True), (20, False)):
        weight = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=steps: 1 - step / n)
        folder = tmp_path / ("b" if not resume and steps == 20 else "a")
        checkpoint = Checkpoint(folder, weight, {"optimizer": optimizer, "lr_scheduler": schedule}, resume=resume)
        engine: Any = Engine(lambda *_: None)
        engine.scaler, engine.state.epoch, engine.state.iteration, engine.state.max_epochs = None, 0, 0, 1
        checkpoint.start(engine)
        for _ in range(5):
            optimizer.step()
            schedule.step()
        checkpoint.save(engine)
        rates.append(schedule.get_last_lr()[0])
    assert rates == pytest.approx([0.5, 0.5, 0.75])  # steps 5 of 10, 10 of 20, 5 of 20
