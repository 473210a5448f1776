"""The one preprocessing: the scan's from the bundle's inference config, and the label map's that follows it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import monai.transforms
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    DeleteItemsd,
    EnsureTyped,
    LoadImage,
    LoadImaged,
    Orientationd,
    ResampleToMatch,
    Spacingd,
    Transform,
)
from monai.transforms.intensity import dictionary

from medseg_supcon.datasets import class_indices
from medseg_supcon.errors import RunError
from medseg_supcon.losses import IGNORE_INDEX

# MONAI's loader, of NIfTI alone here, makes every reader it has, and that one warns where pydicom is installed.
warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)

SIGNS = "#@%$"  # :: in MONAI's eyes, a reference, a macro, an expression
ESCAPED = {"#": r"\x23", "@": r"\x40", "%": r"\x25", "import": r"\x69mport"}


def literal(value: Any) -> Any:
    """`value` as a bundle config has to say it, so that `ConfigParser` gives back the very same.

    MONAI reads ``#`` in any text as ``::``, and texts that begin with ``@``, ``%`` or ``$`` as references, macros
    and expressions. A text without such a sign stays as it is; any other value becomes an expression that escapes
    them, in which a ``_target_`` stays data, too.

    Args:
        value: a text, or a list or dictionary of texts, numbers and more of these.

    Example:
        >>> from monai.bundle import ConfigParser
        >>> from medseg_supcon.plan import literal
        >>> literal("/data/scans"), literal("/data/site#2")
        ('/data/scans', "$'/data/site\\\\x232'")
        >>> ConfigParser({"folder": literal("/data/site#2")}).get_parsed_content("folder")
        '/data/site#2'
    """
    text = repr(value)
    if isinstance(value, str) and not any(sign in value for sign in SIGNS):
        return value
    for word, escaped in ESCAPED.items():
        text = text.replace(word, escaped)
    return f"${text}"


PER_CHANNEL = ("SplitDimd", "ConcatItemsd", "DeleteItemsd")  # how a plan normalises channels one by one


def plan_preprocessing(plan: Mapping[str, Any]) -> Compose:
    """The scan's preprocessing (key ``image``) from a plan as plain data: what the shipped ``inference.yaml`` defines.

    Args:
        plan: a valid one, without `intensity_problem`.
    """
    intensity = [
        getattr(monai.transforms, step["_target_"].rpartition(".")[2])(
            **{k: v for k, v in step.items() if k != "_target_"}
        )
        for step in plan["intensity"]
    ]
    load = LoadImaged("image", reader="NibabelReader", squeeze_non_spatial_dims=True, ensure_channel_first=True)
    return Compose(
        [
            load,
            DeleteItemsd("image_path"),
            EnsureTyped("image", dtype=torch.float32),
            Orientationd("image", axcodes=plan["orientation"], labels=None),
            Spacingd("image", pixdim=plan["spacing"], mode="bilinear", dtype=torch.float32),
            Compose(intensity),
        ]
    )


def intensity_problem(transforms: Any) -> str | None:
    """Why a plan's ``intensity`` is not plain data that names MONAI's deterministic transforms; None where it is.

    >>> intensity_problem([{"_target_": "NormalizeIntensityd", "keys": "image"}])
    >>> intensity_problem([{"_target_": "Lambdad", "keys": "image"}])
    "intensity names 'Lambdad', which is not a deterministic intensity transform of MONAI"
    """
    for step in transforms:
        target = step.get("_target_") if isinstance(step, Mapping) else step
        name = str(target).removeprefix("monai.transforms.")
        made = getattr(dictionary, name, None)
        stock = inspect.isclass(made) and made.__module__ == dictionary.__name__
        if not isinstance(step, Mapping) or not (stock or name in PER_CHANNEL) or name.startswith("Rand"):
            return f"intensity names {target!r}, which is not a deterministic intensity transform of MONAI"
        for key, value in step.items():
            if key != "_target_" and (str(key).startswith("_") or any(sign in str(value) for sign in "$@%")):
                return f"intensity holds the expression {key!r}: {value!r}"
    return None


def read_preprocessing(bundle_root: str | Path) -> Compose:
    """The scan's preprocessing as ``configs/inference.yaml`` of a run defines it (key ``image``).

    Args:
        bundle_root: the run's folder.

    Raises:
        RunError: the folder is not a run.
    """
    path = Path(bundle_root) / "configs" / "inference.yaml"
    if not path.is_file():
        raise RunError(f"{path} does not exist: {bundle_root} is not a run. Make one with medseg plan or medseg train.")
    parser = ConfigParser()
    parser.read_config(str(path))
    parser["bundle_root"] = literal(str(bundle_root))
    transform: Compose = parser.get_parsed_content("preprocessing")
    return transform


class LabelPreprocessingd(Transform):  # type: ignore[misc]
    """Loads a case's label map, turns its values into class indices and brings it to the grid of ``image``.

    Runs after the scan's preprocessing. Nearest neighbour; -1 where the data set says "not annotated".
    A case without ``label`` passes through unchanged.

    Args:
        plan: the run's plan (``labels``, ``ignore_label``).
        trust_scan_affine: take the scan's affine for the label map too (``--allow-affine-mismatch``).

    Raises:
        DataError: (on call) a value that the data set does not declare.

    Shape:
        adds ``label`` (1, X, Y, Z), float32 class indices on the grid of ``image`` (C, X, Y, Z).
    """

    def __init__(self, plan: Mapping[str, Any], trust_scan_affine: bool | None = None) -> None:
        self.plan = plan
        trusted = plan.get("trust_scan_affine", False) if trust_scan_affine is None else trust_scan_affine
        self.trust_scan_affine = bool(trusted)
        self.load = LoadImage(
            "NibabelReader",
            image_only=True,
            dtype=np.float64,
            ensure_channel_first=True,
            squeeze_non_spatial_dims=True,
        )
        self.match = ResampleToMatch(mode="nearest", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if d.get("label") is None:
            return d
        file, image = d["label"], d["image"]
        label = self.load(file)
        affine = label.affine
        if self.trust_scan_affine:
            affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        # one more than the class index: the zeros that come in from outside the label map are then "ignored"
        indices = class_indices(label.numpy(), self.plan, file).astype(np.float32) - IGNORE_INDEX
        d["label"] = self.match(MetaTensor(torch.from_numpy(indices), affine=affine), image) + IGNORE_INDEX
        d["label"].meta["filename_or_obj"] = str(file)
        return d
