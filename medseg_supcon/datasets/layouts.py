"""Finds the cases of a data set in any supported layout: folders, dataset.json, MONAI datalists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_supcon.datasets.dataset import SECTIONS, Case, Dataset, Folds, inside, texts
from medseg_supcon.datasets.folds import folds_of_key, read_splits, splits_file
from medseg_supcon.datasets.labels import as_number, check_name, labels_in_files, parse_labels
from medseg_supcon.datasets.regions import parse_regions
from medseg_supcon.errors import DataError, nearest
from medseg_supcon.files import read_json
from medseg_supcon.scans import NIFTI_ENDINGS, read_header, stem
from medseg_supcon.text import counted

LAYOUTS = "a folder with dataset.json (decathlon, nnU-Net v2) or with images and labels, or a MONAI datalist JSON"
LISTS = (*SECTIONS, "unlabeled", "test")
CHANNEL_KEYS = ("channel_names", "modality")
DESCRIPTIONS = (  # of the decathlon, nnU-Net v1 and v2, and MONAI: nothing in a training depends on them
    "name", "description", "reference", "licence", "license", "release", "relase", "citation", "converted_by",
    "dataset_name", "tensorImageSize", "numTest", "numValidation", "overwrite_image_reader_writer",
)  # fmt: skip
LABEL_KEYS = ("labels", "ignore_label", "regions_class_order")
KEYS = (*LISTS, *CHANNEL_KEYS, *DESCRIPTIONS, *LABEL_KEYS, "numTraining", "file_ending", "dataset")
# nnU-Net's readers. Each gives NIfTI scans the same place and voxels, but for axes, which are reoriented here in any case.
READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient")
OTHER_READERS = {"Tiff3DIO": "TIFF files", "NaturalImage2DIO": "2-D pictures"}
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
PATIENT_KEYS = ("patient", "subject", "group")
NAME_KEYS = ("name", "case")
ITEM_KEYS = ("image", "label", "fold", *PATIENT_KEYS, *NAME_KEYS)
MISSPELT = 0.8  # similarity above which an unknown key is a misspelt known one


def read_dataset(path: str | Path) -> Dataset:
    """The data set in a folder or data list, which must have a label map. Voxels are read only if no labels are declared.

    Layouts: the decathlon's folder (``dataset.json`` with a ``training`` list), nnU-Net v2's raw folder
        (``imagesTr/case_0000.nii.gz``, or the files that its ``dataset`` key names), a MONAI datalist JSON, or a
        folder with ``imagesTr`` and ``labelsTr`` (or ``images`` and ``labels``) alone. A ``training`` list counts
        wherever there is one. Items may have a ``patient``; so may ``patients.json`` beside the list. Items with a
        ``fold``: fold 0 is for validation, as in MONAI's Auto3DSeg. nnU-Net's ``splits_final.json``, beside the list or
        in ``nnUNet_preprocessed``: its first split is the validation. Both are the ``folds`` of the data set. The ``test``
        section is not used. An unknown key is a warning of the data set, a misspelt one an error. Relative paths cannot
        leave the folder of the list.
    """
    path = Path(path)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for long names
        raise DataError(f"{path}: there is no such file or folder. Give {LAYOUTS}.")
    path = path.resolve() if ".." in path.parts else path  # so that paths below it can be compared by name
    if not path.is_dir() and path.suffix.lower() != ".json":
        raise DataError(f"{path}: is not a data set. Give {LAYOUTS}.")
    source = path / "dataset.json" if path.is_dir() else path
    root = source.parent
    content = read_json(source, DataError) if source.is_file() else {}
    warnings = [*_check_keys(content, source), *_check_reader(content, source)]
    cases, validation, folds = _cases(content, path, source, warnings)
    if not cases:
        raise DataError(f"{source}: lists no training cases. Add items to the list or scans to imagesTr.")
    cases = _with_patients([_with_channel_files(case) for case in cases], root, warnings)
    label_files = [case.label for case in cases if case.label]
    if not label_files:
        cure = "Put at least one into labelsTr, named like its scan, or list it in the data list."
        raise DataError(f"{source}: none of the {len(cases)} scans has a label map. {cure}")
    expected, number = content.get("numTraining"), len(content.get("training", ())) or len(label_files)
    if expected is not None and as_number(expected) not in (number, len(label_files)):
        warnings.append(f'{source}: "numTraining" is {expected!r}, but there are {number} training cases.')
    declared = content.get("labels") or labels_in_files(label_files, source)
    meaning = _meaning(content, declared, source)
    name = check_name(content.get("name") or root.resolve().name or "data", source, "name")
    channels, whole = _channels(content, cases[0], source), _without_twins(cases, source)
    if (splits := splits_file(root)) is not None:
        if validation:
            warnings.append(f"{splits}: is not used, because the data list says which cases are for validation.")
        else:
            folds = read_splits(splits, {case.name for case in cases})
            validation = set(folds.parts[0][1])
    held_out = frozenset(case.name for case in cases if case.name in validation and case.label)
    dataset = Dataset(root, name, whole, channels, **meaning, warnings=tuple(warnings))
    return replace(dataset, validation=held_out, folds=folds)


def read_label_plan(path: str | Path) -> dict[str, Any]:
    """What the labels of a ``dataset.json`` mean, or of that in a folder: `Dataset.label_plan`, without the cases."""
    source = Path(path) / "dataset.json" if Path(path).is_dir() else Path(path)
    content = read_json(source, DataError)
    if "labels" not in content:
        raise DataError(f'{source}: has no "labels". Give a dataset.json that declares the classes.')
    return replace(Dataset(source.parent, "", (), (), {}), **_meaning(content, content["labels"], source)).label_plan


def _meaning(content: Mapping[str, Any], declared: object, source: Path) -> dict[str, Any]:
    """The fields of a `Dataset` that say what the values of label maps mean."""
    classes, regions, order = parse_regions(declared, source, content.get("regions_class_order"))
    labels, ignore_label = parse_labels(classes, source, content.get("ignore_label"))
    meaning = {"labels": labels, "ignore_label": ignore_label, "regions": regions}
    return meaning | {"regions_class_order": tuple(order)}


def read_unlabelled(folder: str | Path, dataset: Dataset) -> tuple[Case, ...]:
    """The scans of a folder as unlabelled cases of `dataset`, with ``_0000`` suffixes for several channels."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder. Give a folder of NIfTI scans.")
    root = Path(folder).resolve() if ".." in Path(folder).parts else Path(folder)  # as above
    cases = tuple(Case(name, images) for name, images in _scans(root, len(dataset.channels)).items())
    if not cases:
        raise DataError(f"{root}: contains no NIfTI scan (.nii or .nii.gz). Give a folder of scans.")
    _without_twins([*dataset.cases, *cases], root)
    return cases


def _check_keys(content: Mapping[str, Any], source: Path) -> list[str]:
    """Warnings on keys of a dataset.json that are not used; `DataError` if one is misspelt or would drop cases."""
    keys = [key for key in content if not key.lower().startswith("test")]
    for key in keys:
        entries = content[key] if isinstance(content[key], list) and key not in KEYS else []
        is_case = ["image" in e if isinstance(e, dict) else str(e).lower().endswith(NIFTI_ENDINGS) for e in entries]
        if any(is_case):
            found = f"{key!r} is a list of {sum(is_case)} cases, but such lists are called {', '.join(LISTS)}"
            raise DataError(f"{source}: {found}.{_hint(key, LISTS)} Rename it.")
    return _unknown(keys, KEYS, "the file", source)


def _check_reader(content: Mapping[str, Any], source: Path) -> list[str]:
    """A warning if nnU-Net would read the scans with code that is not here; `DataError` if it would read no NIfTI."""
    reader = content.get("overwrite_image_reader_writer")
    if reader in (None, "None", *READERS):
        return []
    found = f'{source}: "overwrite_image_reader_writer" is {reader!r}'
    if reader in OTHER_READERS:
        cure = "Convert the files to NIfTI (.nii.gz), with their voxel sizes, and remove the key."
        raise DataError(f"{found}, which reads {OTHER_READERS[reader]}, but training data must be NIfTI. {cure}")
    cure = "If that reader changes voxels, save the scans as it reads them."
    return [f"{found}, which is not one of nnU-Net's own readers. The NIfTI files are read as they are. {cure}"]


def _unknown(keys: Collection[str], known: Sequence[str], where: str, source: Path) -> list[str]:
    warnings = []
    for key in (key for key in keys if key not in known):
        near = nearest(key, known, MISSPELT)
        if near is not None and near not in (*keys, *DESCRIPTIONS):
            raise DataError(f"{source}: {where} has the unknown key {key!r}. Rename it to {near!r}.")
        warnings.append(f"{source}: {where} has the key {key!r}, which is not used.{_hint(key, known)}")
    return warnings


def _hint(key: str, known: Sequence[str]) -> str:
    near = nearest(key, known)
    return f" Did you mean {near!r}?" if near else ""


def _cases(
    content: Mapping[str, Any], path: Path, source: Path, warnings: list[str]
) -> tuple[list[Case], set[str], Folds | None]:
    """The cases of a data set in any layout, the names of those for validation, and the folds of the key "fold"."""
    files = content.get("dataset")
    if "training" not in content and isinstance(files, Mapping):
        if odd := [name for name, entry in files.items() if not isinstance(entry, Mapping)]:
            raise DataError(f'{source}: {odd[0]!r} under "dataset" must have "images" and "label".')
        entries = [{**_expanded(entry, source), "name": name} for name, entry in files.items()]
        return [case for case, _ in _listed(entries, "dataset", source, warnings)], set(), None
    if "training" not in content:
        return _folder_cases(path, content, warnings), set(), None
    if also := [f'"{key}"' for key in ("file_ending", "dataset") if key in content]:
        warnings.append(f'{source}: has a "training" list and {" and ".join(also)}: only the list is used.')
    listed = _listed(content["training"], "training", source, warnings)
    cases = [case for case, _ in listed]
    numbers = {case.name: str(fold) for case, fold in listed if fold is not None}
    validation = {name for name, fold in numbers.items() if fold in ("0", "0.0")}  # as in MONAI's Auto3DSeg
    folds = folds_of_key(numbers, source) if numbers else None
    if numbers and not 0 < len(validation) < len(listed):
        found = f'the values of "fold" are {", ".join(sorted(set(numbers.values())))}'
        cure = "Number the folds from 0, or remove the key."
        raise DataError(f"{source}: fold 0 is for validation and the other folds are for training, but {found}. {cure}")
    for key in ("validation", "unlabelled", "unlabeled"):
        more = [case for case, _ in _listed(content.get(key) or (), key, source, warnings)]
        cases += more
        if more and key == "validation":
            if bare := [case.name for case in more if case.label is None]:
                raise DataError(f'{source}: {bare[0]!r} under "validation" has no "label". Move it to "unlabelled".')
            if validation:
                warnings.append(f'{source}: "fold" is ignored, because there is a "validation" list.')
            validation, folds = {case.name for case in more}, None
    return cases, validation, folds


def _expanded(entry: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """An entry of nnU-Net's "dataset", whose paths may start with an environment variable: ``$nnUNet_raw/...``."""

    def expanded(text: Any) -> Any:
        if not isinstance(text, str) or os.path.exists(source.parent / text):  # noqa: PTH110 - a file called $x
            return text
        full = os.path.expandvars(text)
        if left := VARIABLE.search(full):
            raise DataError(
                f"{source}: {text!r}: the environment variable {left[0]} is not set. Set it, or write the path."
            )
        return full

    keys = ("images", "image", "label")
    return {key: _each(expanded, value) if key in keys else value for key, value in entry.items()}


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return [change(part) for part in value] if isinstance(value, list) else change(value)


def _listed(entries: object, key: str, source: Path, warnings: list[str]) -> list[tuple[Case, object]]:
    """The cases of one section of a data list, each with its "fold"; `warnings` gets those on keys that are not used.

    An item is ``{"image": ..., "label": ...}`` or a path. The ``._`` twins that macOS makes are left out.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DataError(f'{source}: "{key}" must be a list of items {{"image": path, "label": path}}.')
    items = [entry if isinstance(entry, Mapping) else {"image": entry} for entry in entries]
    known = (*ITEM_KEYS, "images") if key == "dataset" else ITEM_KEYS  # nnU-Net's word
    warnings += dict.fromkeys(w for keys in items for w in _unknown(keys, known, f'an item of "{key}"', source))
    listed: list[tuple[Case, object]] = []
    for number, item in enumerate(items, 1):
        paths = item.get("image") or item.get("images")
        if not paths:
            raise DataError(f'{source}: item {number} of "{key}" has no "image". Give it the path of its scan.')
        images = tuple(inside(source.parent, text, source) for text in texts(paths))
        if any(path.name.startswith("._") for path in images):
            continue
        labels = texts(None if key.startswith("unlabel") else item.get("label"))
        if len(labels) != 1:
            what = f'item {number} of "{key}" has {len(labels)} label files'
            raise DataError(f"{source}: {what}. Merge them into one label map with one value per class.")
        label = inside(source.parent, labels[0], source) if labels[0] else None
        patient = next((str(item[k]) for k in PATIENT_KEYS if item.get(k) is not None), None)
        name = next((str(item[k]) for k in NAME_KEYS if item.get(k)), None)
        listed.append((Case(name or _case_name(images, label), images, label, patient), item.get("fold")))
    return listed


def _case_name(images: tuple[Path, ...], label: Path | None) -> str:
    stems = [stem(path) for path in images]
    if label is not None and all(re.fullmatch(re.escape(stem(label)) + r"_\d{4}", name) for name in stems):
        return stem(label)
    if len(stems) == 1:
        return stems[0]
    common = os.path.commonprefix(stems).rstrip("_-. ")  # noqa: RUF071 - names, not paths
    common = re.sub(r"[_\-.](0+|t)$", "", common)  # a_0000, a_0001 and a_t1, a_t2 share too much
    return common if len(common) > 1 else images[0].parent.name


def _with_patients(cases: list[Case], root: Path, warnings: list[str]) -> list[Case]:
    """The cases with the patients that ``patients.json`` beside the list names."""
    file = root / "patients.json"
    patients = read_json(file, DataError) if file.is_file() else {}
    names = [case.name for case in cases]
    if unknown := [name for name in patients if name not in names]:
        near = f"{unknown[0]!r} (the nearest case is {nearest(unknown[0], names, 0)!r})"
        warnings.append(f"{file}: {len(unknown)} names are not cases of the data set, such as {near}.")
    return [replace(case, patient=str(patients.get(case.name, case.patient or "")) or None) for case in cases]


def _without_twins(cases: Sequence[Case], source: Path) -> tuple[Case, ...]:
    """The cases; `DataError` if two of them share a name (so would their masks), or a name cannot be a file's."""
    seen: dict[str, Case] = {}
    for case in cases:
        if not re.fullmatch(r"[^./\\\0\n][^/\\\0\n]*", case.name):
            raise DataError(f"{source}: case name {case.name!r} cannot be a file name. Use letters, digits, - and _.")
        if case.name in seen:
            files = f"{seen[case.name].images[0]} and {case.images[0]}"
            raise DataError(f"{source}: two cases are called {case.name!r} ({files}). Rename a file or name its item.")
        seen[case.name] = case
    return tuple(cases)


def _with_channel_files(case: Case) -> Case:
    """The case with ``name_0000`` and so on in place of ``name``, as nnU-Net's older lists mean it."""
    image = case.images[0]
    if len(case.images) > 1 or os.path.exists(image):  # noqa: PTH110 - as above
        return case
    pattern = re.compile(re.escape(stem(image)) + r"_\d{4}")
    files = [file for file in _nifti_files(image.parent) if pattern.fullmatch(stem(file))]
    return replace(case, images=tuple(files) or case.images)


def _nifti_files(folder: Path, endings: tuple[str, ...] = NIFTI_ENDINGS) -> list[Path]:
    """The NIfTI files of a folder, without hidden ones such as the ``._`` twins that macOS makes."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in files if f.name.lower().endswith(endings) and not f.name.startswith("."))


def _scans(
    folder: Path, channels: int, suffixed: bool | None = None, endings: tuple[str, ...] = NIFTI_ENDINGS
) -> dict[str, tuple[Path, ...]]:
    """Case name -> its files; with suffixes, the files that the channels demand, existing or not."""
    files = _nifti_files(folder, endings)
    if suffixed is None:  # patient_0001 and patient_0002 are not channels: none is _0000
        last = {stem(file)[-5:] for file in files}
        suffixed = "_0000" in last and all(re.fullmatch(r"_\d{4}", part) for part in last)
    if not suffixed:
        return {stem(file): (file,) for file in files}
    scans: dict[str, set[Path]] = {}
    for file in files:
        name, ending = re.sub(r"_\d{4}$", "", stem(file)), file.name[len(stem(file)) :]
        expected = [folder / f"{name}_{number:04d}{ending}" for number in range(channels)]
        scans.setdefault(name, set(expected)).add(file)
    return {name: tuple(sorted(own)) for name, own in scans.items()}


def _folder_cases(path: Path, content: Mapping[str, Any], warnings: list[str]) -> list[Case]:
    images = next((path / name for name in ("imagesTr", "images") if (path / name).is_dir()), None)
    if images is None:
        raise DataError(f'{path}: has neither a "training" list nor a folder imagesTr. Give {LAYOUTS}.')
    ending = "." + str(content.get("file_ending", ".nii.gz")).strip().lower().lstrip(".")
    if ending not in NIFTI_ENDINGS:
        raise DataError(f'{path}: "file_ending" is {ending!r}. Training data must be NIfTI (.nii.gz): convert them.')
    labels_folder = path / images.name.replace("images", "labels")
    both = [file for folder in (images, labels_folder) for file in _nifti_files(folder)]
    if "file_ending" in content and (others := [file for file in both if not file.name.lower().endswith(ending)]):
        found = f"{counted(len(others), 'file')} with another ending, such as {others[0]}"
        warnings.append(f'{path}: "file_ending" is {ending!r}, and {found}, are not used.')
    wanted = (ending,) if "file_ending" in content else NIFTI_ENDINGS
    labels = {stem(file): file for file in _nifti_files(labels_folder, wanted)}
    stems = {stem(file) for file in _nifti_files(images, wanted)}
    if not stems:
        raise DataError(f"{images}: contains no NIfTI scan (.nii or .nii.gz). Put the training scans there.")
    declared = next((content[key] for key in CHANNEL_KEYS if key in content), None)
    number = max(1, len(declared)) if isinstance(declared, Mapping | list) else 1
    suffixed = True if "file_ending" in content else None
    if labels and set(labels) <= stems:  # every label map has a scan with exactly its name
        suffixed = False
    scans = _scans(images, number, suffixed, wanted)
    if labels and not set(labels) & set(scans):
        names = f"{next(iter(labels))!r}, {next(iter(scans))!r}"
        cure = "Name each label map like its scan, without the channel suffix _0000."
        raise DataError(f"{path}: no label map has the name of a scan ({names}). {cure}")
    with_suffix = any(stem(files[0]) != name for name, files in scans.items())
    suffixes = [f"_{n:04d}" for n in range(number)] if with_suffix else [""]
    for name in set(labels) - set(scans):  # a label map without its scan: the check reports it
        scans[name] = tuple(images / f"{name}{s}{ending}" for s in suffixes)
    return [Case(name, scans[name], labels.get(name)) for name in sorted(scans)]


def _channels(content: Mapping[str, Any], case: Case, source: Path) -> tuple[str, ...]:
    """The names of the channels, from dataset.json or else from the files of a case."""
    keys = [key for key in CHANNEL_KEYS if content.get(key)]
    if len(keys) == 2 and content[keys[0]] != content[keys[1]]:
        raise DataError(f'{source}: "channel_names" and "modality" differ. Remove the one that is wrong.')
    key, declared = (keys[0], content[keys[0]]) if keys else ("", None)
    if declared is None or isinstance(declared, str):  # one name for all: a data list's "modality": "MRI"
        number = len(case.images)
        with suppress(DataError):  # the check reports the file
            shape = read_header(case.images[0])[0]
            number = shape[3] if len(shape) == 4 and number == 1 else number
        declared = [declared or "scan"] if number == 1 else [f"{declared or 'channel'} {n}" for n in range(number)]
    if isinstance(declared, Mapping):
        pairs = [(as_number(number), name) for number, name in declared.items()]
        if any(number is None for number, _ in pairs):  # {"CT": 0}
            pairs = [(as_number(number), name) for name, number in declared.items()]
        by_number = {number: name for number, name in pairs if number is not None}
        if len(by_number) < len(pairs):
            example = 'to their names, such as {"0": "T1", "1": "FLAIR"}'
            raise DataError(f'{source}: "{key}" must map the numbers of the channels {example}; found {declared!r}.')
        declared = [by_number[number] for number in sorted(by_number)]
    if not isinstance(declared, list):
        raise DataError(f'{source}: "{key}" must map numbers to names, found {type(declared).__name__}.')
    return tuple(check_name(name, source, key) for name in declared)
