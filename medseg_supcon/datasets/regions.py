"""Overlapping regions, such as the whole tumour and its core: sets of classes that a network predicts one by one.

A label map has one value per voxel, and its values are the classes. A region is a set of them, in nnU-Net v2's words
``"tumour": [1, 2]``, and regions may overlap. The network has one sigmoid output per region, and none for the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets.labels import as_number, check_name, value_text
from medseg_supcon.errors import ConfigError, DataError

Value = float | Sequence[float]  # of a class, or the values of a region
Array = npt.NDArray[Any]
THRESHOLD = 0.5  # a voxel is in a region if its probability is above this


def parse_regions(
    declared: object, source: Path, order: object
) -> tuple[object, dict[str, list[int | float]], list[int | float]]:
    """nnU-Net's regions: the labels with one value each that they are made of, the regions, and ``regions_class_order``.

    Without a list of several values among the labels there are no regions; a list of one value is that value. A class
    that is a region of its own has the region's name, any other ``label 1`` and so on. `DataError` for values that no
    region can have, `ConfigError` without the order.
    """
    if not isinstance(declared, Mapping) or not any(isinstance(entry, list) for entry in declared.values()):
        return declared, {}, []
    lists = {key: entry if isinstance(entry, list) else [entry] for key, entry in declared.items()}
    if all(len(entry) == 1 for entry in lists.values()):
        return {key: entry[0] for key, entry in lists.items()}, {}, []
    single: dict[str, int | float] = {}  # background and ignore label
    regions: dict[str, list[int | float]] = {}
    for key, entry in lists.items():
        name, values = check_name(key, source, "labels"), [as_number(value) for value in entry]
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            raise DataError(f"{source}: the region {name!r} must be a list of label values, found {entry!r}.")
        if name.lower() in ("background", "ignore") or known == [0]:
            single[name] = known[0]
        else:
            regions[name] = sorted(set(known))
    for name, held in regions.items():
        if odd := [other for other, value in ({"background": 0} | single).items() if value in held]:
            raise DataError(
                f"{source}: the region {name!r} contains the value of {odd[0]!r}. Remove that value from it."
            )
        if twins := [other for other in regions if other != name and regions[other] == held]:
            raise DataError(f"{source}: {name!r} and {twins[0]!r} are the same values {held}. Remove one of them.")
    atoms = sorted({value for values in regions.values() for value in values})
    names = {values[0]: name for name, values in regions.items() if len(values) == 1}
    classes = {names.get(value, f"label {value_text(value)}"): value for value in atoms}
    if len(classes) < len(atoms):
        raise DataError(f"{source}: a region is called like another label, such as 'label 1'. Rename it.")
    numbers = [as_number(value) for value in order] if isinstance(order, list) else []
    written = [value for value in numbers if value in atoms]
    if not len(written) == len(numbers) == len(regions):
        found = "it is missing" if order is None else f"found {order!r}"
        needed = f"one value per region ({', '.join(regions)}), each one of {', '.join(map(value_text, atoms))}"
        raise ConfigError(f'{source}: the labels are regions, so "regions_class_order" must have {needed}: {found}.')
    return single | classes, regions, [value for value in written if value is not None]


@dataclass(frozen=True)
class Regions:
    """R regions of C classes, the background first.

    Attributes:
        names: of the regions, in the order of the network's outputs.
        membership: (R, C) whether a region holds a class.
        written: per region the class index that its voxels get in a mask; a later region is written over earlier ones.

    Example:
        >>> plan = {"labels": {"background": 0, "rest": 1, "core": 2}, "regions": {"tumour": [1, 2], "core": [2]}}
        >>> regions = Regions.of(plan | {"regions_class_order": [1, 2]})
        >>> regions.masks(np.array([0, 1, 2, -1])).astype(int).tolist()
        [[0, 1, 1, 0], [0, 0, 1, 0]]
        >>> regions.paint(np.array([[0.1, 0.9, 0.9], [0.2, 0.4, 0.6]])).tolist()
        [0, 1, 2]
    """

    names: tuple[str, ...]
    membership: npt.NDArray[np.bool_]
    written: tuple[int, ...]

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Regions | None:
        """Those of a plan's ``regions`` and ``regions_class_order``; None if its classes exclude one another."""
        if not plan.get("regions"):
            return None
        values = list(plan["labels"].values())
        membership = np.array([[value in region for value in values] for region in plan["regions"].values()])
        return cls(tuple(plan["regions"]), membership, tuple(map(values.index, plan["regions_class_order"])))

    def masks(self, classes: Array) -> npt.NDArray[np.bool_]:
        """(R, ...) masks of class indices (...); an index that no class has, such as -1, is in no region."""
        known = (classes >= 0) & (classes < self.membership.shape[1])
        return np.stack([region[np.where(known, classes, 0)] & known for region in self.membership])

    def paint(self, probabilities: Iterable[Array]) -> npt.NDArray[np.int16]:
        """Class indices (...) of R probabilities (...)."""
        planes = [np.asarray(plane) > THRESHOLD for plane in probabilities]
        classes = np.zeros(planes[0].shape, dtype=np.int16)
        for plane, index in zip(planes, self.written, strict=True):
            classes[plane] = index
        return classes

    def without(self, region: int) -> npt.NDArray[np.int16]:
        """(C,) the class that a voxel of each class gets if it leaves a region, and with it the regions inside that one.

        The background, if the class that is written then still belongs to the region.
        """
        inside = ~(self.membership & ~self.membership[region]).any(axis=1)
        left = self.paint((self.membership & ~inside[:, None]).astype(float))
        return np.where(self.membership[region][left], 0, left).astype(np.int16)

    def lost(self) -> dict[int, int]:
        """Class index -> the class that it is written as, for classes whose regions a mask cannot give back."""
        painted = self.paint(self.membership.astype(float)).tolist()
        columns = self.membership.T
        return {c: other for c, other in enumerate(painted) if not np.array_equal(columns[c], columns[other])}


def mask_labels(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of a plan's masks mean, as nnU-Net's dataset.json says it: the background, then class or region.

    >>> mask_labels({"labels": {"background": 0, "organ": 1}})
    {'background': 0, 'organ': 1}
    >>> plan = {"labels": {"background": 0, "rest": 1, "core": 2}, "regions": {"tumour": [1, 2], "core": [2]}}
    >>> mask_labels(plan)
    {'background': 0, 'tumour': [1, 2], 'core': [2]}
    """
    if not plan.get("regions"):
        return dict(plan["labels"])
    background = next(iter(plan["labels"].items()))
    return dict([background]) | {name: list(values) for name, values in plan["regions"].items()}


def target_names(plan: Mapping[str, Any]) -> list[str]:
    """What is segmented, scored and rated: the names of the foreground classes, or of the regions."""
    return list(mask_labels(plan))[1:]


def output_channels(plan: Mapping[str, Any]) -> int:
    """Outputs of the plan's network: one for each class, background included, or one for each region."""
    return len(plan.get("regions") or plan["labels"])


def values_in(labels: Mapping[str, Value]) -> list[float]:
    """The values of `mask_labels`, each once, the background's first."""
    return list(dict.fromkeys(value for entry in labels.values() for value in values_of(entry)))


def values_of(entry: Value) -> list[float]:
    """The value of a class, or the values of a region, as a list."""
    return list(entry) if isinstance(entry, Sequence) else [entry]


def is_in(mask: Array, entry: Value) -> npt.NDArray[np.bool_]:
    """Which voxels of a mask (...) of label values belong to a class or region of `mask_labels`."""
    values = values_of(entry)
    return np.asarray(mask == values[0]) if len(values) == 1 else np.isin(mask, values)
