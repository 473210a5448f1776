"""Reading and preprocessing a scan: what can go on while another is on the GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor

from medseg_supcon.inference._grid import Grid, Volume
from medseg_supcon.inference._model import Model
from medseg_supcon.inference._read import read_scan
from medseg_supcon.inference._scans import Scan


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
    """Reads a scan and preprocesses it for each model.

    Raises:
        DataError: it cannot be read, or is not a scan that the models take.
    """
    started = time.perf_counter()
    volume = read_scan(scan, len(models[0].plan["channels"]))
    warnings = [*volume.warnings, *_oddities(volume)]
    images = [_preprocess(model, volume, scan) for model in models]
    return Prepared(scan.name, volume.grid, volume.affine, images, time.perf_counter() - started, warnings)


def _preprocess(model: Model, volume: Volume, scan: Scan) -> MetaTensor:
    meta = {"original_affine": volume.affine, "spatial_shape": volume.data.shape[1:], "space": "RAS"}
    image = MetaTensor(torch.from_numpy(volume.data), affine=torch.from_numpy(volume.affine), meta=meta)
    image.meta["original_channel_dim"] = 0
    image.meta["filename_or_obj"] = str(scan.files[0])
    prepared: MetaTensor = model.preprocessing({"image": image})["image"]
    return prepared


def _oddities(volume: Volume) -> list[str]:
    found = []
    if volume.data.size and volume.data.min() == volume.data.max():
        found.append("all voxels have one value")
    return found
