"""Data lists: the cases and paths of a dataset.json or MONAI datalist, and `datalist.json` of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import Case, Split
from medseg_supcon.errors import DataError, nearest
from medseg_supcon.files import read_json
from medseg_supcon.scans import NIFTI_ENDINGS, stem

SPLIT_SECTIONS = ("training", "validation", "unlabelled")
SECTIONS = (*SPLIT_SECTIONS, "unlabeled", "test")
CHANNEL_KEYS = ("channel_names", "modality")
DESCRIPTIONS = (  # of the decathlon, nnU-Net v1 and v2, and MONAI: nothing in a training depends on them
    "name", "description", "reference", "licence", "license", "release", "relase", "citation", "converted_by",
    "dataset_name", "tensorImageSize", "numTest", "numValidation", "overwrite_image_reader_writer", "regions_class_order",
)  # fmt: skip
KEYS = (
    *SECTIONS, *CHANNEL_KEYS, *DESCRIPTIONS, "labels", "ignore_label", "numTraining", "file_ending", "dataset"
)  # fmt: skip
PATIENT_KEYS = ("patient", "subject", "group")
NAME_KEYS = ("name", "case")
ITEM_KEYS = ("image", "label", "fold", *PATIENT_KEYS, *NAME_KEYS)
MISSPELT = 0.8  # similarity above which an unknown key is a known one with a slip

Item = dict[str, Any]
Listed = list[tuple[Case, Mapping[str, Any]]]


def check_keys(content: Mapping[str, Any], source: Path) -> list[str]:
    """Warnings on keys of a dataset.json that are not used; `DataError` if one is misspelt or would drop cases."""
    for key, value in content.items():
        if key not in KEYS and not key.lower().startswith("test") and (number := _count_cases(value)):
            raise DataError(
                f'{source}: {key!r} is a list of {number} cases, but lists of cases are called "training", '
                f'"validation", "unlabelled" or "test" (not used in training).{_hint(key, SECTIONS)} Rename it.'
            )
    keys = [key for key in content if not key.lower().startswith("test")]
    return _unknown(keys, KEYS, "the file", source)


def _count_cases(value: object) -> int:
    entries = value if isinstance(value, list) else []
    return sum("image" in one if isinstance(one, dict) else str(one).lower().endswith(NIFTI_ENDINGS) for one in entries)


def _unknown(keys: Collection[str], known: Sequence[str], where: str, source: Path) -> list[str]:
    warnings = []
    for key in keys:
        if key in known:
            continue
        near = nearest(key, known, MISSPELT)
        if near is not None and near not in (*keys, *DESCRIPTIONS):
            raise DataError(f"{source}: {where} has the unknown key {key!r}. Rename it to {near!r}.")
        warnings.append(f"{source}: {where} has the key {key!r}, which is not used.{_hint(key, known)}")
    return warnings


def _hint(key: str, known: Sequence[str]) -> str:
    near = nearest(key, known)
    return f" Did you mean {near!r}?" if near else ""


def inside(root: Path, text: object, source: Path) -> Path:
    r"""A path of a data list: absolute as it is, relative from `root` and never out of it; Windows' \ is accepted."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise DataError(f"{source}: a path must be a non-empty text, found {text!r}. Correct the data list.")
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        raise DataError(
            f"{source}: {text!r} is an absolute path of Windows, which does not exist here. Write paths relative to "
            f"the folder of the list, such as imagesTr/a.nii.gz."
        )
    base = os.path.normpath(Path(root).absolute())
    if "\\" in text and not os.path.exists(Path(base) / text):  # noqa: PTH110 - Path.exists raises for long names
        text = text.replace("\\", "/")
    path = Path(text)
    if path.is_absolute():
        return path
    full = os.path.normpath(Path(base) / path)
    if os.path.commonpath([base, full]) != base:
        raise DataError(
            f"{source}: the path {text!r} leaves the data folder {root}. Relative paths must stay inside it; "
            f"write an absolute path if you mean this file."
        )
    return Path(full)


def list_cases(
    entries: object, key: str, root: Path, source: Path, warnings: list[str], *, labelled: bool = True
) -> Listed:
    """The cases of one section of a data list with their items; `warnings` gets those on keys that are not used.

    An item is ``{"image": ..., "label": ...}`` or a path. The ``._`` twins that macOS makes are left out. `DataError`:
    the section is not a list, an item has no image, or one of its keys is misspelt.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DataError(f'{source}: "{key}" must be a list of items {{"image": path, "label": path}}.')
    items = [entry if isinstance(entry, Mapping) else {"image": entry} for entry in entries]
    kinds = dict.fromkeys(tuple(map(str, item)) for item in items)
    unused = [w for keys in kinds for w in _unknown(keys, ITEM_KEYS, f'an item of "{key}"', source)]
    warnings += dict.fromkeys(unused)
    listed: Listed = []
    for number, item in enumerate(items, 1):
        if not item.get("image"):
            raise DataError(f'{source}: item {number} of "{key}" has no "image". Give it the path of its scan.')
        images = tuple(inside(root, text, source) for text in _texts(item["image"]))
        if any(path.name.startswith("._") for path in images):
            continue
        label = _texts(item.get("label") if labelled else None)
        if len(label) != 1:
            what = f'item {number} of "{key}" has {len(label)} label files'
            raise DataError(f"{source}: {what}. Merge them into one label map with one value per class.")
        label_path = inside(root, label[0], source) if label[0] else None
        patient = next((str(item[k]) for k in PATIENT_KEYS if item.get(k) is not None), None)
        name = next((str(item[k]) for k in NAME_KEYS if item.get(k)), None)
        listed.append((Case(name or _case_name(images, label_path), images, label_path, patient), item))
    return listed


def _texts(image: Any) -> list[Any]:
    return list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]


def _case_name(images: tuple[Path, ...], label: Path | None) -> str:
    stems = [stem(path) for path in images]
    if label is not None and all(re.fullmatch(re.escape(stem(label)) + r"_\d{4}", name) for name in stems):
        return stem(label)
    if len(stems) == 1:
        return stems[0]
    equal = takewhile(lambda signs: len(set(signs)) == 1, zip(*stems, strict=False))
    common = "".join(signs[0] for signs in equal).rstrip("_-. ")
    common = re.sub(r"[_\-.](0+|t)$", "", common)  # a_0000, a_0001 and a_t1, a_t2 share too much
    return common if len(common) > 1 else images[0].parent.name


def validation_of_folds(listed: Listed, source: Path) -> frozenset[str]:
    """Names of the cases of fold 0, if items have a "fold" (the rule of MONAI's Auto3DSeg)."""
    folds = {case.name: str(item["fold"]) for case, item in listed if item.get("fold") is not None}
    chosen = frozenset(name for name, fold in folds.items() if fold in ("0", "0.0"))
    if folds and not 0 < len(chosen) < len(listed):
        raise DataError(
            f'{source}: fold 0 validates and the other folds train, but the values of "fold" are '
            f"{', '.join(sorted(set(folds.values())))}. Number the folds from 0, or remove the key."
        )
    return chosen


def write_datalist(split: Split, path: str | Path, dataset_dir: str | Path) -> None:
    """Write ``{"training": [item], "validation": [item], "unlabelled": [item]}``."""
    content = {section: items(getattr(split, section), dataset_dir) for section in SPLIT_SECTIONS}
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
    """The sections "training", "validation" and "unlabelled" of a run's `datalist.json`, paths as they are."""
    content = read_json(path, DataError)
    for section in SPLIT_SECTIONS:
        entries = content.get(section)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(
                f'{path}: "{section}" must be a list of items {{"name": text, "image": path, "label": path}}, found '
                f"{'nothing' if entries is None else type(entries).__name__}."
            )
    return {section: content[section] for section in SPLIT_SECTIONS}


def load_items(entries: Iterable[Mapping[str, Any]], dataset_dir: str | Path) -> list[Item]:
    """Items with the absolute paths that MONAI's loaders need; other keys stay as they are.

    Args:
        entries: a section of `datalist.json`.
        dataset_dir: folder that relative paths start from, and cannot leave.

    Raises:
        DataError: no item (MONAI would exit without a message), an item without image, or a path out of the folder.

    Example:
        >>> from medseg_supcon.datasets import load_items
        >>> load_items([{"name": "a", "image": "imagesTr/a.nii.gz"}], "/data")[0]["image"]
        '/data/imagesTr/a.nii.gz'
    """
    root, source = Path(dataset_dir).absolute(), Path("datalist.json")
    loaded = []
    for number, entry in enumerate(entries, 1):
        if not entry.get("image"):
            raise DataError(f'{source}: item {number} has no "image". Give it the path of its scan.')
        item = dict(entry)
        for key in ("image", "label"):
            if item.get(key):
                paths = [str(inside(root, text, source)) for text in _texts(item[key])]
                item[key] = paths[0] if len(paths) == 1 else paths
        loaded.append(item)
    if not loaded:
        raise DataError(f"{source}: a list of cases is empty (data folder {root}). Name at least one case in it.")
    return loaded
