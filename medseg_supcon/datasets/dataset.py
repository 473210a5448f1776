"""A data set, its split into training, validation and unlabelled cases, and the `datalist.json` of a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg_supcon.errors import DataError, nearest
from medseg_supcon.files import read_json

CT_WORDS = {"ct", "cta", "cect", "ncct", "ldct", "hrct"}
VALIDATION = 0.15  # share of the labelled cases
MOST_VALIDATION = 20
BY_NAME = ("nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")  # nnU-Net's channel names for a normalisation
SECTIONS = ("training", "validation", "unlabelled")  # of datalist.json

Item = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One scan and, if there is one, its label map."""

    name: str  # unique in the data set; the file name without extension and channel suffix
    images: tuple[Path, ...]  # one NIfTI file (3-D, or 4-D with the channels last), or one 3-D file per channel
    label: Path | None = None  # 3-D, on the grid of the scan
    patient: str | None = None  # a split never separates scans of one patient; None: a patient of its own


@dataclass(frozen=True)
class Folds:
    """The folds that the files of a data set declare."""

    source: str  # the file and key, for messages
    parts: tuple[tuple[frozenset[str], frozenset[str]], ...]  # of each fold, the names for training and for validation


@dataclass(frozen=True)
class Dataset:
    """The cases of a data set and what their files mean."""

    root: Path  # folder that relative paths of the data set start from
    name: str  # for reports and the model card
    cases: tuple[Case, ...]  # in the order of the data list (or by name if there is no list)
    channels: tuple[str, ...]  # names in file order, e.g. ("T1", "FLAIR")
    labels: dict[str, int | float] = field(hash=False)  # class -> value in the files, in class order, background first
    ignore_label: int | float | None = None  # value in the label files that means "not annotated"
    validation: frozenset[str] = frozenset()  # names of the cases that are for validation, if the data set says so
    warnings: tuple[str, ...] = ()  # sentences on what its files say and reading did not use
    folds: Folds | None = None  # None: its files declare none
    # overlapping sets of labels: name -> values; and the value with which each is written into a mask
    regions: dict[str, list[int | float]] = field(default_factory=dict, hash=False)
    regions_class_order: tuple[int | float, ...] = ()

    @property
    def label_plan(self) -> dict[str, Any]:
        """The keys of a plan that say what the values of label maps mean."""
        plan: dict[str, Any] = {"labels": dict(self.labels), "ignore_label": self.ignore_label}
        if self.regions:
            plan |= {"regions": self.regions, "regions_class_order": list(self.regions_class_order)}
        return plan

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label map."""
        return tuple(case for case in self.cases if case.label is not None)

    def select(self, names: Iterable[str]) -> Dataset:
        """The data set with the named cases only, in its own order; `DataError` for unknown names, or for none."""
        chosen, known = dict.fromkeys(names), {case.name for case in self.cases}
        if unknown := [name for name in chosen if name not in known]:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            cure = f"Give file names without extension, such as {nearest(unknown[0], known) or min(known)!r}."
            raise DataError(f"{self.root}: no case is called {unknown[0]!r}{more}. {cure}")
        if not chosen:
            raise DataError(f"{self.root}: the list of cases to use is empty. Name at least one case.")
        cases = tuple(case for case in self.cases if case.name in chosen)
        return replace(self, cases=cases, validation=self.validation & set(chosen))


def normalisation(channel: str) -> str:
    """How a channel of this name is normalised: "ct", or one of nnU-Net's names in `BY_NAME`."""
    name = channel.strip().lower()
    words = set(re.split(r"[^a-z]+", name))
    if (words & CT_WORDS or "computed tomography" in name) and not words & {"pet", "mr", "mri"}:
        return "ct"
    letters = re.sub(r"[^a-z0-9]", "", name)
    return next((known for known in BY_NAME if known.replace("_", "") == letters), "zscore")


def read_case_names(file: str | Path) -> list[str]:
    """Case names from a text file, one per line, without comments (``#`` at the start or after a blank)."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a readable UTF-8 text file ({error}). Write one case name per line.") from None
    names = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in text.splitlines()]
    if not any(names):
        raise DataError(f"{path}: contains no case name. Write one case name per line.")
    return list(dict.fromkeys(filter(None, names)))


@dataclass(frozen=True)
class Split:
    """The cases of one training run."""

    training: tuple[Case, ...]  # labelled, in the seeded order
    validation: tuple[Case, ...]  # labelled, to choose the best weights on
    unlabelled: tuple[Case, ...] = ()  # all others, without their label maps
    warnings: tuple[str, ...] = ()  # for the person who trains, for instance that no case is held out


def split_cases(
    dataset: Dataset, *, labels: int | None = None, seed: int = 0, validation_fraction: float = VALIDATION
) -> Split:
    """Split a data set by patients, for a budget of `labels` labelled cases, validation included.

    The order of the labelled cases depends only on the seed and their names. A budget of N takes the first N. Cases are
    assigned to training or validation along that order, so a case is on the same side in every larger budget. About
    ``max(1, min(20, round(validation_fraction * N)))`` cases are for validation, more if a patient has many scans. If the
    data list names validation cases, only these are used for validation (`DataError` if that separates scans of a
    patient), and without a budget all of them. With a fraction of 0, all cases of the budget are used for training, and
    the first 20 also for validation.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    ordered = seeded_order(dataset, seed)
    total = label_budget(dataset, labels)

    def wanted(count: int) -> int:  # grows by at most one as `count` does, so budgets are nested
        return max(1, min(MOST_VALIDATION, round(validation_fraction * count), count - 1))

    own = [case for case in ordered if case.name in dataset.validation]
    training, validation = ordered[:total], list[Case]()
    if validation_fraction > 0 and 0 < len(own) < len(ordered):
        if (mixed := patient_on_both_sides(dataset)) is not None:
            raise DataError(mixed)
        others = [case for case in ordered if case.name not in dataset.validation]
        share = min(wanted(total), len(own)) if total > 1 else 0
        number = len(own) if labels is None else max(share, total - len(others))
        training, validation = others[: total - number], own[:number]
    elif validation_fraction > 0:
        training, sides = [], dict[str, list[Case]]()
        for count, case in enumerate(ordered[:total], 1):
            due = bool(training) and len(validation) < wanted(count)
            sides.setdefault(group_of(case), validation if due else training).append(case)
    warnings = []
    if not validation or not training:
        training = training or validation
        validation = training if validation_fraction > 0 else training[:MOST_VALIDATION]
        why = (
            "no other labelled patient is left"
            if validation_fraction > 0
            else "all labelled cases are used for training"
        )
        names = ", ".join(case.name for case in training[:3]) + ", ..." * (len(training) > 3)
        warnings.append(f"Validation uses the training cases ({names}): {why}. Its scores say nothing about new scans.")
    return Split(tuple(training), tuple(validation), all_others(dataset, training, validation), tuple(warnings))


def seeded_order(dataset: Dataset, seed: int) -> list[Case]:
    """The labelled cases in an order that depends on the seed and their names; a patient's are next to each other."""

    def draw(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{text}".encode()).digest()

    return sorted(dataset.labelled, key=lambda c: (draw(group_of(c)), group_of(c), draw(f"case {c.name}")))


def label_budget(dataset: Dataset, labels: int | None) -> int:
    """How many labelled cases are used; `DataError` if there are not as many."""
    most = len(dataset.labelled)
    if not most:
        raise DataError(f"{dataset.root}: no case has a label map. Training needs at least one.")
    if labels is not None and not 1 <= labels <= most:
        found = f"{labels} labelled cases were asked for, but it has {most}"
        raise DataError(f"{dataset.root}: {found}. Ask for at least 1 and at most {most}.")
    return most if labels is None else labels


def all_others(dataset: Dataset, training: Iterable[Case], validation: Iterable[Case]) -> tuple[Case, ...]:
    """The cases that are in neither part, without their label maps."""
    used = {case.name for case in (*training, *validation)}
    return tuple(replace(case, label=None) for case in dataset.cases if case.name not in used)


def group_of(case: Case) -> str:
    """What a split keeps together: the patient, or the case if its patient is not known."""
    return f"case {case.name}" if case.patient is None else f"patient {case.patient}"


def patient_on_both_sides(dataset: Dataset) -> str | None:
    """A sentence on a patient with labelled scans on both sides of the data list's split; None if there is none."""
    sides = [
        {group_of(c) for c in dataset.labelled if (c.name in dataset.validation) == side} for side in (False, True)
    ]
    if not (both := sides[0] & sides[1]):
        return None
    found = (
        f"patient {min(both).removeprefix('patient ')!r} is used both for training and for validation in the data list"
    )
    return f"{dataset.root}: {found}. Keep a patient's scans on one side."


def write_datalist(split: Split, path: str | Path, dataset_dir: str | Path) -> None:
    """Write ``{"training": [item], "validation": [item], "unlabelled": [item]}``."""
    content = {section: items(getattr(split, section), dataset_dir) for section in SECTIONS}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def items(cases: Iterable[Case], dataset_dir: str | Path) -> list[Item]:
    """Cases as ``{"name": str, "image": path or list of paths, "label": path}``; no label for unlabelled cases.

    Paths are relative to `dataset_dir` (with "/") if they are inside it, absolute otherwise.
    """
    root = Path(dataset_dir).absolute()

    def text(path: Path) -> str:
        full = path.absolute()
        return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(full)

    entries = []
    for case in cases:
        images = [text(path) for path in case.images]
        label = {} if case.label is None else {"label": text(case.label)}
        entries.append({"name": case.name, "image": images[0] if len(images) == 1 else images, **label})
    return entries


def read_datalist(path: Path) -> dict[str, list[Item]]:
    """The sections of a run's `datalist.json`, paths as they are."""
    content = read_json(path, DataError)
    for section in SECTIONS:
        entries = content.get(section)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            what = 'must be a list of items {"name": text, "image": path, "label": path}'
            raise DataError(f'{path}: "{section}" {what}. Correct it, or plan the run again.')
    return {section: content[section] for section in SECTIONS}


def load_items(entries: Iterable[Mapping[str, Any]], dataset_dir: str | Path) -> list[Item]:
    """Items of `datalist.json` with the absolute paths that MONAI's loaders need; other keys stay as they are.

    `DataError`: no item (MONAI would exit without a message), an item without image, a path out of `dataset_dir`.
    """
    root, source = Path(dataset_dir).absolute(), Path("datalist.json")
    loaded = []
    for number, entry in enumerate(entries, 1):
        if not entry.get("image"):
            raise DataError(f'{source}: item {number} has no "image". Give it the path of its scan.')
        item = dict(entry)
        for key in ("image", "label"):
            if item.get(key):
                paths = [str(inside(root, text, source)) for text in texts(item[key])]
                item[key] = paths[0] if len(paths) == 1 else paths
        loaded.append(item)
    if not loaded:
        raise DataError(f"{source}: a list of cases is empty (data folder {root}). Name at least one case in it.")
    return loaded


def texts(paths: Any) -> list[Any]:
    """One path of a data list, or several, as a list."""
    return list(paths) if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]


def inside(root: Path, text: object, source: Path) -> Path:
    r"""A path of a data list: absolute as it is, relative from `root` and never out of it; Windows' \ is accepted."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise DataError(f"{source}: a path must be a non-empty string, found {text!r}. Correct the data list.")
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        cure = "Write paths relative to the list's folder."
        raise DataError(f"{source}: {text!r} is an absolute Windows path. {cure}")
    base = os.path.normpath(root.absolute())
    if "\\" in text and not os.path.exists(Path(base) / text):  # noqa: PTH110 - Path.exists raises for long names
        text = text.replace("\\", "/")
    if Path(text).is_absolute():
        return Path(text)
    full = os.path.normpath(Path(base) / text)
    if os.path.commonpath([base, full]) != base:
        cure = "Write an absolute path if you mean this file."
        raise DataError(f"{source}: the path {text!r} leaves the data folder {root}. {cure}")
    return Path(full)
