"""One HTML file with scans and masks, to be opened from a disk: what it shows of each, and how it is put together."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex

from medseg_supcon.datasets import Regions, reorient, value_text, values_in, values_of
from medseg_supcon.errors import DataError
from medseg_supcon.evaluation import color_of
from medseg_supcon.files import remove_leftovers, write_whole
from medseg_supcon.quality.evidence import dice_per_class
from medseg_supcon.quality.review import Entry, quality_of, read_first_channel, read_labels, texts, urgency
from medseg_supcon.scans import Volume, count_values, in_parallel, same_grid

Array = npt.NDArray[Any]
Labels = Mapping[str, Any]  # class name -> value in the files, or list of a region's values; background first

MOST_SCANS = 300  # of a page
PAGE_VOXELS = 36_000_000  # of all scans together: at most 48 MB of text
SCAN_VOXELS = (100_000, 8_000_000)  # of a scan, at least and at most
MARGIN_MM, MARGIN = 15.0, 0.5  # around the mask: the larger of the two, one a share of the mask's extent
UNKNOWN = 255  # index of a value that no class has
CT_BELOW = -700.0  # a scan whose lowest values are below is a CT, and is shown in the window of soft tissue (HU)
SOFT_TISSUE = (-160.0, 240.0)


def write_page(
    out: Path,
    entries: Sequence[Entry],
    labels: Labels,
    title: str = "",
    notes: Sequence[str] = (),
    most: int = MOST_SCANS,
) -> dict[str, Any]:
    """Writes a page to look at scans and masks, worst first (`urgency`); it needs no network and no other file.

    Large scans are cropped to their mask and downsampled, and the page says so. It holds the images: treat it like
    the scans themselves.

    Args:
        out: the HTML file; its folder is made.
        entries: masks, with their scans where they are known; the first ``most`` of them are in the page.
        labels: class name -> value in the masks, or list of a region's values, background first; at most 254 values.
        title: heads the page.
        notes: sentences for the person who opens it.

    Returns:
        ``shown``: how many masks; ``verdicts``: how many of each (None: without one); ``notes``: the sentences in the
        page; ``problems``: those of them about masks that could not be read.

    Raises:
        DataError: there are too many classes, or none of the masks can be read.
    """
    values = values_in(labels)
    if len(values) > UNKNOWN:
        raise DataError(f"a page shows at most {UNKNOWN - 1} classes, found {len(values) - 1}. Are these label maps?")
    chosen, notes = entries[:most], list(notes)
    if len(chosen) < len(entries):
        notes.append(f"This page shows {len(chosen)} of {len(entries)} masks, worst first. More are shown with --most.")
    least, largest = SCAN_VOXELS
    budget = min(largest, max(least, PAGE_VOXELS // max(len(chosen), 1)))
    packed = in_parallel(partial(_pack_or_say, labels=labels, most=budget), chosen)
    rows = [item for item in packed if not isinstance(item, str)]
    problems = [item for item in packed if isinstance(item, str)]
    if not rows:
        raise DataError(f"no mask can be shown. {problems[0] if problems else 'There is none.'}")
    facts = {id(row): row.pop("facts") for row in rows}
    rows.sort(key=lambda row: urgency(facts[id(row)], row["name"], row["empty"], row["mean"]))
    blobs = [row.pop("blob") for row in rows]
    classes = [{"name": name, "color": to_hex(color_of(number))} for number, name in enumerate(list(labels)[1:])]
    head = {"title": title, "notes": [*notes, *problems], "classes": classes, "rows": rows}
    head["voxels"] = [_shown_as(value, labels, classes) for value in values[1:]]
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent)
    write_whole(out, lambda file: _write(file, head, blobs))
    found = [row["quality"]["verdict"] for row in rows]
    verdicts = {verdict: found.count(verdict) for verdict in ("reject", "review", "good", None) if verdict in found}
    return {"shown": len(rows), "verdicts": verdicts, "notes": head["notes"], "problems": problems}


def _shown_as(value: float, labels: Labels, classes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Name and colour of a voxel's value: its class, or all its regions and the colour of the smallest."""
    holds = [values_of(entry) for entry in list(labels.values())[1:]]
    mine = [number for number, values in enumerate(holds) if value in values]
    smallest = min(mine, key=lambda number: len(holds[number]))
    return {"name": ", ".join(classes[number]["name"] for number in mine), "color": classes[smallest]["color"]}


def _regions(labels: Labels) -> Regions | None:
    """The regions among the labels, of the values' numbers; None if there are none."""
    names = list(labels)[1:]
    if not any(isinstance(entry, Sequence) for entry in labels.values()):
        return None
    regions, values = {name: values_of(labels[name]) for name in names}, values_in(labels)
    plan = {"labels": {str(value): value for value in values}, "regions": regions}
    return Regions.of(plan | {"regions_class_order": [own[0] for own in regions.values()]})


def _write(file: IO[bytes], head: Mapping[str, Any], blobs: Sequence[str]) -> None:
    """The template with style, program and data in it, and a policy: this program runs, and nothing else is loaded."""
    page, style, program = (
        Path(__file__).with_name(f"review.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js")
    )
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, program)]
    policy = f"default-src 'none'; img-src data: blob:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    data = json.dumps(head, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag can begin in it
    volumes = [f'<script type="text/plain" id="volume{number}">{blob}</script>\n' for number, blob in enumerate(blobs)]
    parts = {"policy": [policy], "style": [style], "data": [data], "volumes": volumes, "program": [program]}
    for name, content in parts.items():
        before, _, page = page.partition(f"[[{name}]]")
        for text in (before, *content):
            file.write(text.encode())
    file.write(page.encode())


def _pack_or_say(entry: Entry, labels: Labels, most: int) -> dict[str, Any] | str:
    try:
        return _pack(entry, labels, most)
    except DataError as error:
        return str(error)


def _pack(entry: Entry, labels: Labels, most: int) -> dict[str, Any]:
    """What the page says of a mask, and its voxels as bytes, X fastest: scan, mask and label map."""
    mask = read_labels(entry.mask, labels)
    turn = nibabel.io_orientation(mask.affine) if np.isfinite(mask.affine).all() else np.full((3, 2), np.nan)
    if np.isnan(turn).any():
        raise DataError(
            f"{entry.name}: the mask's affine is not valid (zero or not finite). Save it on its scan's grid."
        )
    scan, source, notes = entry.scan, entry.reference, list[str]()
    image = reference = None
    if scan is None:
        notes.append("Its scan was not found: only the mask is shown.")
    else:
        image = _beside(mask, lambda: read_first_channel(scan), "The scan", notes)
    if source is not None:
        reference = _beside(mask, lambda: read_labels(source, labels), "The label map", notes)
    indices = [_indices(mask.data, labels, "The mask", notes)]
    indices += [] if reference is None else [_indices(reference, labels, "The label map", notes)]
    regions = _regions(labels)
    voxels = _counts(indices[0], labels, regions)
    dice: list[float | None] = [None] * len(voxels)
    if reference is not None:
        known = indices[1] != UNKNOWN
        found = dice_per_class(indices[0][known], indices[1][known], len(values_in(labels)), regions).tolist()
        dice = [None if math.isnan(score) else score for score in found]
    scores = [score for score in dice if score is not None]
    quality = quality_of(entry.facts)

    volumes = [nibabel.apply_orientation(np.where(index == UNKNOWN, 0, index), turn) for index in indices]
    edges = mask.grid.spacing[np.argsort(turn[:, 0])]
    box, steps = _part_shown(volumes, edges, most)
    small = [volume[box][np.ix_(*map(_middle, volume[box].shape, steps))] for volume in volumes]
    levels, window, grey = None, (0.0, 1.0), np.zeros(small[0].shape, np.uint8)
    if image is not None:
        pixels = _block_means(nibabel.apply_orientation(image, turn)[box], steps)
        levels, window = _levels(pixels), _window(pixels)
        grey = np.searchsorted((levels[1:] + levels[:-1]) / 2, pixels).astype(np.uint8)
    raw = b"".join(part.tobytes("F") for part in (grey, *small))
    return {
        "facts": entry.facts,
        "name": entry.name,
        "id": hashlib.sha256(ascii(entry.name).encode() + volumes[0].tobytes("F")).hexdigest()[:20],
        "quality": quality
        | {"mean": quality["dice"].get("mean"), "dice": list(map(quality["dice"].get, list(labels)[1:]))},
        "warnings": texts(entry.facts.get("warnings")),
        "notes": notes + _how_shown(volumes[0].shape, box, steps),
        "volumes": [round(number * mask.grid.voxel_ml, 4) for number in voxels],
        "total": round(np.count_nonzero((indices[0] > 0) & (indices[0] != UNKNOWN)) * mask.grid.voxel_ml, 4),
        "dice": dice,
        "mean": sum(scores) / len(scores) if scores else None,
        "empty": not any(voxels),
        "shape": small[0].shape,
        "spacing": [round(float(edge * step), 5) for edge, step in zip(edges, steps, strict=True)],
        "reference": reference is not None,
        "levels": None if levels is None else [float(f"{level:.6g}") for level in levels],
        "window": window,
        "blob": base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode(),
    }


def _beside(mask: Volume, read: Callable[[], Volume], what: str, notes: list[str]) -> Array | None:
    """Voxels of a scan or label map, with axes as the mask's; None, and a note, if there are none on the mask's grid."""
    try:
        volume = read()
        data, affine = reorient(volume.data, volume.affine, mask.affine)
        if data.shape == mask.data.shape and same_grid(data.shape, affine, mask.affine):
            return np.asarray(data)
        notes.append(f"{what} is not shown: its shape or affine differs from the mask's.")
    except DataError as error:
        notes.append(f"{what} is not shown. {error}")
    return None


def _indices(data: Array, labels: Labels, what: str, notes: list[str]) -> npt.NDArray[np.uint8]:
    """0 for background, 1 for the first class (of regions: the first value), and so on."""
    order = {value: number for number, value in enumerate(values_in(labels))}
    indices, unknown = np.zeros(data.shape, np.uint8), []
    for value in count_values(data):
        if value not in order:
            unknown.append(value_text(value))
        if (number := order.get(value, UNKNOWN)) > 0:
            indices[data == value] = number
    if unknown:
        notes.append(f"{what} holds {', '.join(unknown[:5])}, which no class has: not shown and not counted.")
    return indices


def _counts(indices: Array, labels: Labels, regions: Regions | None) -> list[int]:
    """Voxels of each class or region, without background."""
    counts = count_values(indices)
    each = [counts.get(float(number), 0) for number in range(len(values_in(labels)))]
    return each[1:] if regions is None else [int(number) for number in regions.membership @ each]


def _part_shown(
    masks: Sequence[Array], edges: npt.NDArray[np.float64], most: int
) -> tuple[tuple[slice, ...], list[int]]:
    """The box of a scan that is shown, and every how many voxels: all of a small scan, the mask's surroundings of others."""
    shape = masks[0].shape
    box = tuple(slice(0, n) for n in shape)
    if math.prod(shape) <= most:
        return box, [1, 1, 1]
    some = np.logical_or.reduce([mask > 0 for mask in masks])
    if some.any():
        ends = [np.flatnonzero(some.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
        more = [max(MARGIN * (b + 1 - a), MARGIN_MM / edge) for (a, b), edge in zip(ends, edges, strict=True)]
        triples = zip(ends, more, shape, strict=True)
        box = tuple(slice(max(0, int(a - m)), min(n, math.ceil(b + 1 + m))) for (a, b), m, n in triples)
    sizes, steps = np.array([part.stop - part.start for part in box]), np.array([1, 1, 1])
    while np.prod(np.ceil(sizes / steps)) > most:
        steps[np.where(sizes > steps, edges * steps, np.inf).argmin()] += 1
    return box, steps.tolist()


def _middle(length: int, step: int) -> Array:
    return np.minimum(np.arange(0, length, step) + step // 2, length - 1)


def _block_means(image: Array, steps: Sequence[int]) -> Array:
    for axis, step in enumerate(steps):
        if step > 1:
            starts = np.arange(0, image.shape[axis], step)
            numbers = np.diff(np.append(starts, image.shape[axis])).astype(np.float32)
            image = np.add.reduceat(image, starts, axis=axis) / np.expand_dims(numbers, tuple({0, 1, 2} - {axis}))
    return image


def _levels(pixels: Array) -> npt.NDArray[np.float64]:
    """256 rising values that stand for all: half even steps, half quantiles, so that a narrow window has many, too."""
    sample = pixels.ravel()[:: max(1, pixels.size // 500_000)].astype(np.float64)
    low, high = np.percentile(sample, (0.05, 99.95))
    quantiles = np.quantile(sample, np.linspace(0, 1, 256)).clip(low, high)
    return np.asarray((np.linspace(low, high, 256) + quantiles) / 2)


def _window(pixels: Array) -> tuple[float, float]:
    """The values that are black and white at first."""
    low, high = (float(f"{end:.6g}") for end in np.percentile(pixels, (0.5, 99.8)))
    return SOFT_TISSUE if low < CT_BELOW and high > 0 else (low, max(high, low + 1e-6))


def _how_shown(shape: Sequence[int], box: Sequence[slice], steps: Sequence[int]) -> list[str]:
    """A sentence if not every voxel of the scan is shown."""
    cropped = tuple(part.stop - part.start for part in box)
    how = ["cropped around the mask"] if cropped != tuple(shape) else []
    how += [f"downsampled by {' x '.join(map(str, steps))}"] if max(steps) > 1 else []
    size, whole = (" x ".join(map(str, sizes)) for sizes in (cropped, shape))
    text = f"The views are {' and '.join(how)}: {size} of {whole} voxels. Volumes and Dice are of the whole scan."
    return [text] if how else []
