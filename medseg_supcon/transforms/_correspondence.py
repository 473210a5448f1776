"""Which voxel of view 2 is which voxel of view 1, from where each view's voxels lie in the scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import grid_sample

NO_PAIR = -1
# a fixed point that ends further than this (voxels of view 1) from its target was not found
_CONVERGED = 0.05
_ITERATIONS = 12


@dataclass(frozen=True)
class ViewGeometry:
    """Where a view's voxels lie in the scan.

    Attributes:
        to_scan: (4, 4) float64, view voxel -> scan voxel, all of the map where ``positions`` is None.
        positions: (3, *patch) float64 scan voxel coordinates of every view voxel, for a view bent by a
            transform that no affine describes; NaN where the view left the box that it was cut from.
        inside: (*patch) bool, the voxel shows the scan and not padding.
    """

    to_scan: torch.Tensor
    positions: torch.Tensor | None
    inside: torch.Tensor


def voxel_grid(shape: Sequence[int], matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` applied to every voxel index of ``shape``: (rank, *shape) float64."""
    rank = len(shape)
    out = matrix[:rank, rank].reshape(-1, *[1] * rank)
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=torch.float64).reshape(
            [-1 if a == axis else 1 for a in range(rank)]
        )
        out = out + matrix[:rank, axis].reshape(-1, *[1] * rank) * line
    return out


def within(positions: torch.Tensor, low: Sequence[float], high: Sequence[float]) -> torch.Tensor:
    """Which of the (rank, *shape) positions lie in the voxels ``low .. high`` (first and last, inclusive)."""
    keep = torch.ones(positions.shape[1:], dtype=torch.bool)
    for position, first, last in zip(positions, low, high, strict=True):
        keep &= (position >= first - 0.5) & (position < last + 0.5)
    return keep


def pair_ids(view_1: ViewGeometry, view_2: ViewGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of one physical voxel in both views.

    View 1's id is the voxel's linear index; view 2's is that of the view-1 voxel whose centre is nearest.
    -1: padding, or (view 2) a place that view 1 does not show. Both (*patch) int64.
    """
    shape = view_1.inside.shape
    ids_1 = torch.arange(view_1.inside.numel()).reshape(shape).masked_fill(~view_1.inside, NO_PAIR)
    seat = _seats_in_view_1(view_1, view_2)
    found = view_2.inside & within(seat, [0.0] * len(shape), [length - 1.0 for length in shape])
    nearest = torch.zeros(shape, dtype=torch.int64)
    for axis, length in enumerate(shape):
        nearest = nearest * length + (seat[axis] + 0.5).floor().nan_to_num(0).long().clamp(0, length - 1)
    ids_2 = torch.where(found, ids_1.reshape(-1)[nearest], NO_PAIR)
    return ids_1, ids_2


def _seats_in_view_1(view_1: ViewGeometry, view_2: ViewGeometry) -> torch.Tensor:
    """For every voxel of view 2 its continuous voxel coordinate in view 1, (rank, *patch)."""
    from_scan = torch.linalg.inv(view_1.to_scan)
    if view_1.positions is None and view_2.positions is None:
        return voxel_grid(view_2.inside.shape, from_scan @ view_2.to_scan)
    targets = view_2.positions
    if targets is None:
        targets = voxel_grid(view_2.inside.shape, view_2.to_scan)
    if view_1.positions is None:
        return _transform(from_scan, targets)
    return _invert(view_1.positions, targets)


def _transform(matrix: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    rank = positions.shape[0]
    flat = matrix[:rank, :rank] @ positions.reshape(rank, -1) + matrix[:rank, rank:]
    return flat.reshape(positions.shape)


def _invert(positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Where in view 1 the scan positions ``targets`` lie, if view 1's voxels lie at ``positions``.

    Fixed point x <- x - A^-1 (u(x) - target), with u the interpolated positions and A their best affine:
    it converges wherever the bending is smoother than a fold, and what did not converge becomes NaN.
    """
    rank, shape = positions.shape[0], positions.shape[1:]
    known = ~torch.isnan(positions).any(dim=0)
    fit = _best_affine(positions, known)
    inverse = torch.linalg.inv(fit)
    # outside the known part u is the affine itself, so that the iteration never meets a NaN
    bent = torch.where(known, positions - voxel_grid(shape, fit), 0.0)
    lengths = torch.tensor(shape, dtype=torch.float64)
    seat = _transform(inverse, targets.nan_to_num(0.0))
    wanted = targets.reshape(rank, -1)
    guess = seat.reshape(rank, -1)
    step = torch.full_like(guess, torch.nan)
    for _ in range(_ITERATIONS):
        # grid_sample counts axes from the last, in units of half the extent
        grid = ((2 * guess.T + 1) / lengths - 1).flip(-1)
        sampled = grid_sample(
            bent[None], grid.reshape(1, 1, 1, -1, rank), align_corners=False, padding_mode="border"
        )
        here = _transform(fit, guess) + sampled.reshape(rank, -1)
        step = inverse[:rank, :rank] @ (here - wanted)
        guess = guess - step.nan_to_num(0.0)
    lost = ~(step.abs().amax(dim=0) < _CONVERGED)
    return guess.masked_fill(lost, torch.nan).reshape(targets.shape)


def _best_affine(positions: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Least-squares affine (rank+1, rank+1) of the known positions, on a thinned grid."""
    rank = positions.shape[0]
    index = torch.nonzero(known)
    index = index[:: max(len(index) // 4000, 1)]
    ones = torch.ones(len(index), 1, dtype=torch.float64)
    values = positions[(slice(None), *index.T)].T
    if len(index) <= rank:
        return torch.eye(rank + 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([index.double(), ones], dim=1), values).solution
    matrix = torch.eye(rank + 1, dtype=torch.float64)
    matrix[:rank] = solution.T
    return matrix
