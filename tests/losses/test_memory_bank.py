"""MemoryBank against lists that forget their first entries."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.losses import MemoryBank


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 5),
    steps=st.lists(st.lists(st.integers(-1, 2), max_size=12), max_size=6),
)
def test_holds_the_last_of_each_class(size, steps):
    bank, queues, value = MemoryBank(3, 1, size), [deque(maxlen=size) for _ in range(3)], 0
    for labels in steps:
        values = list(range(value, value + len(labels)))
        value += len(labels)
        bank.enqueue(torch.tensor(values, dtype=torch.float32)[:, None], torch.tensor(labels, dtype=torch.long))
        for v, c in zip(values, labels, strict=True):
            if c >= 0:
                queues[c].append(v)
    embeddings, classes = bank.entries()
    held = [sorted(embeddings[classes == c, 0].tolist()) for c in range(3)]
    assert held == [sorted(map(float, q)) for q in queues]


def test_a_checkpoint_carries_it_and_pointers_go_on():
    first, second = MemoryBank(2, 2, 3), MemoryBank(2, 2, 3)
    first.enqueue(torch.arange(8.0).view(4, 2), torch.tensor([0, 0, 0, 0]))
    second.load_state_dict(first.state_dict())
    for bank in (first, second):
        bank.enqueue(torch.full((1, 2), 9.0), torch.tensor([0]))
    torch.testing.assert_close(second.entries(), first.entries())
    assert sorted(second.entries()[0][:, 0].tolist()) == [4.0, 6.0, 9.0]


def test_entries_are_detached_copies():
    bank = MemoryBank(1, 2, 2)
    z = torch.ones(2, 2, requires_grad=True)
    bank.enqueue(z * 2, torch.zeros(2, dtype=torch.long))
    before, _ = bank.entries()
    bank.enqueue(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    assert not before.requires_grad
    assert (before == 2).all()


def test_rows_that_are_not_finite_are_not_stored():
    bank = MemoryBank(2, 2, 4)
    z = torch.arange(8.0).view(4, 2)
    z[1, 0], z[2, 1] = torch.inf, torch.nan
    bank.enqueue(z, torch.tensor([0, 0, 1, 1]))
    embeddings, classes = bank.entries()
    assert embeddings.tolist() == [[0.0, 1.0], [6.0, 7.0]]
    assert classes.tolist() == [0, 1]
    narrow = MemoryBank(2, 2, 4).half()
    narrow.enqueue(torch.tensor([[1e6, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert narrow.entries()[0].tolist() == [[1.0, 0.0]]


def test_complaints():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        MemoryBank(2, 3, 0)
    for size in (2.5, "a"):
        with pytest.raises(TypeError, match=f"size must be an integer, got {size!r}"):
            MemoryBank(2, 3, size)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        MemoryBank(2, 3, 4).enqueue(torch.zeros(1, 3), torch.tensor([1.5]))
    bank = MemoryBank(2, 3, 4)
    with pytest.raises(ValueError, match=r"\(N, 3\), got shape \(5, 2\)"):
        bank.enqueue(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="num_classes=2, got 2"):
        bank.enqueue(torch.zeros(1, 3), torch.tensor([2]))
