"""A scan read and preprocessed for the network, and what the network makes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation

from medseg_supcon.bundle import Model, innermost
from medseg_supcon.errors import DataError, MedsegError
from medseg_supcon.scans import Grid, Scan, Volume, outliers, read_scan
from medseg_supcon.text import counted

MOST_VOXELS = 4e9  # on the model's grid: 16 GB, a scan of 1600 voxels a side


@dataclass(frozen=True)
class Prepared:
    """A scan read and preprocessed for each model, all on the CPU."""

    name: str
    grid: Grid
    affine: npt.NDArray[np.float64]
    images: list[MetaTensor]
    seconds: float
    warnings: list[str]


def prepare(scan: Scan, models: Sequence[Model]) -> Prepared:
    """Read a scan and preprocess it for each model.

    Raises:
        DataError: it cannot be read, or is not a scan that the models take.
    """
    started = time.perf_counter()
    volume = read_scan(scan, len(models[0].plan["channels"]))
    warnings = [*scan.warnings, *(issue.sentence for issue in volume.issues), *_oddities(volume)]
    for model in models:
        _check_size(model, volume, scan)
    images = [_preprocess(model, volume, scan) for model in models]
    return Prepared(scan.name, volume.grid, volume.monai_affine, images, time.perf_counter() - started, warnings)


def _preprocess(model: Model, volume: Volume, scan: Scan) -> MetaTensor:
    affine, voxels = volume.monai_affine, torch.from_numpy(volume.channels_first)
    meta = {"original_affine": affine, "spatial_shape": volume.data.shape[:3], "space": "RAS"}
    image = MetaTensor(voxels, affine=torch.from_numpy(affine), meta=meta)
    image.meta["original_channel_dim"] = 0
    image.meta["filename_or_obj"] = str(scan.files[0])
    try:
        prepared: MetaTensor = model.preprocessing({"image": image})["image"]
    except RuntimeError as error:  # MONAI's, around what a transform raises
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise DataError(
            f"{scan.source}: the preprocessing of {model.name} fails ({' '.join(str(cause).split())[:200]}). Look at "
            '"intensity" in its plan.json, and at the scan.'
        ) from error
    return prepared


def _check_size(model: Model, volume: Volume, scan: Scan) -> None:
    """Refuse a header in the wrong unit: it would need more memory than there is, or shrink the body to a voxel."""
    target = np.empty(3)  # mm along R, A, S
    target[axcodes2ornt(model.plan["orientation"])[:, 0].astype(int)] = model.plan["spacing"]
    spacing = np.linalg.norm(volume.monai_affine[:3, :3], axis=0)
    size = volume.data.shape[:3] * spacing / target[io_orientation(volume.monai_affine)[:, 0].astype(int)]
    if np.prod(np.maximum(size, 1)) > MOST_VOXELS or (max(volume.data.shape[:3]) > 3 and size.max() < 1.5):
        sizes = " x ".join(f"{s:.3g}" for s in spacing)
        wanted = " x ".join(f"{s:.3g}" for s in model.plan["spacing"])
        raise DataError(
            f"{scan.source}: its header gives voxels of {sizes} mm, but the model works at {wanted} mm. The header is "
            "probably wrong: correct it (NIfTI's unit is mm)."
        )


def _oddities(volume: Volume) -> list[str]:
    if volume.data.size and volume.data.min() == volume.data.max():
        return ["all voxels have one value"]
    warnings = ["the scan is a single slice, but the model works in 3-D"] if 1 in volume.data.shape[:3] else []
    for number, channel in enumerate(volume.channels_first):
        if (outlier := outliers(channel)) is not None:
            where = f"channel {number}: " if volume.data.ndim == 4 else ""
            value, count = outlier
            warnings.append(
                f"{where}{counted(count, 'voxel')} far outside all others (up to {value:.3g}): after normalisation the "
                "others hardly differ, and the mask may be wrong. Repair the scan"
            )
    return warnings


@dataclass(frozen=True)
class Prediction:
    """The result for one scan.

    Attributes:
        name: the scan's.
        mask: (X, Y, Z) in the scan's own grid, the data set's label values, in the smallest type for them.
        probabilities: (K, X, Y, Z) float32 in the order of the classes, or None if not asked for.
        grid: where the voxels are.
        seconds: for preprocessing and inference.
        warnings: what users should know before they use the mask.
    """

    name: str
    mask: npt.NDArray[Any]
    probabilities: npt.NDArray[np.float32] | None
    grid: Grid
    seconds: float
    warnings: list[str] = field(default_factory=list)
