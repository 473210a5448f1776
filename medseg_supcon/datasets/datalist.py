"""`datalist.json`: the cases of a run as MONAI items, on disk and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import Case
from medseg_supcon.datasets.lists import inside
from medseg_supcon.datasets.split import Split
from medseg_supcon.errors import DataError

Item = dict[str, Any]


def items(cases: Iterable[Case], dataset_dir: str | Path) -> list[Item]:
    """Cases as ``{"name": str, "image": path or list of paths, "label": path}``, a label where there is one.

    Paths are relative to `dataset_dir` (with "/") where they lie inside it, absolute otherwise.
    """
    root = Path(dataset_dir).absolute()

    def text(path: Path) -> str:
        full = path.absolute()
        return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(full)

    found = []
    for case in cases:
        images = [text(path) for path in case.images]
        item: Item = {"name": case.name, "image": images[0] if len(images) == 1 else images}
        if case.label is not None:
            item["label"] = text(case.label)
        found.append(item)
    return found


def write_datalist(split: Split, path: str | Path, dataset_dir: str | Path) -> None:
    """Write ``{"training": [item], "validation": [item], "unlabelled": [item]}``."""
    content = {
        "training": items(split.training, dataset_dir),
        "validation": items(split.validation, dataset_dir),
        "unlabelled": items(split.unlabelled, dataset_dir),
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_items(entries: Iterable[Mapping[str, Any]], dataset_dir: str | Path) -> list[Item]:
    """Items with the absolute paths that MONAI's loaders need; other keys stay as they are.

    Args:
        entries: a section of `datalist.json`.
        dataset_dir: folder that relative paths start from, and cannot leave.

    Raises:
        DataError: no item (MONAI would exit without a word), an item without image, or a path out of the
            folder.

    Example:
        >>> from medseg_supcon.datasets import load_items
        >>> load_items([{"name": "a", "image": "imagesTr/a.nii.gz"}], "/data")[0]["image"]
        '/data/imagesTr/a.nii.gz'
    """
    root, source = Path(dataset_dir).absolute(), Path("datalist.json")
    found = []
    for number, entry in enumerate(entries, 1):
        image = entry.get("image")
        if not image:
            raise DataError(f'{source}: item {number} has no "image". Give it the path of its scan.')
        item = dict(entry)
        item["image"] = _full(image, root, source)
        if entry.get("label"):
            item["label"] = _full(entry["label"], root, source)
        found.append(item)
    if not found:
        raise DataError(
            f"{source}: a list of cases is empty (data folder {root}). Name at least one case in it."
        )
    return found


def _full(value: Any, root: Path, source: Path) -> str | list[str]:
    if isinstance(value, list | tuple):
        paths = [str(inside(root, text, source)) for text in value]
        return paths[0] if len(paths) == 1 else paths
    return str(inside(root, value, source))
