"""Label values: the declared ones, those in the files, and the class index of each value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.scans import as_whole, count_values, in_parallel, read_nifti, slabs

Labels = dict[str, "int | float"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
TOLERANCE = 1e-3  # float label files carry rounding of the scaling: a value this close to a declared one is that one
LARGEST = 2**53  # beyond it float64 merges neighbouring whole numbers
MOST_VALUES = 64  # undeclared values above which a label map looks like a scan
STRAY = np.iinfo(np.int16).min


def check_name(name: object, source: Path, key: str) -> str:
    """The name of a class, channel or data set without blanks around it; `DataError` if it cannot be printed."""
    text = name.strip() if isinstance(name, str) else ""
    if not text or not text.isprintable():
        raise DataError(f'{source}: {name!a} under "{key}" is not a printable name. Correct it.')
    return text


def as_number(value: object) -> int | float | None:
    """A finite number, also as a text; None for anything else. A whole one is an int: it reads better in a file."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    if not np.isfinite(number):
        return None
    return int(number) if number.is_integer() else number


def parse_labels(declared: object, source: Path, ignore: object) -> tuple[Labels, int | float | None]:
    """Class name -> value, background first and then by value, and the ignore label ("ignore" is not a class).

    Takes the decathlon's ``{"0": "background", "1": "tumour"}`` and nnU-Net's ``{"background": 0, "tumour": 1}``.
    """
    if not isinstance(declared, Mapping):
        what = 'must map class names to values, such as {"background": 0, "tumour": 1}'
        raise DataError(f'{source}: "labels" {what}; found {type(declared).__name__}.')
    by_value = None not in map(as_number, declared) and None in map(as_number, declared.values())
    pairs: list[tuple[str, int | float]] = []
    for key, entry in declared.items():
        name, value = (entry, as_number(key)) if by_value else (key, as_number(entry))
        if value is None or abs(value) > LARGEST:
            raise DataError(f"{source}: label {key!r} must have a number up to 2^53 as its value, found {entry!r}.")
        pairs.append((check_name(name, source, "labels"), value))
    ignored = as_number(ignore)
    if ignore is not None and ignored is None:
        raise DataError(f'{source}: "ignore_label" must be a number, found {ignore!r}.')
    ignored = next((value for name, value in pairs if name.lower() == "ignore"), ignored)
    pairs = [(name, value) for name, value in pairs if name.lower() != "ignore" and value != ignored]
    for kind, entries in zip(("name", "value"), zip(*pairs, strict=True), strict=False):
        if twice := [entry for entry in entries if entries.count(entry) > 1]:
            raise DataError(f'{source}: "labels" uses the {kind} {twice[0]!r} twice. Give each class its own {kind}.')
    by_name = [pair for pair in pairs if pair[0].lower() == "background"]
    ground = [*by_name, *(pair for pair in pairs if pair[1] == 0), ("background", 0)][0]
    if ground[1] == ignored:
        raise DataError(f"{source}: the background and the ignore label are both {value_text(ground[1])}. Correct one.")
    rest = sorted((pair for pair in pairs if pair != ground), key=lambda pair: pair[1])
    if not rest:
        raise DataError(f'{source}: "labels" names no class other than the background. Declare at least one.')
    return dict([ground, *rest]), ignored


def value_text(value: float) -> str:
    """A label value for people: all digits of a whole number, four of any other."""
    return f"{value:.0f}" if value == round(value) else f"{value:.4g}"


def labels_in_files(files: Iterable[Path], source: Path) -> Labels:
    """Labels as the files show them: ``{"background": 0, "label 1": 1, ...}``; `check_dataset` reports unreadable files."""

    def read_values(path: Path) -> set[float]:
        try:
            return set(count_values(read_nifti(path).data))
        except DataError:
            return set()

    values = sorted(set().union(*in_parallel(read_values, files)))
    if len(values) > 256 or any(value != int(value) for value in values):
        found = f'declares no "labels", and the label files contain {len(values)} different values or fractions'
        raise DataError(f'{source}: {found}. Declare the classes: "labels": {{"background": 0, "tumour": 1}}.')
    if not any(values):
        raise DataError(f"{source}: the label files contain no value other than 0. Label at least one structure.")
    return {"background": 0, **{f"label {int(value)}": value for value in values if value != 0}}


def is_near(value: float, others: Iterable[float]) -> bool:
    """Whether a value counts as one of some others."""
    return any(abs(value - other) <= TOLERANCE for other in others)


def stray_values(path: Path, counts: Mapping[float, int], declared: Sequence[float]) -> tuple[str, str] | None:
    """Code and sentence on values of a label map (value -> voxels) that are not declared; None if there are none."""
    stray = [value for value in counts if not is_near(value, declared)]
    if not stray:
        return None
    fractional = [value for value in stray if value != round(value)]
    few = ", ".join(f"{value_text(value)} ({counts[value]} voxels)" for value in (fractional or stray)[:5])
    known = ", ".join(map(value_text, declared[:20])) + ", ..." * (len(declared) > 20)
    stored = nibabel.load(path).dataobj
    if len(stray) > MOST_VALUES:
        why = f"With {len(stray)} such values it is a scan (swapped in the list?) or was resampled with interpolation."
    elif (stored.slope, stored.inter) != (1, 0):
        scaling = f"scl_slope {stored.slope:.6g}, scl_inter {stored.inter:g}"
        why = f"Its header scales the stored values ({scaling}). Save whole class values, without scaling."
    elif fractional:
        why = "If it was resampled, use nearest neighbour; if these are probabilities, save class values."
    else:
        why = 'Correct the label map, or declare the value under "labels" in dataset.json.'
    code = "fractional_label" if fractional else "undeclared_label"
    return code, f"contains {few}, but the declared values are {known}. {why}"


def label_type(values: Collection[float]) -> np.dtype[Any]:
    """The smallest integer type that holds all values, or float32; the same as in the bundle's script."""
    if not all(float(value).is_integer() for value in values):
        return np.dtype(np.float32)
    low, high = int(min(values)), int(max(values))
    return np.min_scalar_type(high if low >= 0 else min(low, -high - 1))  # -128 is as far as 127


def snap_labels(label: Array, values: Iterable[float]) -> Array:
    """The label map, with values within 1e-3 of one of `values` set to exactly that one: a header's scaling rounds them."""
    declared = list(values)
    if label.dtype.kind != "f" or set(count_values(label)) <= set(declared):
        return label
    out = label.astype(np.float64)  # float32 cannot hold a declared 0.1
    for value in declared:
        out[np.abs(label - value) <= TOLERANCE] = value
    return out


def reorient(data: Array, affine: Floats, like: Floats) -> tuple[Array, Floats]:
    """A volume (X, Y, Z, ...) and its affine with the axes in the order and direction of another affine.

    Every voxel stays at its place in space: axes are swapped and mirrored, nothing is interpolated. An affine
    that is not valid stays as it is.
    """
    if not np.isfinite(affine).all():
        return data, affine
    axes, wanted = (nibabel.orientations.io_orientation(one) for one in (affine, like))
    if np.isnan(axes).any() or np.isnan(wanted).any():  # an axis of length zero
        return data, affine
    change = nibabel.orientations.ornt_transform(axes, wanted)
    turned = nibabel.orientations.apply_orientation(data, change)
    return turned, affine @ nibabel.orientations.inv_ornt_aff(change, data.shape[:3])


def class_indices(label: Array, plan: Mapping[str, Any], source: str | Path = "label map") -> npt.NDArray[np.int16]:
    """Class indices 0..C-1 and `IGNORE_INDEX` for the values of a label map; `DataError` if one is not declared."""
    index_of = {value: index for index, value in enumerate(plan["labels"].values())}
    if plan.get("ignore_label") is not None:
        index_of[plan["ignore_label"]] = IGNORE_INDEX
    out = np.empty_like(label, dtype=np.int16)
    stray: set[float] = set()
    for part in slabs(label.shape[-1] if label.ndim else 0, label.size):
        out[..., part] = indexed = _indexed(label[..., part], index_of)
        stray |= {float(value) for value in np.unique(label[..., part][indexed == STRAY])}
    if stray:
        few, declared = (", ".join(map(value_text, part)) for part in (sorted(stray)[:5], index_of))
        raise DataError(
            f"{source}: contains {few}, but the declared values are {declared}. Correct it or declare them."
        )
    return out


def _indexed(label: Array, index_of: Mapping[float, int]) -> npt.NDArray[np.int16]:
    """Class indices, `STRAY` for a value that has none; by a table if all are small integers."""
    whole = as_whole(label)
    if whole is None:
        out = np.full(label.shape, STRAY, dtype=np.int16)
        label = label.astype(np.float64)  # differences of unsigned integers are never below 0
        for value, index in index_of.items():
            out[np.abs(label - value) <= TOLERANCE] = index
        return out
    low = int(whole.min())
    table = np.full(int(whole.max()) - low + 1, STRAY, dtype=np.int16)
    for value, index in index_of.items():
        if float(value).is_integer() and 0 <= value - low < len(table):
            table[int(value) - low] = index
    return table[whole.astype(np.int64) - low]
