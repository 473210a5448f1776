"""The one preprocessing: of the scan, as the plan and the inference config define it, and of the label map after it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, ResampleToMatch, Transform
from monai.transforms.intensity import dictionary

from medseg_supcon.datasets import class_indices, normalisation, readable
from medseg_supcon.errors import RunError
from medseg_supcon.losses import IGNORE_INDEX

# MONAI's loader makes every reader it has, and that one warns if pydicom is installed; only NIfTI is read here
warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)

SIGNS = "#@%$"  # MONAI takes these for ::, a reference, a macro, an expression
ESCAPED = {"#": r"\x23", "@": r"\x40", "%": r"\x25", "import": r"\x69mport"}
PER_CHANNEL = ("SplitDimd", "ConcatItemsd", "DeleteItemsd")  # how a plan normalises channels one by one


def literal(value: Any) -> Any:
    """A value as a bundle config must write it, so that `ConfigParser` returns the same value.

    A text without MONAI's signs stays as it is; any other value becomes an expression that escapes them, in which a
    ``_target_`` stays data, too.

    >>> literal("/data/scans"), literal("/data/site#2")
    ('/data/scans', "$'/data/site\\\\x232'")
    """
    text = repr(value)
    if isinstance(value, str) and not any(sign in value for sign in SIGNS):
        return value
    for word, escaped in ESCAPED.items():
        text = text.replace(word, escaped)
    return f"${text}"


def plan_preprocessing(plan: Mapping[str, Any]) -> Compose:
    """What the shipped ``inference.yaml`` defines (key ``image``), from a plan that has no `intensity_problem`."""
    arguments = [{key: value for key, value in step.items() if key != "_target_"} for step in plan["intensity"]]
    names = [step["_target_"].rpartition(".")[2] for step in plan["intensity"]]
    transforms = [
        mt.LoadImaged("image", reader="NibabelReader", squeeze_non_spatial_dims=True, ensure_channel_first=True),
        mt.DeleteItemsd("image_path"),
        mt.EnsureTyped("image", dtype=torch.float32),
        mt.Orientationd("image", axcodes=plan["orientation"], labels=None),
        mt.Spacingd("image", pixdim=plan["spacing"], mode="bilinear", dtype=torch.float32),
        Compose([getattr(mt, name)(**given) for name, given in zip(names, arguments, strict=True)]),
    ]
    return Compose(transforms)


def intensity_problem(transforms: Any) -> str | None:
    """Why a plan's ``intensity`` is not plain data that names MONAI's deterministic transforms; None if it is."""
    for step in transforms:
        target = step.get("_target_") if isinstance(step, Mapping) else step
        name = str(target).removeprefix("monai.transforms.")
        made = getattr(dictionary, name, None)
        stock = inspect.isclass(made) and made.__module__ == dictionary.__name__
        if not isinstance(step, Mapping) or not (stock or name in PER_CHANNEL) or name.startswith("Rand"):
            return f"intensity names {target!r}, which is not a deterministic intensity transform of MONAI"
        for key, value in step.items():
            if key != "_target_" and (str(key).startswith("_") or any(sign in str(value) for sign in "$@%")):
                return f"intensity contains the expression {key!r}: {value!r}"
    return None


def read_preprocessing(bundle_root: str | Path) -> Compose:
    """The scan's preprocessing (key ``image``) as ``configs/inference.yaml`` of the run in ``bundle_root`` defines it."""
    path = Path(bundle_root) / "configs" / "inference.yaml"
    if not path.is_file():
        raise RunError(
            f"{path} does not exist: {bundle_root} is not a run. Create one with medseg plan or medseg train."
        )
    parser = ConfigParser()
    parser.read_config(str(path))
    parser["bundle_root"] = literal(str(bundle_root))
    transform: Compose = parser.get_parsed_content("preprocessing")
    return transform


def intensity_transforms(channels: Sequence[str], foreground: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Transform configs for key ``image`` that normalise a scan by nnU-Net's rules.

    CT is clipped to the 0.5 and 99.5 percentiles of the structures' intensities (`foreground`, per channel), then shifted
    and scaled by their mean and standard deviation. Channels of several kinds are split and stacked again.
    """
    kinds = [normalisation(name) for name in channels]
    if len(set(kinds)) == 1 and (kinds[0] != "ct" or len(kinds) == 1):
        return _normalise("image", kinds[0], foreground[0])
    postfixes = [str(index) for index in range(len(channels))]
    keys = [f"image_{postfix}" for postfix in postfixes]
    split = {"_target_": "SplitDimd", "keys": "image", "output_postfixes": postfixes, "dim": 0, "keepdim": True}
    steps = [step for each in zip(keys, kinds, foreground, strict=True) for step in _normalise(*each)]
    joined = {"_target_": "ConcatItemsd", "keys": keys, "name": "image", "dim": 0}
    return [split, *steps, joined, {"_target_": "DeleteItemsd", "keys": keys}]


def _normalise(key: str, kind: str, stats: Mapping[str, float]) -> list[dict[str, Any]]:
    if kind == "nonorm":
        return []
    if kind == "rgb_to_0_1":
        return [{"_target_": "ScaleIntensityRanged", "keys": key, "a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1}]
    if kind == "rescale_to_0_1":
        return [{"_target_": "ScaleIntensityd", "keys": key, "minv": 0, "maxv": 1, "channel_wise": True}]
    if kind == "zscore":
        return [{"_target_": "NormalizeIntensityd", "keys": key, "channel_wise": True}]
    low, high = stats["percentile_00_5"], stats["percentile_99_5"]  # CT
    if not high > low:
        low, high = low - 0.5, low + 0.5
    mean, std = stats["mean"], stats["std"] or 1.0
    limits = {"a_min": low, "a_max": high, "b_min": (low - mean) / std, "b_max": (high - mean) / std}
    rounded = {name: readable(value, 6) for name, value in limits.items()}
    return [{"_target_": "ScaleIntensityRanged", "keys": key, **rounded, "clip": True}]


class LabelPreprocessingd(Transform):  # type: ignore[misc]
    """Loads a case's label map, turns its values into class indices and resamples it to the grid of ``image``.

    Runs after the scan's preprocessing; nearest neighbour. Adds ``label`` (1, X, Y, Z), float32, -1 for voxels that are
    not annotated or outside the label map. A case without ``label`` passes through unchanged.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.load = LoadImage(
            "NibabelReader", image_only=True, dtype=np.float64, ensure_channel_first=True, squeeze_non_spatial_dims=True
        )
        self.match = ResampleToMatch(mode="nearest", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if d.get("label") is None:
            return d
        file, image = d["label"], d["image"]
        label = self.load(file)
        affine = label.affine
        if self.plan.get("trust_scan_affine"):
            affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        # one more than the class index: the zeros from outside the label map then become "ignored"
        indices = class_indices(label.numpy(), self.plan, file).astype(np.float32) - IGNORE_INDEX
        d["label"] = self.match(MetaTensor(torch.from_numpy(indices), affine=affine), image) + IGNORE_INDEX
        d["label"].meta["filename_or_obj"] = str(file)
        return d
