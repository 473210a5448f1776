"""Folds: splits of a data set, in which every labelled case is held out once; drawn by a seed, or declared by its files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import (
    Case,
    Dataset,
    Folds,
    Split,
    all_others,
    group_of,
    label_budget,
    seeded_order,
)
from medseg_supcon.datasets.labels import as_number
from medseg_supcon.errors import DataError, nearest
from medseg_supcon.text import counted

SPLITS = "splits_final.json"  # nnU-Net's file
PREPROCESSED = "nnUNet_preprocessed"  # nnU-Net's folder of it, beside that of the raw data sets
Names = frozenset[str]


def split_folds(dataset: Dataset, number: int, *, labels: int | None = None, seed: int = 0) -> tuple[Split, ...]:
    """`number` splits of a data set by patients; each labelled case is in the validation part of one of them.

    If the data set declares folds (`Dataset.folds`), these are the splits. Otherwise the patients, in the order of
    the seed and those with most scans first, each go to the fold that has fewest cases. `labels`: a budget, whose cases
    are those of `split_cases`. Cases that a split does not use are unlabelled in it.

    Raises:
        DataError: there are fewer patients than folds, or the declared folds are of another number, leave out or repeat
            a labelled case, or separate scans of a patient.

    Example:
        >>> cases = tuple(Case(f"c{n}", (Path(f"{n}.nii"),), Path(f"l{n}.nii"), patient=str(n // 2)) for n in range(6))
        >>> data = Dataset(Path(), "toy", cases, ("MRI",), {"background": 0, "organ": 1})
        >>> [sorted(case.name for case in split.validation) for split in split_folds(data, 3)]
        [['c4', 'c5'], ['c0', 'c1'], ['c2', 'c3']]
    """
    if number < 2:
        raise ValueError(f"number must be at least 2, got {number}")
    chosen = seeded_order(dataset, seed)[: label_budget(dataset, labels)]
    warnings = list[str]()
    if dataset.folds is None:
        parts = _drawn(dataset, chosen, number)
        if dataset.validation:
            what = "the data list says which cases are for validation. With folds, every labelled case is held out once"
            warnings.append(f"{dataset.root}: {what}.")
    else:
        parts = _declared(dataset, dataset.folds, chosen, number)
        held_out = frozenset[str]().union(*(validation for _, validation in parts))
        if never := [case.name for case in chosen if case.name not in held_out]:
            what = f"{counted(len(never), 'case')} (such as {never[0]!r}) of no fold's validation part"
            warnings.append(f"{dataset.folds.source} has {what}: no score is made of them.")
    splits = []
    for training, validation in parts:
        trained, held = (tuple(case for case in chosen if case.name in names) for names in (training, validation))
        splits.append(Split(trained, held, all_others(dataset, trained, held), tuple(warnings)))
    return tuple(splits)


def _drawn(dataset: Dataset, chosen: Sequence[Case], number: int) -> list[tuple[Names, Names]]:
    patients: dict[str, list[str]] = {}
    for case in chosen:
        patients.setdefault(group_of(case), []).append(case.name)
    if len(patients) < number:
        found = f"{number} folds were asked for, but there are {counted(len(patients), 'labelled patient')}"
        raise DataError(f"{dataset.root}: {found}. Ask for at most {len(patients)} folds.")
    held_out: list[list[str]] = [[] for _ in range(number)]
    for names in sorted(patients.values(), key=len, reverse=True):
        min(held_out, key=len).extend(names)
    every = frozenset(case.name for case in chosen)
    return [(every - set(names), frozenset(names)) for names in held_out]


def _declared(dataset: Dataset, folds: Folds, chosen: Sequence[Case], number: int) -> list[tuple[Names, Names]]:
    source, every = folds.source, frozenset(case.name for case in chosen)
    if len(folds.parts) != number:
        found = f"has {len(folds.parts)} folds, but {number} were asked for"
        raise DataError(f"{source} {found}. Ask for {len(folds.parts)}, or remove it.")
    parts = [(training & every, validation & every) for training, validation in folds.parts]
    listed = frozenset[str]().union(*(names for part in parts for names in part))
    if missing := [case.name for case in chosen if case.name not in listed]:
        what = f"{counted(len(missing), 'labelled case')} (such as {missing[0]!r}) in no fold"
        raise DataError(f"{source} has {what}. Give every labelled case a fold, or leave the case out with --cases.")
    seen = set[str]()
    patients = {case.name: group_of(case) for case in chosen}
    for index, (training, validation) in enumerate(parts):
        if not training or not validation:
            side = "validation" if training else "training"
            raise DataError(f"{source}: fold {index} has no labelled case for {side}. Add one, or use fewer folds.")
        if twice := sorted(validation & (seen | training)):
            where = "in its training part, too" if twice[0] in training else "in that of another fold"
            found = f"{twice[0]!r} is in the validation part of fold {index} and {where}"
            raise DataError(f"{source}: {found}. Each case is held out once.")
        both = {patients[name] for name in training} & {patients[name] for name in validation}
        if both:
            name = min(both).removeprefix("patient ")
            found = f"patient {name!r} is used both for training and for validation in fold {index}"
            raise DataError(f"{source}: {found}. Keep a patient's scans on one side.")
        seen |= validation
    return parts


def folds_of_key(values: Mapping[str, object], source: Path) -> Folds:
    """The folds that the ``fold`` of each item makes: case name -> its value; fold 0 comes first."""
    order = {str(value): as_number(value) for value in values.values()}
    folds = sorted(order, key=lambda text: (order[text] is None, order[text] or 0, text))
    held_out = [frozenset(name for name, value in values.items() if str(value) == fold) for fold in folds]
    return Folds(f'{source}: "fold"', tuple((frozenset(values) - names, names) for names in held_out))


def splits_file(root: Path) -> Path | None:
    """nnU-Net's ``splits_final.json`` of a raw data set: in its folder, or in its preprocessed one; None: neither."""
    folder = root.resolve()
    places = folder, folder.parent.parent / PREPROCESSED / folder.name
    return next((place / SPLITS for place in places if (place / SPLITS).is_file()), None)


def read_splits(file: Path, cases: Collection[str]) -> Folds:
    """nnU-Net's splits: a list of ``{"train": names, "val": names}``; `DataError` for another content or unknown names."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not a readable JSON file ({error}). Correct or remove it.") from None
    parts = []
    for index, split in enumerate(content if isinstance(content, list) else ()):
        sides = [split.get(key) if isinstance(split, dict) else None for key in ("train", "val")]
        if not all(isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides):
            what = 'must be {"train": [case names], "val": [case names]}'
            raise DataError(f"{file}: entry {index} {what}. Correct or remove the file.")
        names = [name for side in sides for name in side or ()]
        if unknown := next((name for name in names if name not in cases), None):
            near = nearest(unknown, cases)
            hint = f"Did you mean {near!r}?" if near else "Correct or remove the file."
            raise DataError(f"{file}: no case is called {unknown!r} (entry {index}). {hint}")
        parts.append((frozenset(sides[0] or ()), frozenset(sides[1] or ())))
    if not parts:
        what = 'must be a list of splits, each {"train": [case names], "val": [case names]}'
        raise DataError(f"{file}: {what}. Correct or remove the file.")
    return Folds(str(file), tuple(parts))
