"""Clipping, seeding, stopping, validating, and a checkpoint that is whole or not there."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents, SupervisedTrainer
from torch import nn

from medseg_supcon.bundle import load_tensors
from medseg_supcon.errors import RunError
from medseg_supcon.training import (
    Checkpoint,
    EarlyStop,
    GradientClip,
    LateValidation,
    StepSeed,
    StopOnNaN,
    load_initial,
    save_atomically,
)


def trainer(network, handlers=(), epochs=2, loss=None, lr=0.0):
    data = [{"image": torch.ones(2, 3), "label": torch.zeros(2, 1)}] * 2
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        loss_function=loss or nn.MSELoss(),
        train_handlers=list(handlers),
        decollate=False,
    )


def test_gradients_are_clipped_before_the_step():
    network = nn.Linear(3, 1)
    nn.init.constant_(network.weight, 100.0)
    clipped = trainer(network, [GradientClip(network.parameters(), 0.5)])
    norms = []

    def look(engine):
        norms.append(torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item())

    clipped.add_event_handler(IterationEvents.MODEL_COMPLETED, look)
    clipped.run()
    assert norms and all(n == pytest.approx(0.5, rel=1e-4) for n in norms)


def draws_of_steps(disturb):
    drawn = []

    def step(engine, batch):
        drawn.append(torch.rand(1).item())
        torch.rand(disturb)

    engine = Engine(step)
    StepSeed(3).attach(engine)
    engine.run([0] * 6, max_iters=6)
    return drawn


def test_a_step_draws_the_same_whatever_came_before():
    assert draws_of_steps(disturb=1) == draws_of_steps(disturb=7)
    assert len(set(draws_of_steps(disturb=1))) == 6


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence():
    run = trainer(nn.Linear(3, 1), [StopOnNaN()], loss=lambda p, t: p.sum() * torch.nan)
    with pytest.raises(RunError, match="learning rate"):
        run.run()


def test_an_epoch_that_ends_in_no_number_is_not_saved(tmp_path):
    network = nn.Linear(3, 1)
    handlers = [StopOnNaN(), Checkpoint(tmp_path, network, {})]  # 25 steps are more than this run has
    with pytest.raises(RunError, match="at step 2"):
        trainer(network, handlers, loss=lambda p, t: p.sum() * torch.nan).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "epochs"), [(1, [2, 4, 5]), (3, [4, 5]), (5, [5]), (6, [])])
def test_the_last_epoch_is_validated_too(first, epochs):
    seen = []

    class Spied(LateValidation):
        def __call__(self, engine):
            seen.append(engine.state.epoch)

    engine = Engine(lambda e, b: None)
    Spied(2, first=first).attach(engine)
    engine.run([0], max_epochs=5)
    assert seen == epochs


def validated_epochs(stop_after, values, state=None):
    """Epochs that a training with these validation scores runs for, and the handler's state after it."""
    validator, engine = Engine(lambda e, b: None), Engine(lambda e, b: None)
    validator.state.key_metric_name = "dice"
    stop = EarlyStop(validator, stop_after)
    if state is not None:
        stop.load_state_dict(state)

    @engine.on(Events.EPOCH_COMPLETED)
    def validate(e):
        def score(v):
            v.state.metrics["dice"] = values[e.state.epoch - 1]

        with validator.add_event_handler(Events.EPOCH_COMPLETED, score):
            validator.run([0])

    stop.attach(engine)
    engine.run([0], max_epochs=len(values))
    return engine.state.epoch, stop.state_dict()


def test_early_stop_counts_over_a_resume():
    values = [0.1, 0.5, 0.4, 0.3, 0.2, 0.9]
    assert validated_epochs(2, values)[0] == 4
    assert validated_epochs(None, values)[0] == 6
    _, state = validated_epochs(2, values[:3])
    assert state == {"best": 0.5, "waited": 1}
    assert validated_epochs(2, values[3:], state)[0] == 1


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.ones(2)}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="space"):
        save_atomically({"a": torch.zeros(2)}, path)
    assert load_tensors(path)["a"].sum() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_weights_that_are_missing_broken_or_code_are_sentences(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        load_tensors(tmp_path / "no.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(RunError, match=r"broken\.pt"):
        load_tensors(tmp_path / "broken.pt")

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    with (tmp_path / "evil.pt").open("wb") as stream:
        pickle.dump(Evil(), stream)
    with pytest.raises(RunError, match=r"evil\.pt"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_initial_weights_leave_a_new_classifier_fresh(tmp_path):
    def network(classes):
        return nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, classes, 1))

    earlier, later = network(3), network(5)
    torch.save(earlier.state_dict(), tmp_path / "model.pt")
    fresh = later[1].weight.clone()
    load_initial(later, tmp_path / "model.pt")
    assert torch.equal(later[0].weight, earlier[0].weight)
    assert torch.equal(later[1].weight, fresh)
    with pytest.raises(RunError, match="No weight"):
        load_initial(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(RunError, match="init_weights"):
        load_initial(nn.Linear(2, 2), tmp_path / "gone.pt")
