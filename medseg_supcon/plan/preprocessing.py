"""The one preprocessing: the scan's from the bundle's inference config, and the label map's that follows it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, ResampleToMatch, Transform

from medseg_supcon.datasets import class_indices
from medseg_supcon.errors import RunError
from medseg_supcon.losses import IGNORE_INDEX

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


def read_preprocessing(bundle_root: str | Path) -> Compose:
    """The scan's preprocessing as ``configs/inference.yaml`` of a run defines it (key ``image``).

    Args:
        bundle_root: the run's folder.

    Raises:
        RunError: the folder is not a run.
    """
    path = Path(bundle_root) / "configs" / "inference.yaml"
    if not path.is_file():
        raise RunError(
            f"{path} does not exist: {bundle_root} is not a run. Make one with medseg plan or medseg train."
        )
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
