"""The running average of the weights: what it is, that it is validated and saved, and that a resumed run goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import IterationEvents
from tiny_run import TINY, training_of

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training import Teacher, WeightAverage, compiled, prepare_run, run_config

DECAY, STEPS = 0.4, 9


class KilledError(Exception):
    """Ends a training between two checkpoints."""


@pytest.fixture(scope="module")
def planned(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of three steps, a stage each."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("average") / "run"
    more = [*TINY, ("weight_average", DECAY)]
    prepare_run(dataset, split_cases(dataset), run, recipe="two_stage", epochs=3, settings=more, device="cpu")
    return run


@pytest.fixture(scope="module")
def trained(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """A whole training, and the trained weights after every step."""
    run = Path(shutil.copytree(planned, tmp_path_factory.mktemp("trained") / "run"))
    made, seen = training_of(run), []
    assert made.check_properties() == []

    def look(engine: object) -> None:
        state = made.trainer.network.network.state_dict()
        seen.append({name: value.double().numpy().copy() for name, value in state.items()})

    made.trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, look)
    made.trainer.run()
    validated = made.parser.get_parsed_content("validate::evaluator").network
    for name, value in load_tensors(run / "models" / "model.pt").items():
        assert torch.equal(value, validated.state_dict()[name])
    return run, seen


def test_the_saved_model_is_the_average_since_the_stage_began(
    trained: tuple[Path, list[dict[str, np.ndarray]]],
) -> None:
    run, seen = trained
    assert len(seen) == STEPS
    expected = seen[6]  # stage 3 begins with step 7
    for t, now in enumerate(seen[7:], start=1):
        d = min(DECAY, (1 + t) / (10 + t))
        expected = {name: d * value + (1 - d) * now[name] for name, value in expected.items()}
    shipped = load_tensors(run / "models" / "model.pt")
    assert shipped.keys() == expected.keys()
    for name, value in shipped.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not np.allclose(value.numpy(), seen[-1][name], rtol=1e-5) for name, value in shipped.items())


@pytest.mark.parametrize("step", [5, 8], ids=lambda s: f"killed_at_step_{s}")
def test_an_interrupted_training_ends_with_the_same_average(
    planned: Path, trained: tuple[Path, object], tmp_path: Path, step: int
) -> None:
    run = Path(shutil.copytree(planned, tmp_path / "run"))
    broken = training_of(run)

    def die(engine: object) -> None:
        raise KilledError

    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), die)
    with pytest.raises(KilledError):
        broken.trainer.run()
    training_of(run, resume=True).trainer.run()
    for name, value in load_tensors(trained[0] / "models" / "model.pt").items():
        assert torch.equal(value, load_tensors(run / "models" / "model.pt")[name]), name


def test_a_checkpoint_with_an_average_does_not_go_on_without(trained: tuple[Path, object], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    with pytest.raises(RunError, match="does not fit the average of the config: weight_average was above 0"):
        run_config(run, device="cpu", quiet=True, resume=True, weight_average=0.0)


def small_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.Conv3d(3, 2, 1))


def test_without_an_average_the_trained_network_is_validated() -> None:
    network = small_network()
    average, wrapped = WeightAverage(network), ContrastiveNetwork(network)
    average.update()
    average.restart()
    assert average.network is network and average.validated(wrapped) is wrapped and average.state_dict() == {}
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ConfigError, match="weight_average must be at least 0 and below 1"):
        WeightAverage(small_network(), decay)


def test_a_teacher_is_an_average() -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        Teacher(small_network(), 0.0)


def test_the_average_of_a_compiled_network_keeps_no_features() -> None:
    """The copy must not bring along the hook that hands features to the trained network's wrapper."""
    wrapped = compiled(ContrastiveNetwork(small_network()), "aot_eager")
    average = WeightAverage(wrapped.network, 0.9)
    x = torch.zeros(1, 1, 4, 4, 4)
    with torch.no_grad():
        average.network(x)
    assert not [hook for module in average.network.modules() for hook in module._forward_pre_hooks.values()]
