"""Case order and draws: fixed by (seed, epoch, slot), whatever the ranks, workers or resumes."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import RandGaussianNoised
from torch.utils.data import DataLoader

from medseg_supcon.errors import DataError
from medseg_supcon.training import EpochSampler, SeededDataset, cached_dataset, item_seed


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_ranks_share_out_the_batches_of_one_process(cases, steps, batch, world, seed):
    one = EpochSampler(cases, steps, batch * world, seed)
    whole = list(islice(one, 2 * steps * batch * world))
    ranks = [list(islice(EpochSampler(cases, steps, batch, seed, r, world), 2 * steps * batch)) for r in range(world)]
    rebuilt = []
    for step in range(2 * steps):
        for rank in ranks:
            rebuilt += rank[step * batch : (step + 1) * batch]
    assert rebuilt == whole


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_every_case_comes_before_any_comes_again(cases, steps, seed):
    order = EpochSampler(cases, steps, 2, seed).order(1)
    counts = np.bincount(order, minlength=cases)
    assert counts.max() - counts.min() <= 1


def test_resuming_goes_on_with_the_same_keys():
    sampler = EpochSampler(5, 3, 2, seed=4)
    whole = list(islice(sampler, 18))
    sampler.epoch = 3
    assert list(islice(sampler, 6)) == whole[12:]


def test_draws_do_not_depend_on_workers():
    data = [{"image": torch.zeros(1, 4, 4, 4)} for _ in range(3)]
    batches = []
    for workers in (0, 2):
        dataset = SeededDataset(data, RandGaussianNoised("image", prob=1.0), seed=7)
        loader = DataLoader(dataset, batch_size=2, sampler=EpochSampler(3, 2, 2, 7), num_workers=workers)
        batches.append([torch.as_tensor(b["image"]) for b in islice(loader, 4)])
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(batches[0][0], batches[0][2])


def test_seeds_differ_between_slots_epochs_and_runs():
    seeds = {item_seed(s, e, k) for s in range(5) for e in range(5) for k in range(5)}
    assert len(seeds) == 125


def test_no_case_is_a_sentence():
    with pytest.raises(DataError, match="empty"):
        cached_dataset([], lambda x: x)
    with pytest.raises(DataError, match="empty"):
        EpochSampler(0, 1, 1)
