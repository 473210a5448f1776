"""From the model's grid back to the scan's, a few rows at a time: `Invertd`'s result in less memory.

The two grids of a scan differ by turning, mirroring and scaling of axes, so trilinear interpolation is linear
interpolation along one axis after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK_BYTES = 2**24  # float32 of one class at a time; more is no faster
SAME = 5e-3  # voxels: closer grids are equal (MONAI does not resample if affines differ by less than 1e-3)


@dataclass(frozen=True)
class AxisInterpolation:
    """Positions of the scan's voxels along an axis of the model's grid: between `low` and `high`, weight ``w``."""

    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    w: npt.NDArray[np.float32]

    @classmethod
    def of(cls, position: npt.NDArray[np.float64], size: int) -> AxisInterpolation:
        rounded = np.round(position)
        if np.abs(position - rounded).max() < SAME:
            position = rounded
        position = np.clip(position, 0, size - 1)  # beyond the edge: the edge
        low = np.minimum(np.floor(position), max(size - 2, 0)).astype(np.int64)
        w = (position - low).astype(np.float32)
        low, w = np.where(w >= 1, low + 1, low), np.where(w >= 1, np.float32(0), w)
        return cls(low, np.where(w > 0, low + 1, low), w)

    def take(self, values: Tensor, dim: int, offset: int = 0) -> Tensor:
        """Interpolate ``values``, whose first row along ``dim`` is the model's row ``offset``."""
        low = torch.from_numpy(self.low - offset).to(values.device)
        if not self.w.any():
            whole = np.array_equal(self.low - offset, np.arange(values.shape[dim]))
            return values if whole else values.index_select(dim, low)
        w = torch.from_numpy(self.w).to(values.device)
        if values.device.type == "cpu" and dim == values.ndim - 1:
            # Gathering along the fastest axis is slow on a CPU; a product with a matrix is not.
            matrix = torch.zeros(values.shape[dim], len(low))
            columns = torch.arange(len(low))
            matrix[torch.from_numpy(self.high - offset), columns] = w
            matrix[low, columns] = 1 - w
            return values @ matrix
        high = torch.from_numpy(self.high - offset).to(values.device)
        shape = [-1 if d == dim else 1 for d in range(values.ndim)]
        return torch.lerp(values.index_select(dim, low), values.index_select(dim, high), w.reshape(shape))


@dataclass(frozen=True)
class GridMapping:
    """How the model's grid maps to the scan's.

    Attributes:
        order: the scan's axis along each axis of the model's grid.
        axes: positions per axis of the model's grid.
    """

    order: tuple[int, ...]
    axes: tuple[AxisInterpolation, ...]

    @classmethod
    def between(
        cls,
        model_affine: npt.NDArray[np.float64],
        model_shape: Sequence[int],
        affine: npt.NDArray[np.float64],
        shape: Sequence[int],
    ) -> GridMapping | None:
        """None if the axes of the grids are not parallel, so that axes cannot be interpolated one by one."""
        matrix = np.linalg.solve(model_affine, affine)
        order = tuple(int(i) for i in np.abs(matrix[:3, :3] * np.asarray(shape)).argmax(axis=1))
        if sorted(order) != [0, 1, 2]:
            return None
        strays = np.abs(matrix[:3, :3]) * (np.asarray(shape) - 1)
        strays[range(3), order] = 0
        if strays.max() > 0.02:  # voxels
            return None
        positions = [matrix[a, order[a]] * np.arange(shape[order[a]]) + matrix[a, 3] for a in range(3)]
        return cls(order, tuple(AxisInterpolation.of(p, n) for p, n in zip(positions, model_shape, strict=True)))

    def blocks(
        self, chunks: Iterable[Tensor], softmax: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64], Iterator[Tensor]]]:
        """Rows of the scan (turned like the model's grid), as soon as the chunks that they need are there.

        Args:
            chunks: (K, rows, Y, Z) in order along the first axis of the model's grid.
            softmax: the chunks are logits.

        Yields:
            which rows, and for each of the K classes in turn the probabilities (rows, Y', Z').
        """
        done = np.zeros(len(self.axes[0].low), dtype=bool)
        start, last = 0, None
        for chunk in chunks:
            if last is not None:
                yield from self._ready(torch.cat([last, chunk[:, :1]], dim=1), start - 1, done, softmax)
            yield from self._ready(chunk, start, done, softmax)
            start, last = start + chunk.shape[1], chunk[:, -1:].clone()

    def _ready(
        self, chunk: Tensor, start: int, done: npt.NDArray[np.bool_], softmax: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64], Iterator[Tensor]]]:
        x = self.axes[0]
        rows = np.flatnonzero(~done & (x.low >= start) & (x.high < start + chunk.shape[1]))
        done[rows] = True
        plane = len(self.axes[1].low) * len(self.axes[2].low)
        finer = max(chunk.shape[2] * chunk.shape[3], plane) * 4
        for block in np.array_split(rows, max(1, -(-len(rows) * finer // BLOCK_BYTES))):
            if len(block):
                a, b = int(x.low[block].min()) - start, int(x.high[block].max()) + 1 - start
                part = chunk[:, a:b]
                part = torch.softmax(part, dim=0) if softmax else part
                yield block, self._classes(part, block, a + start)

    def _classes(self, part: Tensor, block: npt.NDArray[np.int64], offset: int) -> Iterator[Tensor]:
        x = self.axes[0]
        here = AxisInterpolation(x.low[block], x.high[block], x.w[block])
        for values in part:
            yield here.take(self.axes[1].take(self.axes[2].take(values, 2), 1), 0, offset)
