"""Scoring a folder of masks against a folder of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets import reorient, value_text, values_in
from medseg_supcon.errors import DataError
from medseg_supcon.evaluation.metrics import Array, Labels, Row, check_grids, score_mask, write_metrics
from medseg_supcon.scans import NIFTI_ENDINGS, read_nifti, stem

MOST_VALUES = 2000  # more than any atlas has
ROUNDING = 1e-3  # of whole values that a header scales
SUFFIX = "_0000"  # nnU-Net gives it to scans of a single channel, and a mask has its scan's name


def evaluate_folders(
    predictions: str | Path, references: str | Path, labels: Labels | None = None,
    out: str | Path | None = None, tolerance_mm: float = 1.0, ignore_label: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores the masks of one folder against the label maps of equal name in another; returns ``metrics.json``'s content.

    What is wrong with one case is one of its ``problems``. ``labels``: class name -> value (or list of a region's
    values), background first; None: the values in the files. A DataError if a folder is missing or empty, or no case can
    be scored.
    """
    masks, maps = _files(Path(predictions)), _files(Path(references))
    # one called x_0000 is x if that alone is a label map's name and no other mask's
    suffixed = {f"{name}{SUFFIX}": name for name in maps if name not in masks}
    masks = {name if name in maps else suffixed.get(name, name): file for name, file in masks.items()}
    in_masks, in_maps = (_values_in([files[name] for name in maps if name in masks]) for files in (masks, maps))
    in_maps -= {ignore_label}
    if labels is None:
        values = sorted((in_masks | in_maps) - {0, ignore_label})
        labels = {"background": 0, **{value_text(value): value for value in values}}
    rows, problems = list[Row](), dict[str, str]()
    for name, reference in maps.items():
        try:
            if name not in masks:
                raise DataError(f"{reference}: there is no mask with this name in {predictions}. Predict it.")
            (mask, mask_affine), (label, affine) = _read(masks[name]), _read(reference)
            mask, mask_affine = reorient(mask, mask_affine, affine)
            check_grids(f"{masks[name]}:", str(reference), (mask, mask_affine), (label, affine))
            if unknown := sorted(set(np.unique(mask).tolist()) - set(values_in(labels))):
                holds, expected = (", ".join(map(value_text, v)) for v in (unknown[:5], values_in(labels)))
                raise DataError(f"{masks[name]}: contains {holds}, expected {expected}. Save the label maps' values.")
            rows += score_mask(name, mask, affine, (label, affine), labels, ignore_label, tolerance_mm)
        except DataError as error:
            problems[name] = str(error)
    if not rows:
        raise DataError(f"no case could be scored. {next(iter(problems.values()), '')}".strip())
    warnings = []
    if (in_masks := in_masks - {0}) != (in_maps := in_maps - {0}):
        shown = [", ".join(map(value_text, sorted(values))) or "no structure" for values in (in_masks, in_maps)]
        warnings.append(
            f"{predictions}: the masks contain {shown[0]}, but the label maps in {references} contain {shown[1]}. A class "
            "that only one side has gets a Dice of 0. If one structure has two values, convert one side."
        )
    return write_metrics(rows, out, problems, warnings=warnings, without_reference=sorted(set(masks) - set(maps)))


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder with the NIfTI files.")
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        is_nifti = file.name.lower().endswith(NIFTI_ENDINGS) and not file.name.startswith(".")
        if is_nifti and (other := files.setdefault(stem(file), file)) is not file:
            raise DataError(f"{folder}: {other.name} and {file.name} have the same name. Keep one of them.")
    if not files:
        raise DataError(f"{folder} contains no NIfTI file (.nii, .nii.gz).")
    return files


def _values_in(files: Sequence[Path]) -> set[float]:
    """The whole values in files that can be read; what is wrong with the others is reported with their case."""
    values: set[float] = set()
    for file in files:
        with suppress(DataError):
            values |= set(np.unique(_read(file)[0]).tolist())
    return values


def _read(file: Path) -> tuple[Array, npt.NDArray[np.float64]]:
    """Whole values (X, Y, Z) and the affine of a label map."""
    volume = read_nifti(file)
    data, affine = volume.data, volume.affine
    if data.ndim != 3 or data.size == 0:
        raise DataError(f"{file}: expected a 3-D label map, found shape {data.shape}. Save one volume.")
    if data.dtype.kind == "f":
        if not np.isfinite(data).all():
            raise DataError(f"{file}: contains NaN or infinity, expected label values. Save it again.")
        data = np.round(data)
        fractions = np.unique(volume.data[np.abs(volume.data - data) > ROUNDING])[:3]
        if fractions.size:
            cure = "Save classes instead of probabilities, and resample with nearest neighbour."
            shown = ", ".join(f"{value:.4g}" for value in fractions)
            raise DataError(f"{file}: contains fractions ({shown}), expected whole class values. {cure}")
    if (number := len(np.unique(data))) > MOST_VALUES:
        raise DataError(f"{file}: contains {number} different values, expected a label map, not a scan.")
    if not np.isfinite(affine).all() or not (np.linalg.norm(affine[:3, :3], axis=0) > 0).all():
        raise DataError(f"{file}: its affine is not valid (zero or not finite). Save it on its scan's grid.")
    return data, affine
