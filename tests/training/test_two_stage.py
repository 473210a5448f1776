"""Two-stage training: what each stage moves, how long it is, and that an interruption leaves no trace."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.optimizers import WarmupCosineSchedule
from tiny_run import TINY, training_of

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError
from medseg_supcon.training import (
    EpochSampler,
    StagedLoss,
    prepare_run,
    stage_at,
    stage_epochs,
    staged_schedule,
    with_unknown,
)

NAMES = ("contrast", "classifier", "fine_tune")
BATCH_NORM = (  # the norm that has statistics to keep
    "$torch.nn.Sequential(monai.networks.nets.UNet(spatial_dims=3, in_channels=1, out_channels=8, "
    "channels=(8, 16), strides=(2,), num_res_units=1, norm='batch'), torch.nn.Conv3d(8, 6, 1))"
)


class KilledError(Exception):
    """Ends a training between two checkpoints."""


@pytest.fixture(scope="module")
def planned(phantoms, tmp_path_factory):
    """Six epochs of three steps (stages of 3, 1 and 2 epochs) on few labels and some unlabelled scans."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("two_stage") / "run"
    more = [*TINY[1:], ("network_def", BATCH_NORM), ("positives", "same_voxel"), ("weight_decay", 0.1)]
    split = split_cases(dataset, labels=3)
    prepare_run(dataset, split, run, recipe="two_stage", epochs=6, settings=more, device="cpu")
    return run


@pytest.fixture(scope="module")
def watched(planned, tmp_path_factory):
    """A whole training, and the state of network and loss before the first and after every epoch."""
    run = shutil.copytree(planned, tmp_path_factory.mktemp("watched") / "run")
    made = training_of(run)
    assert made.check_properties() == []
    trainer, seen = made.trainer, []

    def look(engine):
        both = torch.nn.ModuleDict({"network": trainer.network.network, "loss": trainer.loss_function})
        seen.append({name: value.clone() for name, value in both.state_dict().items()})

    trainer.add_event_handler(Events.STARTED, look)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    trainer.run()
    return run, seen


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_moves_its_own_weights_and_no_others(watched):
    _, seen = watched
    everything = set(seen[0])
    classifier = {"network.1.weight", "network.1.bias"}
    head = {name for name in everything if "projection" in name}
    assert classifier < everything and head and any("running_mean" in name for name in everything)
    in_contrast = moved(seen[0], seen[3])
    assert not in_contrast & classifier and head <= in_contrast
    assert any("running_mean" in name for name in in_contrast)
    assert moved(seen[3], seen[4]) == classifier
    in_fine_tuning = moved(seen[4], seen[6])
    assert not in_fine_tuning & head
    weights = {n for n in everything - head if n.endswith(("weight", "bias"))}
    assert weights <= in_contrast | classifier and len(weights - in_fine_tuning) == 0


def test_what_is_shipped_is_the_stock_network_alone(watched):
    run, seen = watched
    shipped = load_tensors(run / "models" / "model.pt")
    assert {f"network.{name}" for name in shipped} == {n for n in seen[0] if n.startswith("network.")}
    for name, value in shipped.items():
        assert torch.equal(value, seen[-1][f"network.{name}"])


def test_the_history_names_the_stage_and_validates_once_there_is_a_classifier(watched):
    with (watched[0] / "logs" / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(r["stage"]) for r in rows] == [1, 1, 1, 2, 3, 3]
    assert [bool(r["contrastive"]) for r in rows] == [True] * 3 + [False] * 3
    assert [bool(r["val_mean_dice"]) for r in rows] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("step", [8, 11, 13], ids=lambda s: f"killed_at_step_{s}")
def test_an_interrupted_training_ends_with_the_same_weights(planned, watched, tmp_path, step):
    run = shutil.copytree(planned, tmp_path / "run")
    broken = training_of(run)

    def die(engine):
        raise KilledError

    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), die)
    with pytest.raises(KilledError):
        broken.trainer.run()
    training_of(run, resume=True).trainer.run()
    for name, value in load_tensors(watched[0] / "models" / "model.pt").items():
        assert torch.equal(value, load_tensors(run / "models" / "model.pt")[name]), name


@given(
    shares=st.fixed_dictionaries({name: st.sampled_from([0, 0.1, 0.2, 0.5, 1, 30]) for name in NAMES}),
    epochs=st.integers(1, 60),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_stages_share_out_all_epochs(shares, epochs):
    used = [name for name in NAMES if shares[name] > 0]
    if not set(used) - {"contrast"} or epochs < len(used):
        with pytest.raises(ConfigError, match=r"classifier|--epochs"):
            stage_epochs(shares, epochs)
        return
    lengths = stage_epochs(shares, epochs)
    assert list(lengths) == list(NAMES) and sum(lengths.values()) == epochs
    total = sum(shares.values())
    for name in NAMES:
        assert (lengths[name] >= 1) == (shares[name] > 0)
        if min(shares[n] for n in used) / total * epochs >= 1:
            assert abs(lengths[name] - shares[name] / total * epochs) < 1
    order = [name for name in NAMES for _ in range(lengths[name])]
    for epoch, name in enumerate(order, 1):
        assert stage_at(lengths, epoch) == (name, order.index(name) + 1)


def test_stages_that_do_not_exist_are_a_sentence():
    with pytest.raises(ConfigError, match="stage_shares must give"):
        stage_epochs({"contrast": 1, "classify": 1}, 10)


def test_the_learning_rate_starts_anew_in_every_stage():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    lengths, factors = {"contrast": 4, "classifier": 0, "fine_tune": 6}, {"fine_tune": 0.5}

    def rates(make, steps, lr):
        optimizer = torch.optim.SGD(weights, lr=lr)
        schedule, found = make(optimizer), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(lambda o: staged_schedule(o, lengths, 10, factors), 100, 2.0)
    expected = []
    for steps, factor in ((40, 1.0), (60, 0.5)):
        expected += rates(
            lambda o, n=steps: WarmupCosineSchedule(o, n // 10, n, warmup_multiplier=0.1), steps, 2.0 * factor
        )
    assert ours == pytest.approx(expected)
    fixed = rates(lambda o: staged_schedule(o, lengths, 10, decay=False), 100, 2.0)
    assert set(fixed[4:40]) == set(fixed[46:]) == {2.0} and fixed[0] == fixed[40] == pytest.approx(0.2)


@given(
    labelled=st.integers(1, 5),
    unlabelled=st.integers(1, 9),
    batch=st.integers(2, 5),
    share=st.sampled_from([None, 0.1, 0.5, 0.9]),
    ranks=st.integers(1, 2),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_batches_hold_the_share_of_unlabelled_scans(labelled, unlabelled, batch, share, ranks):
    sampler = EpochSampler(labelled, 8, batch, 3, unlabelled=unlabelled, share=share, last_epoch=2, world_size=ranks)
    order = torch.tensor(sampler.order(2)).view(-1, batch)
    assert len(order) == 8 * ranks
    if share is None:
        counts = order.flatten().bincount(minlength=labelled + unlabelled)
        assert counts.max() - counts.min() <= 1
    else:
        number = (order >= labelled).sum(1)
        assert len(number.unique()) == 1 and 1 <= int(number[0]) < batch
        assert abs(int(number[0]) - share * batch) <= 1
        for kind, size in (
            (order[order < labelled], labelled),
            (order[order >= labelled] - labelled, unlabelled),
        ):
            counts = kind.bincount(minlength=size)
            assert len(counts) == size and counts.max() - counts.min() <= 1
    assert sampler.order(1) != sampler.order(2) or labelled + unlabelled == 2
    assert sampler.order(3) == EpochSampler(labelled, 8, batch, 3, world_size=ranks).order(3)


def test_unlabelled_voxels_take_part_in_the_contrast_only_where_they_have_a_partner():
    labels = torch.tensor([[1, 0, -1, -1]]).view(1, 1, 4)
    pairs = torch.tensor([[0, 1, 2, -1]]).view(1, 1, 4)
    assert with_unknown(labels, pairs, 2).flatten().tolist() == [1, 0, 2, -1]
    assert with_unknown(labels, pairs, None).flatten().tolist() == [1, 0, -1, -1]
    seen = []
    loss = StagedLoss(
        lambda features, known, **ids: seen.append(known) or features.sum(), torch.add, torch.add, unknown=2
    )
    loss(torch.zeros(1), labels, torch.zeros(1), pair_ids=pairs)
    assert seen[0].flatten().tolist() == [1, 0, 2, -1]
