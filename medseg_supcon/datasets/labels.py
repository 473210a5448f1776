"""Label values: what a data set declares, what its files hold, and the class index of each value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import ConfigError, DataError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.scans import as_whole, count_values, in_parallel, read_nifti, slabs

Labels = dict[str, "int | float"]

# Values of float label files carry rounding of the scaling; a value this close to a declared one is that one.
TOLERANCE = 1e-3
STRAY = np.iinfo(np.int16).min


def plain(value: float) -> int | float:
    """An int where the number is whole: it reads better in a file."""
    return int(value) if float(value).is_integer() else float(value)


def parse_labels(declared: object, source: Path, ignore: object = None) -> tuple[Labels, int | float | None]:
    """Class name -> value, background first and then by value, and the ignore label.

    Takes the decathlon's ``{"0": "background", "1": "tumour"}`` and nnU-Net's ``{"background": 0, "tumour":
    1}``. A class called "ignore" is no class: its value means "not annotated".

    Raises:
        ConfigError: a label is a region, a list of values.
        DataError: the labels are not a mapping, ambiguous, or hold no class besides the background.
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
                f"{source}: label {key!r} is a region, the values {list(entry)}. Regions are not supported: "
                f"give every class one value of its own."
            )
        name, value = (str(entry), _number(key)) if by_value else (str(key), _number(entry))
        if value is None:
            raise DataError(f"{source}: label {key!r} must have a number as its value, found {entry!r}.")
        pairs.append((name.strip(), value))
    ignored = _number(ignore)
    if ignore is not None and ignored is None:
        raise DataError(f'{source}: "ignore_label" must be a number, found {ignore!r}.')
    for name, value in pairs:
        if name.lower() == "ignore":
            ignored = value
    pairs = [(name, value) for name, value in pairs if name.lower() != "ignore" and value != ignored]
    for what in (0, 1):
        seen = [pair[what] for pair in pairs]
        twice = next((entry for entry in seen if seen.count(entry) > 1), None)
        if twice is not None:
            kind = "name" if what == 0 else "value"
            raise DataError(
                f'{source}: "labels" uses the {kind} {twice!r} twice. Give each class its own {kind}.'
            )
    ground = next((pair for pair in pairs if pair[0].lower() == "background"), None)
    ground = ground or next((pair for pair in pairs if pair[1] == 0), None) or ("background", 0.0)
    rest = sorted((pair for pair in pairs if pair != ground), key=lambda pair: pair[1])
    if not rest:
        raise DataError(f'{source}: "labels" names no class besides the background. Declare at least one.')
    labels = {name: plain(value) for name, value in [ground, *rest]}
    return labels, None if ignored is None else plain(ignored)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def scan_labels(
    files: Iterable[Path], source: Path, ignore: object = None
) -> tuple[Labels, int | float | None]:
    """Labels as the label files themselves show them: ``{"background": 0, "label 1": 1, ...}``.

    Files that cannot be read are passed over; `check_dataset` reports them.

    Raises:
        DataError: no file holds a value besides the background, or there are too many to be a label map.
    """

    def values(path: Path) -> set[float]:
        try:
            data = read_nifti(path).data
        except DataError:
            return set()
        return set(count_values(data))

    found = sorted(set().union(*in_parallel(values, files)))
    if len(found) > 256 or any(value != int(value) for value in found):
        raise DataError(
            f'{source}: declares no "labels", and the label files hold {len(found)} different values, '
            f'perhaps fractions. Declare the classes: "labels": {{"background": 0, "tumour": 1}}.'
        )
    declared = {f"label {int(value)}": value for value in found if value != 0}
    if not declared:
        raise DataError(
            f"{source}: the label files hold no value besides 0. At least one structure must be drawn."
        )
    return parse_labels({"background": 0, **declared}, source, ignore)


def label_mapping(plan: Mapping[str, Any]) -> tuple[list[int | float], list[int]]:
    """Values of the label files and the class index of each, as `MapLabelValued` takes them.

    The ignore label becomes `losses.IGNORE_INDEX`. `MapLabelValued` lets any other value pass as it is; use
    `class_indices` where values that nobody declared must be refused.

    Example:
        >>> from medseg_supcon.datasets import label_mapping
        >>> label_mapping({"labels": {"background": 0, "tumour": 4}, "ignore_label": 255})
        ([0, 4, 255], [0, 1, -1])
    """
    values = list(plan["labels"].values())
    indices = list(range(len(values)))
    if plan.get("ignore_label") is not None:
        values.append(plan["ignore_label"])
        indices.append(IGNORE_INDEX)
    return values, indices


def label_type(values: Collection[float]) -> np.dtype[Any]:
    """The smallest integer type that holds all values; float32 where one is no integer. inference.yaml says the same.

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
    """The label map with every value within 1e-3 of one of `values` set to that very one.

    Float label files and files with a scaling hold 0.9999999 where 1 is meant. Other values stay as they are.

    Example:
        >>> import numpy as np
        >>> from medseg_supcon.datasets import snap_labels
        >>> snap_labels(np.array([0.0, 0.9999999, 0.5]), [0, 1]).tolist()
        [0.0, 1.0, 0.5]
    """
    declared = list(values)
    if label.dtype.kind != "f" or set(count_values(label)) <= set(declared):
        return label
    out = label.astype(np.float64)  # a declared 0.1 is no float32
    for value in declared:
        out[np.abs(label - value) <= TOLERANCE] = value
    return out


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
    values, indices = label_mapping(plan)
    out = np.empty_like(label, dtype=np.int16)
    found: set[float] = set()
    for part in slabs(label.shape[-1] if label.ndim else 0, label.size):
        out[..., part] = indexed = _indexed(label[..., part], values, indices)
        stray = indexed == STRAY
        if stray.any():
            found |= {float(value) for value in np.unique(label[..., part][stray])}
    if found:
        few = ", ".join(f"{value:g}" for value in sorted(found)[:5])
        raise DataError(
            f"{source}: holds {few}, but the declared values are "
            f"{', '.join(f'{value:g}' for value in values)}. Correct the label map or declare the value."
        )
    return out


def _indexed(label: npt.NDArray[Any], values: list[int | float], indices: list[int]) -> npt.NDArray[np.int16]:
    """Class indices, `STRAY` where a value is none of `values`; by a table where all values are integers."""
    whole = as_whole(label)
    if whole is None:
        out = np.full(label.shape, STRAY, dtype=np.int16)
        label = label.astype(np.float64)  # unsigned integers know no difference below 0
        for value, index in zip(values, indices, strict=True):
            out[np.abs(label - value) <= TOLERANCE] = index
        return out
    low = int(whole.min())
    table = np.full(int(whole.max()) - low + 1, STRAY, dtype=np.int16)
    for value, index in zip(values, indices, strict=True):
        if float(value).is_integer() and 0 <= value - low < len(table):
            table[int(value) - low] = index
    return table[whole.astype(np.int64) - low]
