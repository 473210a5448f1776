"""The projection head: lengths, edges, precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_supcon.networks import ProjectionHead


@given(
    count=st.integers(0, 7),
    width=st.integers(1, 9),
    hidden=st.sampled_from([None, 0, 5]),
    normalise_input=st.booleans(),
    normalise_output=st.booleans(),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_against_numpy(
    count: int, width: int, hidden: int | None, normalise_input: bool, normalise_output: bool
) -> None:
    torch.manual_seed(count)
    head = ProjectionHead(width, hidden, 4, normalise_input=normalise_input, normalise_output=normalise_output).train()
    x = torch.randn(count, width)
    z = x.numpy().astype(np.float64)
    if normalise_input:
        z = z / np.sqrt((z**2).sum(1, keepdims=True))
    weights = [p.detach().numpy().astype(np.float64) for p in head.parameters()]
    for step in range(0, len(weights), 2):
        z = z @ weights[step].T + weights[step + 1]
        if step + 2 < len(weights):
            z = np.maximum(z, 0)
    if normalise_output:
        z = z / np.sqrt((z**2).sum(1, keepdims=True))
    out = head(x)
    assert out.shape == (count, 4)
    np.testing.assert_allclose(out.detach().numpy(), z, rtol=1e-4, atol=1e-5)


def test_zero_vectors_are_finite_in_value_and_gradient() -> None:
    head = ProjectionHead(6)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
    x = torch.zeros(3, 6, requires_grad=True)
    out = head(x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    head = ProjectionHead(8)
    x = torch.randn(5, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(x))


def test_linear_head_has_one_layer() -> None:
    assert sum(p.numel() for p in ProjectionHead(8, None, 4).parameters()) == 8 * 4 + 4
    assert sum(p.numel() for p in ProjectionHead(8, 16, 4).parameters()) == 8 * 16 + 16 + 16 * 4 + 4


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got 0"):
        ProjectionHead(0)
    with pytest.raises(ValueError, match=r"\(N, 8\)"):
        ProjectionHead(8)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"\(N, 8\)"):
        ProjectionHead(8)(torch.zeros(2, 8, 4, 4, 4))
