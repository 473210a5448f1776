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

Volume = npt.NDArray[np.float32]

NOISE_SHARE = 0.1  # standard deviation, of the scan's range
BIAS_RANGE = (-0.4, 0.4)  # coefficients of the log field's polynomial of third degree
GHOSTS, GHOST_INTENSITY = 4, 0.5  # every fourth line of k-space loses half
SHRINK = 2  # voxels to a side of one


def add_noise(volume: Volume, seed: int) -> Volume:
    """Gaussian noise with a standard deviation of 10 % of the scan's range (0.5th to 99.5th percentile)."""
    low, high = np.percentile(volume, (0.5, 99.5))
    noise = RandGaussianNoise(prob=1.0, mean=0.0, std=NOISE_SHARE * float(high - low), sample_std=False)
    return _array(noise.set_random_state(seed=seed)(volume))


def add_bias_field(volume: Volume, seed: int) -> Volume:
    """A smooth multiplicative field, on intensities above the scan's lowest."""
    lowest = volume.min()
    field = RandBiasField(prob=1.0, degree=3, coeff_range=BIAS_RANGE)
    return _array(field.set_random_state(seed=seed)(volume - lowest) + lowest)


def add_ghosts(volume: Volume, seed: int) -> Volume:
    """Copies of the anatomy along one axis, as motion in step with the phase encoding causes them."""
    axis = int(np.random.default_rng(seed).choice([a for a in (1, 2, 3) if volume.shape[a] > 1] or [1]))
    spectrum = np.fft.fft(volume, axis=axis)
    lines = np.abs(np.fft.fftfreq(volume.shape[axis]) * volume.shape[axis]).round().astype(int)
    weight = np.where((lines % GHOSTS == 0) & (lines > 0), 1 - GHOST_INTENSITY, 1.0)
    shape = [-1 if a == axis else 1 for a in range(volume.ndim)]
    return np.fft.ifft(spectrum * weight.reshape(shape), axis=axis).real.astype(np.float32)


def lower_resolution(volume: Volume, seed: int = 0) -> Volume:
    """Averages over 2 x 2 x 2 voxels, interpolated back; anatomy stays in place."""
    size = volume.shape[1:]
    small = Resize([max(1, n // SHRINK) for n in size], mode="area")(torch.from_numpy(volume))
    return _array(Resize(size, mode="trilinear", align_corners=False)(small))


CORRUPTIONS: dict[str, Callable[[Volume, int], Volume]] = {
    "noise": add_noise,
    "bias field": add_bias_field,
    "ghosting": add_ghosts,
    "low resolution": lower_resolution,
}


def corrupt_cases(cases: Sequence[Case], condition: str, folder: Path) -> list[Case]:
    """Write degraded scans of cases, each on its own grid; existing ones and the label maps are kept.

    The random draw depends only on the condition (a key of ``CORRUPTIONS``) and the case's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    degraded = []
    for case in cases:
        seed = zlib.crc32(f"{condition}/{case.name}".encode())
        files = []
        for number, file in enumerate(case.images):
            target = folder / f"{case.name}_{number:04d}.nii.gz"
            if not target.exists():
                part = folder / f".{target.name}"
                _corrupt_file(file, part, CORRUPTIONS[condition], seed + number)
                part.replace(target)
            files.append(target)
        degraded.append(replace(case, images=tuple(files)))
    return degraded


def _corrupt_file(source: Path, target: Path, corruption: Callable[[Volume, int], Volume], seed: int) -> None:
    image: Any = nibabel.load(source)
    data = np.asarray(image.dataobj, dtype=np.float32)
    volume = data.reshape(*data.shape[:3], -1)  # channels last, one where the file is 3-D
    worse = np.moveaxis(corruption(np.ascontiguousarray(np.moveaxis(volume, -1, 0)), seed), 0, -1)
    header = nibabel.Nifti1Header.from_header(image.header)
    header.set_data_dtype(np.float32)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    nibabel.save(nibabel.Nifti1Image(worse.reshape(data.shape), image.affine, header), target)


def _array(volume: Any) -> Volume:
    return np.asarray(volume, dtype=np.float32)
