"""Functions of inference.yaml: which scans a folder contains, and how a mask is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai.data
import nibabel
import numpy as np
import torch

NIFTI = r"\.nii(\.gz)?$"


def find_scans(folder: str, channels: int) -> dict[str, list[str]]:
    """The NIfTI scans in a folder: scan name -> its file, or one file per channel.

    With several channels, 3-D files case_0000.nii.gz, case_0001.nii.gz, ... are one scan "case" (nnU-Net's names); a
    4-D file has its channels last.
    """
    scans: dict[str, list[str]] = {}
    for path in sorted(Path(str(folder)).glob("[!.]*")):
        name, count = re.subn(NIFTI, "", path.name)
        if not count:
            continue
        if channels > 1 and re.search(r"_\d{4}$", name) and len(nibabel.load(path).shape) == 3:
            name = name[:-5]
        scans.setdefault(name, []).append(str(path))
    return dict(sorted(scans.items()))


def check_scans(scans: dict[str, list[str]], folder: str, channels: int) -> None:
    """Raise an error for a folder without scans and for an incomplete set of channels."""
    if not scans:
        raise FileNotFoundError(f"dataset_dir contains no NIfTI files (.nii, .nii.gz): {folder}")
    for files in scans.values():
        if len(files) not in (1, channels):
            raise ValueError(f"expected one file per scan, or one per channel: {', '.join(files)}")


def items(scans: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What MONAI's Dataset takes."""
    return [{"image": files if len(files) > 1 else files[0]} for files in scans.values()]


def mask_names(scans: dict[str, list[str]]) -> dict[str, str]:
    """First file of a scan -> file name of its mask."""
    return {files[0]: f"{name}.nii.gz" for name, files in scans.items()}


def name_formatter(names: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """SaveImaged's output_name_formatter that gives a mask the name of its scan."""
    return lambda meta, saver: {"subject": names[meta["filename_or_obj"]], "idx": None}


def small_components_removed(plan: dict[str, Any]) -> Callable[[Any], Any]:
    """A function of class indices (1, X, Y, Z): components below the plan's ``smallest_mm3`` become background."""
    from scipy import ndimage  # only a plan with this key needs it

    order = list(plan["labels"])

    def remove(mask: Any) -> Any:
        mask, voxel_mm3 = mask.clone(), abs(float(np.linalg.det(np.asarray(mask.affine)[:3, :3])))
        for name, smallest in plan["smallest_mm3"].items():
            components, _ = ndimage.label(np.asarray(mask[0].cpu()) == order.index(name), structure=np.ones((3, 3, 3)))
            small = np.bincount(components.ravel()) * voxel_mm3 < smallest * (1 - 1e-6)
            small[0] = False  # everything else
            mask[0][torch.from_numpy(small[components])] = 0
        return mask

    return remove


def mask_type(values: Sequence[float]) -> Any:
    """The smallest integer type for a mask's values; float32 if one of them is a fraction."""
    if any(value != int(value) for value in values):
        return np.float32
    lowest, highest = int(min(values)), int(max(values))
    return np.min_scalar_type(highest if lowest >= 0 else min(lowest, -highest - 1))


def region_painter(plan: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Probabilities of regions (R, X, Y, Z) -> class indices (1, X, Y, Z), for a plan whose regions may overlap.

    As nnU-Net does, the voxels of each region above 0.5 get the class of regions_class_order, a later region over an
    earlier one. Then only the largest component is kept of the regions in keep_largest, one after the other, and those of
    smallest_mm3 lose the components below their volume. What leaves a region leaves the regions inside it, too, and keeps
    the class that is written for the others.
    """
    values, regions = list(plan["labels"].values()), [set(region) for region in plan["regions"].values()]
    written = [values.index(value) for value in plan["regions_class_order"]]
    names, smallest = list(plan["regions"]), plan.get("smallest_mm3", {})

    def leave(mask: np.ndarray, region: set[float], stays: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take the components of a region out of it, unless ``stays`` of their sizes in voxels says otherwise."""
        from scipy import ndimage  # only a plan with keep_largest or smallest_mm3 needs it

        components, _ = ndimage.label(np.isin(mask, [values.index(v) for v in region]), structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())
        sizes[0] = 0  # everything else
        lost, before = (components > 0) & ~stays(sizes)[components], mask.copy()
        for c, value in enumerate(values):
            left = [written[i] for i, other in enumerate(regions) if value in other and not other <= region]
            mask[lost & (before == c)] = left[-1] if left and values[left[-1]] not in region else 0

    def paint(pred: Any) -> Any:
        mask = np.zeros(pred.shape[1:], np.int64)
        for probability, index in zip(pred, written, strict=True):
            mask[np.asarray(probability.cpu()) > 0.5] = index
        for name, region in zip(names, regions, strict=True):
            if name in plan["keep_largest"]:
                leave(mask, region, lambda sizes: np.arange(len(sizes)) == sizes.argmax())
        for name, volume in smallest.items():
            voxel_mm3 = abs(float(np.linalg.det(np.asarray(pred.affine)[:3, :3])))
            leave(mask, regions[names.index(name)], lambda s, v=volume, mm3=voxel_mm3: s * mm3 >= v * (1 - 1e-6))
        result = pred[:1] * 0
        result[0] = torch.from_numpy(mask)
        return result

    return paint


class VolumeWriter(monai.data.NibabelWriter):  # type: ignore[misc]
    """Writes a mask as it is.

    NibabelWriter drops the last axis of a single slice and writes a 2-D file. Its resampling, which is never needed
    here, reads the affine of a scan stored in another axis order as that of a 2-D image and fails.
    """

    @classmethod
    def convert_to_channel_last(cls, data: Any, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(data[0])

    @classmethod
    def resample_if_needed(cls, data_array: Any, affine: Any = None, *args: Any, **kwargs: Any) -> Any:
        return data_array, affine
