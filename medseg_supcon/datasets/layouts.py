"""Finding the cases of a data set in any of the layouts that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import Case, Dataset
from medseg_supcon.datasets.labels import parse_labels, scan_labels
from medseg_supcon.datasets.lists import (
    is_hidden,
    list_cases,
    read_json,
    read_patients,
    validation_of_folds,
    without_twins,
)
from medseg_supcon.errors import DataError
from medseg_supcon.scans import NIFTI_ENDINGS, read_header, stem

LAYOUTS = (
    "a folder with dataset.json, imagesTr and labelsTr (Medical Segmentation Decathlon or nnU-Net v2), a "
    "folder with images and labels, or a MONAI datalist JSON"
)


def read_dataset(path: str | Path) -> Dataset:
    """The data set in a folder or data list. Voxels are not read, unless no labels are declared.

    Layouts: the decathlon's folder (``dataset.json`` with a ``training`` list), nnU-Net v2's raw folder
        (``imagesTr/case_0000.nii.gz``), a MONAI datalist JSON, or a folder with ``imagesTr`` and ``labelsTr``
        (or ``images`` and ``labels``) alone. Items may carry a ``patient``; so may ``patients.json`` beside
        the list. Items with a ``fold``: fold 0 is the validation, as in MONAI's Auto3DSeg. The ``test``
        section is left out.

    Args:
        path: a folder or a JSON file. Relative paths of a list start from its folder and cannot leave it.

    Raises:
        DataError: nothing there, no case, no label map, a broken list, two cases of one name.
        ConfigError: labels are nnU-Net regions.

    Example:
        >>> import tempfile
        >>> from medseg_supcon.datasets import make_phantoms, read_dataset
        >>> dataset = read_dataset(make_phantoms(tempfile.mkdtemp() + "/phantoms", cases=2, unseen=0))
        >>> len(dataset.cases), dataset.channels
        (2, ('MRI',))
    """
    path = Path(path)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a name is too long
        raise DataError(f"{path}: there is no such file or folder. Give {LAYOUTS}.")
    path = _without_dots(path)
    source = path / "dataset.json" if path.is_dir() else path
    root = source.parent
    content: dict[str, Any] = {}
    if source.is_file():
        if source.suffix.lower() != ".json":
            raise DataError(f"{path}: is not a data set. Give {LAYOUTS}.")
        content = read_json(source)
    elif not _image_folder(root):
        raise DataError(f"{path}: holds no dataset.json and no imagesTr. Give {LAYOUTS}.")

    validation: frozenset[str] = frozenset()
    if not path.is_dir() or ("training" in content and "file_ending" not in content):
        if "training" not in content:
            raise DataError(f'{source}: has no "training" list. Give {LAYOUTS}.')
        cases = list_cases(content["training"], "training", root, source)
        validation = validation_of_folds(content["training"], cases)
        if content.get("validation"):
            own = list_cases(content["validation"], "validation", root, source)
            validation = frozenset(case.name for case in own)
            cases += own
        if content.get("unlabelled") or content.get("unlabeled"):
            key = "unlabelled" if content.get("unlabelled") else "unlabeled"
            cases += list_cases(content[key], key, root, source, labelled=False)
    else:
        cases = _folder_cases(root, source, content)
    cases = [_with_channel_files(case) for case in cases]
    if not cases:
        raise DataError(f"{source}: names no training case. Add items to the list or scans to imagesTr.")
    if not any(case.label for case in cases):
        raise DataError(
            f"{source}: none of the {len(cases)} scans has a label map. Training needs at least one: put it "
            f"into labelsTr under the scan's name, or name it in the data list."
        )
    patients = read_patients(root)
    cases = [replace(case, patient=patients.get(case.name, case.patient)) for case in cases]
    labels, ignore = _labels(content, cases, source)
    return Dataset(
        root=root,
        name=str(content.get("name") or root.resolve().name),
        cases=without_twins(cases, source),
        channels=_channels(content, cases),
        labels=labels,
        ignore_label=ignore,
        validation=frozenset(case.name for case in cases if case.name in validation and case.label),
    )


def read_unlabelled(folder: str | Path, dataset: Dataset) -> tuple[Case, ...]:
    """The scans of a folder as unlabelled cases of `dataset` (its channels, ``_0000`` suffixes for several).

    Raises:
        DataError: no folder, no scan in it, or a name that the data set has already.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder. Give a folder of NIfTI scans.")
    root = _without_dots(Path(folder))
    cases = [Case(name, images) for name, images in _scans(root, len(dataset.channels)).items()]
    if not cases:
        raise DataError(f"{root}: holds no NIfTI scan (.nii or .nii.gz). Give a folder of scans.")
    without_twins([*dataset.cases, *cases], root)
    return tuple(cases)


def _without_dots(path: Path) -> Path:
    """The path itself, or where it has a ``..``, the one that it stands for: what lies below it can be told by name."""
    return path.resolve() if ".." in path.parts else path


def _with_channel_files(case: Case) -> Case:
    """The case with ``name_0000`` and so on in place of ``name``, as nnU-Net's older lists mean it."""
    image = case.images[0]
    if len(case.images) > 1 or os.path.exists(image):  # noqa: PTH110 - as above
        return case
    pattern = re.compile(re.escape(stem(image)) + r"_\d{4}")
    files = [file for file in _nifti_files(image.parent) if pattern.fullmatch(stem(file))]
    return replace(case, images=tuple(files) or case.images)


def _image_folder(root: Path) -> Path | None:
    return next((root / name for name in ("imagesTr", "images") if (root / name).is_dir()), None)


def _nifti_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.name.lower().endswith(NIFTI_ENDINGS))
    return sorted(file for file in files if not is_hidden(file))


def _scans(
    folder: Path, channels: int | None, *, suffixed: bool | None = None
) -> dict[str, tuple[Path, ...]]:
    """Case name -> its files; with suffixes, the files that the channels demand, existing or not."""
    files = _nifti_files(folder)
    if suffixed is None:
        endings = {
            stem(file)[-5:] for file in files
        }  # patient_0001, patient_0002 are no channels: none is _0000
        suffixed = "_0000" in endings and all(re.fullmatch(r"_\d{4}", ending) for ending in endings)
    if not suffixed:
        return {stem(file): (file,) for file in files}
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(re.sub(r"_\d{4}$", "", stem(file)), []).append(file)
    scans = {}
    for name, own in found.items():
        ending = own[0].name[len(stem(own[0])) :]
        expected = [folder / f"{name}_{number:04d}{ending}" for number in range(channels or 1)]
        scans[name] = tuple(sorted({*own, *expected}))
    return scans


def _folder_cases(root: Path, source: Path, content: Mapping[str, Any]) -> list[Case]:
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending not in NIFTI_ENDINGS:
        raise DataError(
            f'{source}: "file_ending" is {ending!r}. Training data must be NIfTI (.nii.gz): convert them.'
        )
    images = _image_folder(root)
    if images is None:
        raise DataError(f'{source}: has no "training" list, and {root} holds no imagesTr. Give {LAYOUTS}.')
    labels = {stem(file): file for file in _nifti_files(root / images.name.replace("images", "labels"))}
    if not _nifti_files(images):
        raise DataError(f"{images}: holds no NIfTI scan (.nii or .nii.gz). Put the training scans there.")
    channels = content.get("channel_names", content.get("modality"))
    number = len(channels) if isinstance(channels, Mapping | list) else None
    suffixed = True if "file_ending" in content else None
    if labels and set(labels) <= {stem(file) for file in _nifti_files(images)}:
        suffixed = False  # every label map has a scan of its very name: the digits belong to the name
    scans = _scans(images, number, suffixed=suffixed)
    if suffixed is not False and labels and not set(labels) & set(scans):
        raise DataError(
            f"{root}: no label map has the name of a scan ({next(iter(labels))!r}, {next(iter(scans))!r}). "
            f"Name each label map as its scan, without the channel suffix _0000."
        )
    cases = [Case(name, files, labels.get(name)) for name, files in scans.items()]
    with_suffix = any(stem(files[0]) != name for name, files in scans.items())
    for name in sorted(set(labels) - set(scans)):  # a label map whose scan is gone: the check reports it
        expected = (
            [f"{name}_{n:04d}{ending}" for n in range(number or 1)] if with_suffix else [f"{name}{ending}"]
        )
        cases.append(Case(name, tuple(images / file for file in expected), labels[name]))
    return sorted(cases, key=lambda case: case.name)


def _labels(
    content: Mapping[str, Any], cases: list[Case], source: Path
) -> tuple[dict[str, int | float], int | float | None]:
    ignore = content.get("ignore_label")
    if content.get("labels"):
        return parse_labels(content["labels"], source, ignore)
    return scan_labels([case.label for case in cases if case.label], source, ignore)


def _channels(content: Mapping[str, Any], cases: list[Case]) -> tuple[str, ...]:
    declared = content.get("channel_names", content.get("modality"))
    if isinstance(declared, str):  # one name for all: a data list's "modality": "MRI"
        number = _channel_count(cases[0])
        return (declared,) if number == 1 else tuple(f"{declared} {index}" for index in range(number))
    if isinstance(declared, list) and declared:
        return tuple(str(name) for name in declared)
    if isinstance(declared, Mapping) and declared:
        ordered = sorted(declared.items(), key=lambda pair: (len(str(pair[0])), str(pair[0])))
        return tuple(str(name) for _, name in ordered)
    number = _channel_count(cases[0])
    return ("scan",) if number == 1 else tuple(f"channel {index}" for index in range(number))


def _channel_count(case: Case) -> int:
    if len(case.images) > 1:
        return len(case.images)
    try:
        shape, _ = read_header(case.images[0])
    except DataError:  # the check reports the file
        return 1
    return shape[3] if len(shape) == 4 else 1
