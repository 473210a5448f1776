"""The masks to look at: those of a folder with their scans, label maps and facts, and which of them comes first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg_supcon.datasets import snap_labels, value_text, values_in
from medseg_supcon.errors import DataError
from medseg_supcon.evaluation import overlay_figure
from medseg_supcon.files import read_json, write_csv
from medseg_supcon.scans import NIFTI_ENDINGS, Scan, Volume, count_values, read_nifti, read_scan, scan_header, stem

VERDICTS = ("reject", "review", "good")  # worst first
FIRST_CHANNEL = "_0000"  # nnU-Net's suffix; the mask may be called without it


@dataclass(frozen=True)
class Entry:
    """One mask to look at, with what belongs to it."""

    name: str
    mask: Path | Volume
    scan: Scan | Volume | None = None  # of several channels the first is shown
    reference: Path | Volume | None = None  # a label map
    facts: Mapping[str, Any] = field(default_factory=dict)  # the scan's entry in manifest.json: `quality`, `warnings`


def quality_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The sound parts of the quality in a manifest's entry; the others are None or empty.

    Example:
        >>> from medseg_supcon.quality.review import quality_of
        >>> quality_of({"quality": {"verdict": "good", "dice": {"mean": 0.9}, "interval": "?"}})
        {'verdict': 'good', 'dice': {'mean': 0.9}, 'interval': None, 'reasons': []}
    """
    found = facts.get("quality")
    found = found if isinstance(found, dict) else {}
    verdict, dice, ends = found.get("verdict"), found.get("dice"), found.get("interval")
    return {
        "verdict": verdict if verdict in VERDICTS else None,
        "dice": {name: value for name, value in dice.items() if _is_number(value)} if isinstance(dice, dict) else {},
        "interval": ends if isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)) else None,
        "reasons": texts(found.get("reasons")),
    }


def texts(value: Any) -> list[str]:
    """The texts in what should be a list of them."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_entry(value: Any) -> bool:
    """The value of a class, or the values of a region."""
    return bool(value) and all(map(_is_number, value)) if isinstance(value, list) else _is_number(value)


def urgency(facts: Mapping[str, Any], name: str, empty: bool = False, dice: float | None = None) -> tuple[Any, ...]:
    """Where a mask belongs in the list: sorting by it puts the worst first.

    By verdict, then by predicted Dice. A mask without a verdict comes before good ones: empty masks first, then by the
    Dice against the label map (if there is one), then those with most warnings.
    """
    quality = quality_of(facts)
    rank = {"reject": 0, "review": 1, None: 2, "good": 3}[quality["verdict"]]
    natural = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
    expected = quality["dice"].get("mean", 2.0)
    return rank, expected, not empty, 2.0 if dice is None else dice, -len(texts(facts.get("warnings"))), natural


def folder_entries(
    folder: Path, scans: Iterable[Scan] = (), references: Path | None = None
) -> tuple[list[Entry], dict[str, Any], list[str]]:
    """The masks of a folder, worst first as far as its manifest says.

    Args:
        folder: NIfTI masks, with the ``manifest.json`` of ``medseg predict`` or without.
        scans: where their scans are; each mask gets the scan of its name, or the DICOM series that it was made from.
        references: folder of NIfTI label maps, found by name.

    Returns:
        the entries; class name -> value, or list of a region's values, background first (without a manifest the values,
        named by number); notes about what is missing.

    Raises:
        DataError: a folder does not exist or holds no NIfTI file, or the manifest cannot be read.
    """
    masks = _nifti_files(folder)
    maps = _nifti_files(references) if references is not None else {}
    labels, facts, notes = _read_manifest(folder / "manifest.json", masks)
    found = [scan for scan in scans if scan.problem is None]
    by_name = {scan.name: scan for scan in reversed(found)}
    by_series = {scan.series: scan for scan in found if scan.series}
    entries = []
    for name, mask in masks.items():
        fact = facts.get(name, {})
        scan = by_series.get(str(fact.get("series"))) or by_name.get(name) or by_name.get(name + FIRST_CHANNEL)
        reference = maps.get(name) or maps.get(name.removesuffix(FIRST_CHANNEL))
        entries.append(Entry(name, mask, scan, reference, fact))
    lacking = [entry.name for entry in entries if references is not None and entry.reference is None]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        notes.append(f"{references} holds no label map for {', '.join(lacking[:3])}{more}.")
    if not labels:
        values: set[float] = set()
        for path in (*masks.values(), *(entry.reference for entry in entries)):
            with suppress(DataError):  # write_page says what is wrong with it
                values |= set(count_values(read_nifti(path).data)) if isinstance(path, Path) else set()
        labels = {"background": 0, **{value_text(value): value for value in sorted(values - {0})}}
    return sorted(entries, key=lambda entry: urgency(entry.facts, entry.name, _is_empty(entry.facts))), labels, notes


def write_table(path: Path, entries: Iterable[Mapping[str, Any]], labels: Iterable[str]) -> None:
    """A CSV file with the quality of a manifest's entries, worst first; ``labels``: the foreground classes."""
    rows = []
    for entry in sorted(entries, key=lambda e: urgency(e, str(e["name"]), _is_empty(e))):
        quality = quality_of(entry)
        low, high = quality["interval"] or (None, None)
        row = {"scan": entry["name"], "verdict": quality["verdict"], "low": low, "high": high}
        rows.append(quality["dice"] | row | {"reasons": "; ".join(quality["reasons"])})
    write_csv(path, ("scan", "verdict", "mean", "low", "high", *labels, "reasons"), rows)


def _is_empty(facts: Mapping[str, Any]) -> bool:
    classes = facts.get("labels")
    parts = list(classes.values()) if isinstance(classes, dict) else []
    return bool(parts) and all(isinstance(part, dict) and part.get("voxels") == 0 for part in parts)


def _nifti_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder with the NIfTI files.")
    files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(NIFTI_ENDINGS) and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder} holds no NIfTI file (.nii, .nii.gz).")
    by_name = {stem(file): file for file in files}
    if len(by_name) < len(files):
        twice = next(file for file in files if by_name[stem(file)] != file)
        raise DataError(f"{folder}: {twice.name} and {by_name[stem(twice)].name} have the same name. Keep one of them.")
    return by_name


def _read_manifest(
    path: Path, masks: Mapping[str, Path]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Labels, entry by name, and a note for each scan that has no mask; all are empty without a manifest."""
    if not path.exists():
        return {}, {}, []
    content = read_json(path, DataError)
    labels, scans = content.get("labels"), content.get("scans")
    if not isinstance(scans, list) or not isinstance(labels, dict) or not all(map(_is_entry, labels.values())):
        raise DataError(f"{path} is not a manifest of medseg predict: 'labels' or 'scans' is missing. Move it away.")
    entries = {str(entry.get("name")): entry for entry in scans if isinstance(entry, dict)}
    lost = {name: entry.get("error") or "The file is gone." for name, entry in entries.items() if name not in masks}
    return labels, entries, [f"{name} has no mask. {why}" for name, why in lost.items()]


def read_first_channel(scan: Scan | Volume) -> Volume:
    """A scan with its voxels as (X, Y, Z); DataError says why it cannot be read."""
    if isinstance(scan, Scan):
        if scan.kind != "dicom":  # a file per channel, or one of all
            scan = replace(scan, files=scan.files[:1])
        try:
            shape, _ = scan_header(scan)
        except DataError:
            raise
        except Exception as error:  # SimpleITK and pydicom raise many kinds for broken headers
            raise DataError(f"{scan.source}: cannot be read ({' '.join(str(error).split())[:120]}).") from error
        scan = read_scan(scan, shape[3] if len(shape) > 3 else 1)
    return Volume(scan.channels_first[0], scan.grid, scan.monai_affine)


def read_labels(source: Path | Volume, labels: Mapping[str, Any]) -> Volume:
    """A label map as (X, Y, Z), with values a thousandth off those of the labels put right."""
    volume = source if isinstance(source, Volume) else read_nifti(source)
    if volume.data.ndim != 3 or volume.data.size == 0:
        name = "a label map" if isinstance(source, Volume) else source
        raise DataError(f"{name}: expected a 3-D label map, found shape {volume.data.shape}. Save one volume.")
    return Volume(snap_labels(volume.data, values_in(labels)), volume.grid, volume.monai_affine)


def write_pictures(folder: Path, entries: Iterable[Entry], labels: Mapping[str, Any]) -> list[str]:
    """Draws a PNG per scan: three planes of the scan with mask, and the label map above where there is one.

    Args:
        folder: gets ``<name>.png``; it is made.
        labels: class name -> value in the masks, or list of a region's values, background first.

    Returns:
        a sentence for each entry that could not be drawn.
    """
    problems = []
    for entry in entries:
        try:
            if entry.scan is None:
                raise DataError(f"{entry.name}: its scan was not found, and there is no picture without it.")
            scan = read_first_channel(entry.scan)
            overlay_figure(scan, entry.reference, entry.mask, folder / f"{entry.name}.png", labels)
        except DataError as error:
            problems.append(str(error))
    return problems
