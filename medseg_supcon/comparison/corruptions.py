"""Degraded test scans, the same for every model: noise, bias field, ghosting, lower resolution."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import RandBiasField, RandGaussianNoise, Resize

from medseg_supcon.datasets import Case
from medseg_supcon.views import ghost_weights

Volume = npt.NDArray[np.float32]


def add_noise(volume: Volume, seed: int) -> Volume:
    """Gaussian noise with a standard deviation of 10 % of the scan's range (0.5th to 99.5th percentile)."""
    low, high = np.percentile(volume, (0.5, 99.5))
    noise = RandGaussianNoise(prob=1.0, mean=0.0, std=0.1 * float(high - low), sample_std=False)
    return np.asarray(noise.set_random_state(seed=seed)(volume), dtype=np.float32)


def add_bias_field(volume: Volume, seed: int) -> Volume:
    """A smooth multiplicative field, on intensities above the scan's lowest."""
    lowest = volume.min()
    field = RandBiasField(prob=1.0, degree=3, coeff_range=(-0.4, 0.4))
    return np.asarray(field.set_random_state(seed=seed)(volume - lowest) + lowest, dtype=np.float32)


def add_ghosts(volume: Volume, seed: int) -> Volume:
    """Copies of the anatomy along one axis, as motion in step with the phase encoding causes them."""
    axis = int(np.random.default_rng(seed).choice([a for a in (1, 2, 3) if volume.shape[a] > 1] or [1]))
    spectrum = np.fft.fft(volume, axis=axis)
    weight = ghost_weights(volume.shape[axis], every=4, loss=0.5)
    shape = [-1 if a == axis else 1 for a in range(volume.ndim)]
    return np.fft.ifft(spectrum * weight.reshape(shape), axis=axis).real.astype(np.float32)


def lower_resolution(volume: Volume, seed: int = 0) -> Volume:
    """Averages over 2 x 2 x 2 voxels, interpolated back; anatomy stays in place."""
    size = volume.shape[1:]
    small = Resize([max(1, n // 2) for n in size], mode="area")(torch.from_numpy(volume))
    return np.asarray(Resize(size, mode="trilinear", align_corners=False)(small), dtype=np.float32)


CORRUPTIONS: dict[str, Callable[[Volume, int], Volume]] = {
    "noise": add_noise,
    "bias field": add_bias_field,
    "ghosting": add_ghosts,
    "low resolution": lower_resolution,
}


def corrupt_cases(cases: Sequence[Case], condition: str, folder: Path) -> list[Case]:
    """Write degraded scans of cases, each on its own grid; existing ones and the label maps are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    degraded = []
    for case in cases:
        # the same for every model: of the condition and the case's name alone
        seed = zlib.crc32(f"{condition}/{case.name}".encode())
        files = [folder / f"{case.name}_{number:04d}.nii.gz" for number in range(len(case.images))]
        for number, (file, target) in enumerate(zip(case.images, files, strict=True)):
            if not target.exists():
                part = folder / f".{target.name}"
                nibabel.save(_degraded(nibabel.load(file), CORRUPTIONS[condition], seed + number), part)
                part.replace(target)
        degraded.append(replace(case, images=tuple(files)))
    return degraded


def _degraded(image: Any, corruption: Callable[[Volume, int], Volume], seed: int) -> nibabel.Nifti1Image:
    data = np.asarray(image.dataobj, dtype=np.float32)
    volume = data.reshape(*data.shape[:3], -1)  # channels last, one where the file is 3-D
    worse = np.moveaxis(corruption(np.ascontiguousarray(np.moveaxis(volume, -1, 0)), seed), 0, -1)
    header = nibabel.Nifti1Header.from_header(image.header)
    header.set_data_dtype(np.float32)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    return nibabel.Nifti1Image(worse.reshape(data.shape), image.affine, header)
