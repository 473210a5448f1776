"""Label values: what a data set declares, what its files hold, and the class index of each value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import ConfigError, DataError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.scans import as_whole, count_values, in_parallel, read_nifti, slabs

Labels = dict[str, "int | float"]

# Values of float label files carry rounding of the scaling; a value this close to a declared one is that one.
TOLERANCE = 1e-3
LARGEST = 2**53  # beyond it float64 merges neighbouring whole numbers
STRAY = np.iinfo(np.int16).min


def check_name(name: object, source: Path, key: str) -> str:
    """The name of a class, channel or data set without blanks around it; `DataError` if it cannot be printed."""
    text = name.strip() if isinstance(name, str) else ""
    if not text or not text.isprintable():
        raise DataError(f'{source}: {name!a} under "{key}" is not a printable name. Correct it.')
    return text


def whole_number(value: object) -> int | None:
    """A whole number, also as a text; None for anything else."""
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def parse_labels(declared: object, source: Path, ignore: object = None) -> tuple[Labels, int | float | None]:
    """Class name -> value, background first and then by value, and the ignore label ("ignore" is not a class).

    Takes the decathlon's ``{"0": "background", "1": "tumour"}`` and nnU-Net's ``{"background": 0, "tumour": 1}``.
    """
    if not isinstance(declared, Mapping):
        raise DataError(
            f'{source}: "labels" must map class names to values, such as {{"background": 0, "tumour": 1}}; '
            f"found {type(declared).__name__}."
        )
    by_value = all(_number(key) is not None for key in declared) and not all(
        _number(value) is not None for value in declared.values()
    )
    pairs: list[tuple[str, float]] = []
    for key, entry in declared.items():
        if isinstance(entry, list | tuple):
            raise ConfigError(
                f"{source}: label {key!r} is a region, the values {list(entry)}. Overlapping regions are not "
                f"supported yet: give every class one value of its own."
            )
        name, value = (entry, _number(key)) if by_value else (key, _number(entry))
        if value is None or abs(value) > LARGEST:
            raise DataError(f"{source}: label {key!r} must have a number up to 2^53 as its value, found {entry!r}.")
        pairs.append((check_name(name, source, "labels"), value))
    ignored = _number(ignore)
    if ignore is not None and ignored is None:
        raise DataError(f'{source}: "ignore_label" must be a number, found {ignore!r}.')
    ignored = next((value for name, value in pairs if name.lower() == "ignore"), ignored)
    pairs = [(name, value) for name, value in pairs if name.lower() != "ignore" and value != ignored]
    for kind, which in (("name", 0), ("value", 1)):
        entries: list[str | float] = [pair[which] for pair in pairs]
        twice = next((entry for entry in entries if entries.count(entry) > 1), None)
        if twice is not None:
            raise DataError(f'{source}: "labels" uses the {kind} {twice!r} twice. Give each class its own {kind}.')
    ground = next((pair for pair in pairs if pair[0].lower() == "background"), None)
    ground = ground or next((pair for pair in pairs if pair[1] == 0), None) or ("background", 0.0)
    if ground[1] == ignored:
        raise DataError(f"{source}: the background and the ignore label are both {value_text(ground[1])}. Correct one.")
    rest = sorted((pair for pair in pairs if pair != ground), key=lambda pair: pair[1])
    if not rest:
        raise DataError(f'{source}: "labels" names no class other than the background. Declare at least one.')
    labels = {name: _plain(value) for name, value in [ground, *rest]}
    return labels, None if ignored is None else _plain(ignored)


def value_text(value: float) -> str:
    """A label value for people: all digits of a whole number, four of any other."""
    return f"{value:.0f}" if value == round(value) else f"{value:.4g}"


def _plain(value: float) -> int | float:
    """An int if the number is whole: it reads better in a file."""
    return int(value) if value.is_integer() else value


def scan_labels(files: Iterable[Path], source: Path, ignore: object = None) -> tuple[Labels, int | float | None]:
    """Labels as the files show them: ``{"background": 0, "label 1": 1, ...}``; `check_dataset` reports unreadable files."""

    def read_values(path: Path) -> set[float]:
        try:
            return set(count_values(read_nifti(path).data))
        except DataError:
            return set()

    values = sorted(set().union(*in_parallel(read_values, files)))
    if len(values) > 256 or any(value != int(value) for value in values):
        raise DataError(
            f'{source}: declares no "labels", and the label files hold {len(values)} different values, '
            f'perhaps fractions. Declare the classes: "labels": {{"background": 0, "tumour": 1}}.'
        )
    declared = {f"label {int(value)}": value for value in values if value != 0}
    if not declared:
        raise DataError(f"{source}: the label files hold no value other than 0. At least one structure must be drawn.")
    return parse_labels({"background": 0, **declared}, source, ignore)


def label_type(values: Collection[float]) -> np.dtype[Any]:
    """The smallest integer type that holds all values; float32 if one is not an integer. The bundle's script does the same.

    Example:
        >>> from medseg_supcon.datasets import label_type
        >>> label_type([0, 4, 255]), label_type([-1, 0, 127])
        (dtype('uint8'), dtype('int8'))
    """
    if not all(float(value).is_integer() for value in values):
        return np.dtype(np.float32)
    low, high = int(min(values)), int(max(values))
    return np.min_scalar_type(high if low >= 0 else min(low, -high - 1))  # -128 is as far as 127


def snap_labels(label: npt.NDArray[Any], values: Iterable[float]) -> npt.NDArray[Any]:
    """The label map with every value within 1e-3 of one of `values` set to exactly that one.

    Float label files and files with a scaling hold 0.9999999 instead of 1. Other values stay as they are.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.datasets import snap_labels
        >>> snap_labels(np.array([0.0, 0.9999999, 0.5]), [0, 1]).tolist()
        [0.0, 1.0, 0.5]
    """
    declared = list(values)
    if label.dtype.kind != "f" or set(count_values(label)) <= set(declared):
        return label
    out = label.astype(np.float64)  # float32 cannot hold a declared 0.1
    for value in declared:
        out[np.abs(label - value) <= TOLERANCE] = value
    return out


def reorient(
    data: npt.NDArray[Any], affine: npt.NDArray[np.float64], like: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A volume (X, Y, Z, ...) and its affine with the axes in the order and direction of another affine.

    Every voxel stays at its place in space: axes are swapped and mirrored, nothing is interpolated. An affine
    that is not valid stays as it is.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.datasets import reorient
        >>> label, affine = reorient(np.zeros((2, 3, 4)), np.diag([-1.0, 1, 1, 1]), np.eye(4))
        >>> label.shape, affine[0].tolist()
        ((2, 3, 4), [1.0, 0.0, 0.0, -1.0])
    """
    if not np.isfinite(affine).all():
        return data, affine
    axes, wanted = (nibabel.orientations.io_orientation(one) for one in (affine, like))
    if np.isnan(axes).any() or np.isnan(wanted).any():  # an axis of length zero
        return data, affine
    change = nibabel.orientations.ornt_transform(axes, wanted)
    turned = nibabel.orientations.apply_orientation(data, change)
    return turned, affine @ nibabel.orientations.inv_ornt_aff(change, data.shape[:3])


def class_indices(
    label: npt.NDArray[Any], plan: Mapping[str, Any], source: str | Path = "label map"
) -> npt.NDArray[np.int16]:
    """Class indices of a label map: values of the files in, 0..C-1 and `IGNORE_INDEX` out, same shape.

    Raises:
        DataError: the label map holds a value that the plan does not declare.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.datasets import class_indices
        >>> plan = {"labels": {"background": 0, "tumour": 4}, "ignore_label": 255}
        >>> class_indices(np.array([0.0, 4.0, 255.0]), plan).tolist()
        [0, 1, -1]
    """
    values, indices = list(plan["labels"].values()), list(range(len(plan["labels"])))
    if plan.get("ignore_label") is not None:
        values, indices = [*values, plan["ignore_label"]], [*indices, IGNORE_INDEX]
    out = np.empty_like(label, dtype=np.int16)
    stray: set[float] = set()
    for part in slabs(label.shape[-1] if label.ndim else 0, label.size):
        out[..., part] = indexed = _indexed(label[..., part], values, indices)
        stray |= {float(value) for value in np.unique(label[..., part][indexed == STRAY])}
    if stray:
        few, declared = (", ".join(map(value_text, part)) for part in (sorted(stray)[:5], values))
        raise DataError(
            f"{source}: holds {few}, but the declared values are {declared}. Correct the label map or declare "
            "the value."
        )
    return out


def _indexed(label: npt.NDArray[Any], values: list[int | float], indices: list[int]) -> npt.NDArray[np.int16]:
    """Class indices, `STRAY` for a value that is not one of `values`; by a table if all are small integers."""
    whole = as_whole(label)
    if whole is None:
        out = np.full(label.shape, STRAY, dtype=np.int16)
        label = label.astype(np.float64)  # differences of unsigned integers are never below 0
        for value, index in zip(values, indices, strict=True):
            out[np.abs(label - value) <= TOLERANCE] = index
        return out
    low = int(whole.min())
    table = np.full(int(whole.max()) - low + 1, STRAY, dtype=np.int16)
    for value, index in zip(values, indices, strict=True):
        if float(value).is_integer() and 0 <= value - low < len(table):
            table[int(value) - low] = index
    return table[whole.astype(np.int64) - low]
