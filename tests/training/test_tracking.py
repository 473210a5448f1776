"""``--track mlflow``: MLflow has the names and values of TensorBoard; a resumed training continues its run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medseg_supcon.training import TrainingLog

MISSING = [name for name in ("mlflow", "sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
needs_mlflow = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra mlflow): {', '.join(MISSING)}")


def train(folder: Path, epochs: int, first: int = 0, fails_at: int | None = None) -> None:
    """Three steps per epoch of a trainer whose loss has one term, (step + 1) / 8."""
    loss = SimpleNamespace(terms={})

    def step(engine: Engine, batch: int) -> None:
        if engine.state.iteration == fails_at:
            raise KeyboardInterrupt
        loss.terms = {"loss": torch.tensor((engine.state.iteration + 1) / 8), "a (b)": torch.tensor(1.0)}

    engine, optimizer = Engine(step), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    TrainingLog(folder, loss, optimizer, [], track="mlflow").attach(engine)
    if first:
        engine.load_state_dict({"iteration": 3 * first, "epoch_length": 3, "max_epochs": epochs})
    engine.run([0, 1, 2], max_epochs=epochs)


@needs_mlflow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_the_scalars_of_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run" / "logs"
    train(folder, epochs=2)
    client = MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("medseg").experiment_id])
    assert run.info.run_name.startswith("run ") and run.info.status == "FINISHED"
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    assert set(names) == {"train/loss", "train/a (b)", "train/learning_rate"}
    assert set(run.data.metrics) == {"train/loss", "train/a _b_", "train/learning_rate"}
    for name in ("train/loss", "train/learning_rate"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [(e.step, e.value) for e in events.Scalars(name)]
    means = [(2 + 3 + 4) / 24, (5 + 6 + 7) / 24]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")] == pytest.approx(means)


@needs_mlflow
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_training_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, epochs=3, fails_at=4)
    train(tmp_path, epochs=3, first=1)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("medseg").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [3, 6, 9]


def test_a_tracker_that_is_missing_or_unknown_is_a_sentence(medseg, tmp_path, monkeypatch):
    code, _, said = medseg("train", tmp_path, "--out", tmp_path / "run", "--track", "wandb")
    assert code == 2 and "--track wandb is not known" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, said = medseg("train", tmp_path, "--out", tmp_path / "run", "--track", "mlflow")
    assert code == 2 and "pip install 'medseg-supcon[mlflow]'" in " ".join(said.split())
    assert not (tmp_path / "run").exists()
