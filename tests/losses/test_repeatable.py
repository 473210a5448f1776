"""On several CPU threads the gradient is the same bit for bit, call after call: a seed then fixes a training."""

from __future__ import annotations

import pytest
import torch

from medseg_supcon.losses import SupConLoss, VoxelSampler, VoxelSupConLoss

OPTIONS = {
    "default": {},
    "euclidean": {"similarity": "euclidean"},
    "other_class": {"denominator": "other_class"},
    "other_view": {"keys": "other_view"},
    "article": {"positives": "same_voxel", "denominator": "same_class", "keys": "other_view"},
    "cold": {"temperature": 0.01, "class_weights": "balanced"},
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_repeat(two_threads, name):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(4, 16, 20, 20, 20, generator=g)
    labels = torch.randint(0, 3, (4, 1, 20, 20, 20), generator=g)
    ids = torch.arange(8000).view(1, 1, 20, 20, 20).repeat(4, 1, 1, 1, 1)
    loss = VoxelSupConLoss(SupConLoss(**OPTIONS[name]), VoxelSampler(max_samples=1024))
    scans = {"view_ids": torch.tensor([0, 1, 0, 1]), "scan_ids": torch.tensor([0, 0, 1, 1])}
    gradients = []
    for _ in range(4):
        torch.manual_seed(1)
        x = features.clone().requires_grad_()
        loss(x, labels, pair_ids=ids, **scans).backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
