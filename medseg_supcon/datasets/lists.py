"""Data lists: the decathlon's dataset.json and MONAI's datalist JSON, and the paths that they name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import Case
from medseg_supcon.errors import DataError
from medseg_supcon.scans import stem

PATIENT_KEYS = ("patient", "subject", "group")
NAME_KEYS = ("name", "case")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: missing, not text, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not valid JSON ({error.msg}, line {error.lineno}). Correct that line: often a "
            f"comma is missing or one too many."
        ) from None
    except RecursionError:
        raise DataError(f"{path}: is not a data list (nested too deeply).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Give a JSON file in UTF-8.") from None
    if not isinstance(content, dict):
        raise DataError(
            f'{path}: must hold a JSON object with a "training" list, found {type(content).__name__}.'
        )
    return content


def is_hidden(path: str | Path) -> bool:
    """Whether a file is hidden, as the ``._scan.nii.gz`` twins that macOS writes are."""
    return Path(path).name.startswith(".")


def inside(root: Path, text: object, source: Path) -> Path:
    """A path of a data list: absolute as it stands, relative from `root` and never out of it.

    Raises:
        DataError: not a path, or a relative path that leaves `root`.
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise DataError(f"{source}: a path must be a non-empty text, found {text!r}. Correct the data list.")
    path = Path(text)
    if path.is_absolute():
        return path
    base = os.path.normpath(Path(root).absolute())
    full = os.path.normpath(Path(base) / path)
    if os.path.commonpath([base, full]) != base:
        raise DataError(
            f"{source}: the path {text!r} leaves the data folder {root}. Relative paths must stay inside it; "
            f"write an absolute path if you mean this file."
        )
    return Path(full)


def list_cases(items: object, key: str, root: Path, source: Path, *, labelled: bool = True) -> list[Case]:
    """The cases of one section of a data list; an item is ``{"image": ..., "label": ...}`` or a path.

    Raises:
        DataError: the section is not a list, or an item has no image.
    """
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise DataError(f'{source}: "{key}" must be a list of items {{"image": path, "label": path}}.')
    cases = []
    for number, entry in enumerate(items, 1):
        item: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"image": entry}
        image = item.get("image")
        if not image:
            raise DataError(
                f'{source}: item {number} of "{key}" names no "image". Give it the path of its scan.'
            )
        images = tuple(inside(root, text, source) for text in _texts(image))
        if any(is_hidden(path) for path in images):
            continue
        label = item.get("label") if labelled else None
        if isinstance(label, Sequence) and not isinstance(label, str):
            if len(label) != 1:
                raise DataError(
                    f'{source}: item {number} of "{key}" has {len(label)} label files. '
                    f"Merge them into one label map with one value per class."
                )
            label = label[0]
        label_path = inside(root, label, source) if label else None
        patient = next((str(item[k]) for k in PATIENT_KEYS if item.get(k) is not None), None)
        given = next((str(item[k]) for k in NAME_KEYS if item.get(k)), None)
        cases.append(Case(given or _case_name(images, label_path), images, label_path, patient))
    return cases


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


def validation_of_folds(items: Sequence[Any], cases: Sequence[Case]) -> frozenset[str]:
    """Names of the cases of fold 0, where a MONAI data list gives items a "fold" (Auto3DSeg's rule)."""
    folds = {
        stem_name: item.get("fold") for stem_name, item in _named(items, cases) if isinstance(item, Mapping)
    }
    if len({fold for fold in folds.values() if fold is not None}) < 2:
        return frozenset()
    return frozenset(name for name, fold in folds.items() if fold in (0, "0"))


def _named(items: Sequence[Any], cases: Sequence[Case]) -> list[tuple[str, Any]]:
    """The case's name beside the item that it was made of: `list_cases` makes none of hidden files."""
    images = ((item, item["image"] if isinstance(item, Mapping) else item) for item in items)
    seen = (item for item, image in images if not any(is_hidden(text) for text in _texts(image)))
    return [(case.name, item) for case, item in zip(cases, seen, strict=True)]


def without_twins(cases: Sequence[Case], source: Path) -> tuple[Case, ...]:
    """The cases, if no two of them share a name and every name can be a file's.

    Raises:
        DataError: two cases have one name (their masks could not be told apart), or a name holds a slash.
    """
    seen: dict[str, Case] = {}
    for case in cases:
        if not re.fullmatch(r"[^./\\\0\n][^/\\\0\n]*", case.name):
            raise DataError(
                f"{source}: the case name {case.name!r} cannot be a file name. Use letters, digits, - and _."
            )
        if case.name in seen:
            first = seen[case.name].images[0]
            raise DataError(
                f"{source}: two cases are called {case.name!r} ({first} and {case.images[0]}). "
                f'Rename a file, remove the double item, or give the items a "name".'
            )
        seen[case.name] = case
    return tuple(cases)


def read_patients(root: Path) -> dict[str, str]:
    """Case name -> patient from ``patients.json`` in the data folder; empty where there is none."""
    path = root / "patients.json"
    if not path.is_file():
        return {}
    return {str(case): str(patient) for case, patient in read_json(path).items()}
