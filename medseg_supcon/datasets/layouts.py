"""Finding the cases of a data set in any of the layouts that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.data_list import CHANNEL_KEYS, check_keys, list_cases, validation_of_folds
from medseg_supcon.datasets.dataset import Case, Dataset
from medseg_supcon.datasets.labels import check_name, parse_labels, scan_labels, whole_number
from medseg_supcon.errors import DataError, nearest
from medseg_supcon.files import read_json
from medseg_supcon.scans import NIFTI_ENDINGS, read_header, stem

LAYOUTS = (
    "a folder with dataset.json, imagesTr and labelsTr (Medical Segmentation Decathlon or nnU-Net v2), a "
    "folder with images and labels, or a MONAI datalist JSON"
)


def read_dataset(path: str | Path) -> Dataset:
    """The data set in a folder or data list. Voxels are not read, unless no labels are declared.

    Layouts: the decathlon's folder (``dataset.json`` with a ``training`` list), nnU-Net v2's raw folder
        (``imagesTr/case_0000.nii.gz``, or the files that its ``dataset`` key names), a MONAI datalist JSON, or a
        folder with ``imagesTr`` and ``labelsTr`` (or ``images`` and ``labels``) alone. A ``training`` list counts
        wherever there is one. Items may have a ``patient``; so may ``patients.json`` beside the list. Items with a
        ``fold``: fold 0 validates, as in MONAI's Auto3DSeg. The ``test`` section is not used. A key that is not
        known is a warning of the data set, a misspelt one an error.

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
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for long names
        raise DataError(f"{path}: there is no such file or folder. Give {LAYOUTS}.")
    path = _without_dots(path)
    source = path / "dataset.json" if path.is_dir() else path
    root = source.parent
    content: dict[str, Any] = {}
    if source.is_file():
        if source.suffix.lower() != ".json":
            raise DataError(f"{path}: is not a data set. Give {LAYOUTS}.")
        content = read_json(source, DataError)
    elif not _image_folder(root):
        raise DataError(f"{path}: holds no dataset.json and no imagesTr. Give {LAYOUTS}.")
    warnings = check_keys(content, source)
    if (splits := root / "splits_final.json").is_file():
        warnings.append(f'{splits}: is not used. Give the items of a "training" list a "fold" (fold 0 validates).')
    cases, validation = _cases(content, path, source, warnings)
    cases = [_with_channel_files(case) for case in cases]
    if not cases:
        raise DataError(f"{source}: names no training case. Add items to the list or scans to imagesTr.")
    labelled = sum(case.label is not None for case in cases)
    if not labelled:
        raise DataError(
            f"{source}: none of the {len(cases)} scans has a label map. Training needs at least one: put it "
            f"into labelsTr under the scan's name, or name it in the data list."
        )
    expected, number = content.get("numTraining"), len(content.get("training", ())) or labelled
    if expected is not None and whole_number(expected) not in (number, labelled):
        warnings.append(f'{source}: "numTraining" is {expected!r}, but there are {number} training cases.')
    cases = _with_patients(cases, root, warnings)
    if content.get("labels"):
        labels, ignore_label = parse_labels(content["labels"], source, content.get("ignore_label"))
    else:
        files = [case.label for case in cases if case.label]
        labels, ignore_label = scan_labels(files, source, content.get("ignore_label"))
    return Dataset(
        root=root,
        name=check_name(content.get("name") or root.resolve().name or "data", source, "name"),
        cases=without_twins(cases, source),
        channels=_channels(content, cases, source),
        labels=labels,
        ignore_label=ignore_label,
        validation=frozenset(case.name for case in cases if case.name in validation and case.label),
        warnings=tuple(warnings),
    )


def _cases(
    content: Mapping[str, Any], path: Path, source: Path, warnings: list[str]
) -> tuple[list[Case], frozenset[str]]:
    """The cases of a data set in any layout, and the names of those that validate."""
    root = source.parent
    files = content.get("dataset")
    if "training" not in content and isinstance(files, Mapping):
        if odd := [name for name, entry in files.items() if not isinstance(entry, Mapping)]:
            raise DataError(f'{source}: {odd[0]!r} under "dataset" must hold "images" and "label".')
        entries = [
            {("image" if key == "images" else key): value for key, value in entry.items()} | {"name": name}
            for name, entry in files.items()
        ]
        return [case for case, _ in list_cases(entries, "dataset", root, source, warnings)], frozenset()
    if "training" not in content:
        if not path.is_dir():
            raise DataError(f'{source}: has no "training" list. Give {LAYOUTS}.')
        return _folder_cases(root, source, content), frozenset()
    if also := [f'"{key}"' for key in ("file_ending", "dataset") if key in content]:
        warnings.append(f'{source}: has a "training" list and {" and ".join(also)}: only the list is used.')
    listed = list_cases(content["training"], "training", root, source, warnings)
    cases, validation = [case for case, _ in listed], validation_of_folds(listed, source)
    for key in ("validation", "unlabelled", "unlabeled"):
        more = list_cases(content.get(key) or (), key, root, source, warnings, labelled=key == "validation")
        cases += [case for case, _ in more]
        if more and key == "validation":
            if bare := [case.name for case, _ in more if case.label is None]:
                raise DataError(f'{source}: {bare[0]!r} under "validation" has no "label". Move it to "unlabelled".')
            if validation:
                warnings.append(f'{source}: items have a "fold", but the "validation" list counts.')
            validation = frozenset(case.name for case, _ in more)
    return cases, validation


def _with_patients(cases: list[Case], root: Path, warnings: list[str]) -> list[Case]:
    """The cases with the patients that ``patients.json`` beside the list names."""
    file = root / "patients.json"
    patients = read_json(file, DataError) if file.is_file() else {}
    names = [case.name for case in cases]
    if unknown := [name for name in patients if name not in names]:
        warnings.append(
            f"{file}: {len(unknown)} names are not cases of the data set, such as {unknown[0]!r} (the nearest case is "
            f"{nearest(unknown[0], names, 0)!r})."
        )
    return [replace(case, patient=str(patients.get(case.name, case.patient or "")) or None) for case in cases]


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


def without_twins(cases: Sequence[Case], source: Path) -> tuple[Case, ...]:
    """The cases; `DataError` if two of them share a name (so would their masks), or a name cannot be a file's."""
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


def _without_dots(path: Path) -> Path:
    """The path itself, or if it has a ``..``, its target: then paths below it can be compared by name."""
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
    """The NIfTI files of a folder, without hidden ones such as the ``._`` twins that macOS makes."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in files if f.name.lower().endswith(NIFTI_ENDINGS) and not f.name.startswith("."))


def _scans(folder: Path, channels: int | None, *, suffixed: bool | None = None) -> dict[str, tuple[Path, ...]]:
    """Case name -> its files; with suffixes, the files that the channels demand, existing or not."""
    files = _nifti_files(folder)
    if suffixed is None:  # patient_0001 and patient_0002 are not channels: none is _0000
        endings = {stem(file)[-5:] for file in files}
        suffixed = "_0000" in endings and all(re.fullmatch(r"_\d{4}", ending) for ending in endings)
    if not suffixed:
        return {stem(file): (file,) for file in files}
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(re.sub(r"_\d{4}$", "", stem(file)), []).append(file)
    scans = {}
    for name, own in by_name.items():
        ending = own[0].name[len(stem(own[0])) :]
        expected = [folder / f"{name}_{number:04d}{ending}" for number in range(channels or 1)]
        scans[name] = tuple(sorted({*own, *expected}))
    return scans


def _folder_cases(root: Path, source: Path, content: Mapping[str, Any]) -> list[Case]:
    ending = "." + str(content.get("file_ending", ".nii.gz")).strip().lower().lstrip(".")
    if ending not in NIFTI_ENDINGS:
        raise DataError(f'{source}: "file_ending" is {ending!r}. Training data must be NIfTI (.nii.gz): convert them.')
    images = _image_folder(root)
    if images is None:
        raise DataError(f'{source}: has no "training" list, and {root} holds no imagesTr. Give {LAYOUTS}.')
    labels = {stem(file): file for file in _nifti_files(root / images.name.replace("images", "labels"))}
    stems = {stem(file) for file in _nifti_files(images)}
    if not stems:
        raise DataError(f"{images}: holds no NIfTI scan (.nii or .nii.gz). Put the training scans there.")
    declared = next((content[key] for key in CHANNEL_KEYS if key in content), None)
    number = len(declared) if isinstance(declared, Mapping | list) else None
    suffixed = True if "file_ending" in content else None
    if labels and set(labels) <= stems:  # every label map has a scan of its very name
        suffixed = False
    scans = _scans(images, number, suffixed=suffixed)
    if suffixed is not False and labels and not set(labels) & set(scans):
        raise DataError(
            f"{root}: no label map has the name of a scan ({next(iter(labels))!r}, {next(iter(scans))!r}). "
            f"Name each label map as its scan, without the channel suffix _0000."
        )
    cases = [Case(name, files, labels.get(name)) for name, files in scans.items()]
    with_suffix = any(stem(files[0]) != name for name, files in scans.items())
    suffixes = [f"_{n:04d}" for n in range(number or 1)] if with_suffix else [""]
    for name in sorted(set(labels) - set(scans)):  # a label map without its scan: the check reports it
        cases.append(Case(name, tuple(images / f"{name}{s}{ending}" for s in suffixes), labels[name]))
    return sorted(cases, key=lambda case: case.name)


def _channels(content: Mapping[str, Any], cases: list[Case], source: Path) -> tuple[str, ...]:
    keys = [key for key in CHANNEL_KEYS if content.get(key)]
    if len(keys) == 2 and content[keys[0]] != content[keys[1]]:
        raise DataError(f'{source}: "channel_names" and "modality" differ. Remove the one that is wrong.')
    key = keys[0] if keys else None
    if key is None or isinstance(content[key], str):  # one name for all: a data list's "modality": "MRI"
        number, name = _channel_count(cases[0]), content[key] if key else "scan"
        names = [name] if number == 1 else [f"{name if key else 'channel'} {n}" for n in range(number)]
        return tuple(check_name(name, source, key or "") for name in names)
    declared = content[key]
    if isinstance(declared, Mapping):
        pairs = [(whole_number(number), name) for number, name in declared.items()]
        if any(number is None for number, _ in pairs):  # {"CT": 0}
            pairs = [(whole_number(number), name) for name, number in declared.items()]
        by_number = {number: name for number, name in pairs if number is not None}
        if len(by_number) < len(pairs):
            example = 'to their names, such as {"0": "T1", "1": "FLAIR"}'
            raise DataError(f'{source}: "{key}" must map the numbers of the channels {example}; found {declared!r}.')
        declared = [by_number[number] for number in sorted(by_number)]
    if not isinstance(declared, list):
        raise DataError(f'{source}: "{key}" must map numbers to names, found {type(declared).__name__}.')
    return tuple(check_name(name, source, key) for name in declared)


def _channel_count(case: Case) -> int:
    if len(case.images) > 1:
        return len(case.images)
    try:
        shape, _ = read_header(case.images[0])
    except DataError:  # the check reports the file
        return 1
    return shape[3] if len(shape) == 4 else 1
