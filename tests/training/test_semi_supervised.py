"""Semi-supervised training: the teacher's average, its pseudo-labels, their weight, and a run that resumes."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from tiny_run import TINY, training_of
from torch import nn

from medseg_supcon.bundle import load_tensors
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError
from medseg_supcon.training import (
    EpochSampler,
    PseudoLabels,
    SemiSupervisedLoss,
    Teacher,
    prepare_run,
)


class KilledError(Exception):
    """Ends a training between two checkpoints."""


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.Conv3d(3, 2, 1)).double()


def test_the_teacher_is_the_running_average():
    student = small_network()
    teacher, expected, resumed = Teacher(student, decay=0.5), {}, None
    for step in range(12):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        student.train()(torch.randn(2, 1, 4, 4, 4, dtype=torch.float64))
        teacher.update()
        if step == 5:  # another teacher goes on from here
            resumed = Teacher(small_network(), decay=0.5)
            resumed.student = student
            resumed.load_state_dict(copy.deepcopy(teacher.state_dict()))
        elif resumed is not None:
            resumed.update()
        d = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        for name, value in student.state_dict().items():
            now = value.numpy().astype(np.float64)
            counts = name.endswith("num_batches_tracked")
            expected[name] = now if counts or not step else d * expected[name] + (1 - d) * now
    assert set(expected) == set(teacher.network.state_dict())
    for name, value in teacher.network.state_dict().items():
        assert np.allclose(value.numpy(), expected[name], rtol=1e-12), name
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())


@given(seed=st.integers(0, 999), scans=st.integers(1, 3), confidence=st.sampled_from([0.0, 0.4, 0.6, 1.0]))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_pseudo_labels_are_the_teachers_sure_classes_of_view_1_in_both_views(seed, scans, confidence):
    rng, shape = np.random.default_rng(seed), (2, 3)
    probability = rng.dirichlet(np.ones(3), (scans, *shape))
    label = rng.integers(-1, 3, (scans, 2, 1, *shape))
    label[0] = rng.integers(0, 3, label[0].shape) if seed % 2 else -1
    pairs = rng.integers(-1, 6, (scans, 2, 1, *shape))
    for scan in range(scans):  # view 1: its own places, some outside the scan
        pairs[scan, 0, 0] = np.where(rng.random(shape) < 0.2, -1, np.arange(6).reshape(shape))
    image = np.zeros((scans, 2, 1, *shape))
    image[:, 0] += np.arange(scans).reshape(-1, 1, 1, 1) + 1

    def teacher(views):
        which = views[:, 0, 0, 0].long() - 1
        assert (which >= 0).all(), "the teacher looks at view 1 alone"
        return torch.from_numpy(probability).movedim(-1, 1)[which]

    batch = {
        "image": torch.from_numpy(image),
        "label": torch.from_numpy(label),
        "pair_ids": torch.from_numpy(pairs),
    }
    target = PseudoLabels(teacher, confidence)(batch)[1]
    assert int(target["asked"]) == int(((label == -1) & (pairs >= 0)).sum())
    found = target["pseudo_label"].reshape(label.shape)
    without = any((label[scan] == -1).all() for scan in range(scans))
    for index in np.ndindex(label.shape):
        expected = -1
        if without and label[index] == -1 and pairs[index] >= 0:
            p = probability[index[0]].reshape(6, 3)[pairs[index]]
            expected = int(p.argmax()) if p.max() >= confidence else -1
        assert int(found[index]) == expected


def ids(pairs):
    return {"pair_ids": pairs, "view_ids": torch.tensor([0]), "scan_ids": torch.tensor([0])}


def test_the_loss_adds_labels_pseudo_labels_and_contrast_with_rising_weights():
    seen = []

    def segmentation(logits, labels):
        return (labels >= 0).sum() * logits.sum()

    def contrast(features, labels, **more):
        seen.append(labels.flatten().tolist())
        return features.sum()

    weights = {"contrast_weight": 0.5, "contrast_warmup": 2, "pseudo_weight": 2.0, "pseudo_warmup": 4}
    loss = SemiSupervisedLoss(segmentation, contrast, **weights, unknown=7)
    target = {
        "label": torch.tensor([[[1, -1, -1, -1]]]),
        "pseudo_label": torch.tensor([[[-1, 2, 0, -1]]]),
        "asked": torch.tensor(3),
        **ids(torch.tensor([[[0, 1, 2, 3]]])),
    }
    for t in range(1, 7):
        value = loss((torch.tensor(1.0), torch.tensor(10.0)), target)
        u = 2.0 * math.exp(-5 * (1 - min(1, t / 4)) ** 2)
        assert float(value) == pytest.approx(1 + 2 * u + min(1, t / 2) * 0.5 * 10)
    assert seen[0] == [1, 2, 0, 7]
    assert float(loss.terms["confident"]) == pytest.approx(2 / 3)
    other = SemiSupervisedLoss(segmentation, contrast, **weights, pseudo_contrast=False)
    other.load_state_dict(loss.state_dict())
    assert int(other.step) == 6
    other((torch.tensor(1.0), torch.tensor(10.0)), target)
    assert seen[-1] == [1, -1, -1, -1]


@pytest.fixture(scope="module")
def planned(phantoms, tmp_path_factory):
    """Four epochs of three steps on two labelled and three unlabelled phantoms."""
    dataset, run = read_dataset(phantoms), tmp_path_factory.mktemp("semi") / "run"
    more = [*TINY, ("plan::batch_size", 2), ("confidence", 0.2), ("weight_average", 0.7)]
    split = split_cases(dataset, labels=3)
    prepare_run(dataset, split, run, recipe="semi", epochs=4, settings=more, device="cpu")
    return run


@pytest.fixture(scope="module")
def trained(planned, tmp_path_factory):
    run = shutil.copytree(planned, tmp_path_factory.mktemp("trained") / "run")
    made = training_of(run)
    assert made.check_properties() == []
    made.trainer.run()
    return run


def test_the_teacher_is_shipped_and_saved(trained):
    shipped, saved = (
        load_tensors(trained / "models" / "model.pt"),
        load_tensors(trained / "models" / "checkpoint.pt"),
    )
    teacher, student = saved["state"]["average"], saved["state"]["network"]
    assert set(shipped) == set(student)
    assert int(teacher["n_averaged"]) == 12
    for name, value in shipped.items():
        assert torch.equal(value, teacher[f"module.{name}"]), name
    assert any(not torch.equal(value, student[name]) for name, value in shipped.items())


def test_pseudo_labels_taught_the_network(planned, trained, tmp_path):
    run = shutil.copytree(planned, tmp_path / "run")
    training_of(run, pseudo_weight=0.0, ship="student").trainer.run()
    without, saved = load_tensors(run / "models" / "model.pt"), load_tensors(run / "models" / "checkpoint.pt")
    with_them = load_tensors(trained / "models" / "checkpoint.pt")["state"]["network"]
    for name, value in without.items():
        assert torch.equal(value, saved["state"]["network"][name]), name
    assert any(not torch.equal(value, with_them[name]) for name, value in without.items())


@pytest.mark.parametrize("step", [4, 6, 11], ids=lambda s: f"killed_at_step_{s}")
def test_an_interrupted_training_ends_with_the_same_weights(planned, trained, tmp_path, step):
    run = shutil.copytree(planned, tmp_path / "run")
    broken = training_of(run)

    def die(engine):
        raise KilledError

    broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), die)
    with pytest.raises(KilledError):
        broken.trainer.run()
    training_of(run, resume=True).trainer.run()
    for name, value in load_tensors(trained / "models" / "model.pt").items():
        assert torch.equal(value, load_tensors(run / "models" / "model.pt")[name]), name


def test_without_unlabelled_scans_a_sentence_says_how_to_give_some(phantoms, tmp_path):
    dataset = read_dataset(phantoms)
    labelled = dataset.select([case.name for case in dataset.labelled][:3])
    more = [*TINY, ("plan::batch_size", 2)]
    with pytest.raises(ConfigError, match="--unlabelled DIR"):
        prepare_run(labelled, split_cases(labelled), tmp_path / "run", recipe="semi", settings=more, device="cpu")


def test_a_batch_of_one_scan_is_a_sentence():
    with pytest.raises(ConfigError, match="plan::batch_size=2"):
        next(iter(EpochSampler(2, 4, 1, unlabelled=3, share=0.5)))
