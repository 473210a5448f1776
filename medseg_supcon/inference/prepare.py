"""From the scan's grid to the model's, and back: preprocessing and its inverse."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation
from torch import Tensor

from medseg_supcon.bundle import Model, innermost
from medseg_supcon.datasets import THRESHOLD
from medseg_supcon.errors import DataError, MedsegError
from medseg_supcon.quality import Evidence
from medseg_supcon.scans import Affine, Grid, Scan, Volume, outliers, read_scan
from medseg_supcon.text import counted

MOST_VOXELS = 4e9  # on the model's grid: 16 GB, a scan of 1600 voxels a side
BLOCK_BYTES = 2**24  # float32 of one class at a time; more is no faster
FEW_VALUES = 8
SAME = 5e-3  # voxels: closer grids are equal (MONAI does not resample if affines differ by less than 1e-3)
Activation = Callable[..., Tensor]
Blocks = Iterator[tuple[npt.NDArray[np.int64], Iterator[Tensor]]]


@dataclass(frozen=True)
class Prepared:
    """A scan read and preprocessed, on the CPU: per model the image, and the way back from its grid."""

    name: str
    grid: Grid
    images: list[tuple[MetaTensor, GridMapping | MonaiInverse]]
    seconds: float
    warnings: list[str]
    doubts: list[str]  # those of the warnings that speak against any mask of the scan


@dataclass(frozen=True)
class Prediction:
    """The result for one scan.

    Attributes:
        name: the scan's.
        mask: (X, Y, Z) in the scan's own grid, the data set's label values, in the smallest type for them.
        probabilities: (K, X, Y, Z) float32 in the order of the classes (or of the regions), or None if not asked for.
        grid: where the voxels are.
        seconds: for preprocessing and inference.
        warnings: what users should know before they use the mask.
        quality: how far to trust the mask, see `medseg_supcon.quality.rate`; None: not asked for.
        evidence: what that rests on, per run.
    """

    name: str
    mask: npt.NDArray[Any]
    probabilities: npt.NDArray[np.float32] | None
    grid: Grid
    seconds: float
    warnings: list[str] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    evidence: list[Evidence] = field(default_factory=list, repr=False)


def prepare(scan: Scan, models: Sequence[Model]) -> Prepared:
    """Read a scan and preprocess it for each model; DataError if it cannot be read, or the models do not take it."""
    started = time.perf_counter()
    return prepare_volume(read_scan(scan, len(models[0].plan["channels"])), scan, models, started)


def prepare_volume(volume: Volume, scan: Scan, models: Sequence[Model], started: float) -> Prepared:
    """Preprocess what was read of a scan for each model; ``started``: `time.perf_counter` when the reading began."""
    doubts = _oddities(volume)
    warnings = [*scan.warnings, *(issue.sentence for issue in volume.issues), *doubts]
    for model in models:
        _check_size(model, volume, scan)
    images = [_preprocess(model, volume, scan) for model in models]
    return Prepared(scan.name, volume.grid, images, time.perf_counter() - started, warnings, doubts)


def _preprocess(model: Model, volume: Volume, scan: Scan) -> tuple[MetaTensor, GridMapping | MonaiInverse]:
    affine, shape = volume.monai_affine, volume.data.shape[:3]
    meta = {"original_affine": affine, "spatial_shape": shape, "space": "RAS", "original_channel_dim": 0}
    meta["filename_or_obj"] = str(scan.files[0])
    image = MetaTensor(torch.from_numpy(volume.channels_first), affine=torch.from_numpy(affine), meta=meta)
    try:
        image = model.preprocessing({"image": image})["image"]
    except RuntimeError as error:  # MONAI's, around what a transform raises
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        what = f"the preprocessing of {model.name} fails ({' '.join(str(cause).split())[:200]})"
        cure = 'Look at "intensity" in its plan.json, and at the scan.'
        raise DataError(f"{scan.source}: {what}. {cure}") from error
    mapping = None
    if model.simple:
        mapping = GridMapping.between(np.asarray(image.affine, dtype=np.float64), image.shape[1:], affine, shape)
    return image, mapping or MonaiInverse(model, image)


def _check_size(model: Model, volume: Volume, scan: Scan) -> None:
    """Refuse a header in the wrong unit: it would need more memory than there is, or shrink the body to a voxel."""
    target = np.empty(3)  # mm along R, A, S
    target[axcodes2ornt(model.plan["orientation"])[:, 0].astype(int)] = model.plan["spacing"]
    spacing = np.linalg.norm(volume.monai_affine[:3, :3], axis=0)
    size = volume.data.shape[:3] * spacing / target[io_orientation(volume.monai_affine)[:, 0].astype(int)]
    if np.prod(np.maximum(size, 1)) > MOST_VOXELS or (max(volume.data.shape[:3]) > 3 and size.max() < 1.5):
        sizes, wanted = (" x ".join(f"{mm:.3g}" for mm in three) for three in (spacing, model.plan["spacing"]))
        found = f"its header gives voxels of {sizes} mm, but the model works at {wanted} mm"
        raise DataError(f"{scan.source}: {found}. The header is probably wrong: correct it (NIfTI's unit is mm).")


def _oddities(volume: Volume) -> list[str]:
    if volume.data.size and volume.data.min() == volume.data.max():
        return ["all voxels have one value"]
    warnings = ["the scan is a single slice, but the model works in 3-D"] if 1 in volume.data.shape[:3] else []
    for number, channel in enumerate(volume.channels_first):
        values = len(np.unique(channel[tuple(slice(None, None, max(1, n // 40)) for n in channel.shape)]))
        if values <= FEW_VALUES:
            warnings.append(f"the scan has only {values} different values: is it a label map?")
        if (outlier := outliers(channel)) is not None:
            (value, count), where = outlier, f"channel {number}: " if volume.data.ndim == 4 else ""
            what = f"{where}{counted(count, 'voxel')} far outside all others (up to {value:.3g})"
            why = "after normalisation the others hardly differ, and the mask may be wrong"
            warnings.append(f"{what}: {why}. Repair the scan")
    return warnings


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
    """From the model's grid back to the scan's, a few rows at a time: `Invertd`'s result in less memory.

    The grids differ by turning, mirroring and scaling of axes: trilinear interpolation is linear, axis after axis.
    """

    order: tuple[int, ...]  # the scan's axis along each axis of the model's grid
    axes: tuple[AxisInterpolation, ...]  # of the model's grid

    @classmethod
    def between(
        cls, model_affine: Affine, model_shape: Sequence[int], affine: Affine, shape: Sequence[int]
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

    def blocks(self, chunks: Iterable[Tensor], activate: Activation | None) -> Blocks:
        """Rows of the scan (turned like the model's grid), as soon as the chunks that they need are there.

        Takes chunks (K, rows, Y, Z) in order along the first axis of the model's grid, logits if there is an
        ``activate``. Yields which rows, and for each of the K classes in turn the probabilities (rows, Y', Z').
        """
        done = np.zeros(len(self.axes[0].low), dtype=bool)
        start, last = 0, None
        for chunk in chunks:
            if last is not None:
                yield from self._ready(torch.cat([last, chunk[:, :1]], dim=1), start - 1, done, activate)
            yield from self._ready(chunk, start, done, activate)
            start, last = start + chunk.shape[1], chunk[:, -1:].clone()

    def _ready(self, chunk: Tensor, start: int, done: npt.NDArray[np.bool_], activate: Activation | None) -> Blocks:
        x, y, z = self.axes
        rows = np.flatnonzero(~done & (x.low >= start) & (x.high < start + chunk.shape[1]))
        done[rows] = True
        finer = max(chunk.shape[2] * chunk.shape[3], len(y.low) * len(z.low)) * 4
        for block in np.array_split(rows, max(1, -(-len(rows) * finer // BLOCK_BYTES))):
            if len(block):
                here = AxisInterpolation(x.low[block], x.high[block], x.w[block])
                first = int(here.low.min())
                part = chunk[:, first - start : int(here.high.max()) + 1 - start]
                part = part if activate is None else activate(part, dim=0)
                yield block, map(partial(self._plane, here, first), part)

    def _plane(self, here: AxisInterpolation, first: int, values: Tensor) -> Tensor:
        return here.take(self.axes[1].take(self.axes[2].take(values, 2), 1), 0, first)


@dataclass(frozen=True)
class MonaiInverse:
    """The same by MONAI's own inverse, for preprocessing that is more than turning and scaling; it needs all rows."""

    model: Model
    image: MetaTensor
    order = (0, 1, 2)

    def blocks(self, chunks: Iterable[Tensor], activate: Activation | None) -> Blocks:
        """All rows at once."""
        whole = torch.cat([chunk.to("cpu", copy=True) for chunk in chunks], dim=1)
        whole = whole if activate is None else activate(whole, dim=0)
        back = MetaTensor(whole, meta=self.image.meta, applied_operations=self.image.applied_operations)
        scores = self.model.preprocessing.inverse({"image": back})["image"].as_tensor()
        yield np.arange(scores.shape[1]), iter(scores)


def label(classes: npt.NDArray[Any], order: Sequence[int], blocks: Blocks) -> None:
    """Write the most probable class into `classes`, as the rows come in; of equal ones the first, like argmax."""
    view = classes.transpose(order)
    for rows, planes in blocks:
        best = next(planes).clone()
        index_of_best = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
        for index, values in enumerate(planes, start=1):
            index_of_best.masked_fill_(values > best, index)
            torch.maximum(best, values, out=best)
        view[rows] = index_of_best.cpu().numpy().astype(classes.dtype)


def paint(classes: npt.NDArray[Any], order: Sequence[int], blocks: Blocks, written: Sequence[int]) -> None:
    """`label` for regions: their voxels get the class index that each is written with, a later one over an earlier one."""
    view = classes.transpose(order)
    for rows, planes in blocks:
        for index, values in zip(written, planes, strict=True):
            part = view[rows]
            part[(values > THRESHOLD).cpu().numpy()] = index
            view[rows] = part


def adding(scores: npt.NDArray[np.float32], order: Sequence[int], blocks: Blocks, members: int) -> Blocks:
    """The same blocks, whose values are added to `scores` (K, X, Y, Z), one of several members' share, on their way."""
    view = scores.transpose(0, *(axis + 1 for axis in order))

    def add(rows: npt.NDArray[np.int64], planes: Iterator[Tensor]) -> Iterator[Tensor]:
        for index, values in enumerate(planes):
            view[index, rows] += values.cpu().numpy() / members
            yield values

    return ((rows, add(rows, planes)) for rows, planes in blocks)
