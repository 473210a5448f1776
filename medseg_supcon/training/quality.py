"""The quality model of a trained run: its own scans, as they are and degraded, segmented and scored."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.bundle import cases_of, plain_text, read_config
from medseg_supcon.datasets import class_indices, load_items
from medseg_supcon.errors import MedsegError
from medseg_supcon.inference import Predictor, prepare_volume
from medseg_supcon.plan import read_plan
from medseg_supcon.quality import INTENSITY, Degraded, QualityModel, Sample, degradations, dice_per_class
from medseg_supcon.scans import Scan, Volume, read_nifti, read_scan

FEWEST, ENOUGH, MOST = 24, 200, 900  # samples: with fewer no model is fitted, and more add nothing
SCANS = 40
WINDOWS_PER_STEP = 1 / 9  # of a training step's patches: about a tenth of the training's time
MOST_VOXELS = 1.5e9  # degraded in all
MARGIN_MM = 30.0  # of a large scan, the structures and this around them are used
LARGE = 2**21  # voxels
PAIRED = 0.7  # strength of each of two degradations, as a share of that of one

logger = logging.getLogger(__name__)


def fit_quality(run: str | Path, device: str | None = None) -> QualityModel | None:
    """Fit and save the quality model of a trained run; None if the training was too short for one to pay."""
    run = Path(run)
    (run / "models" / "quality.npz").unlink(missing_ok=True)
    started = perf_counter()
    samples = quality_samples(run, device)
    if sum(sample.clean and not np.isnan(sample.dice).all() for sample in samples) < 2:
        return None
    model = QualityModel.fit(samples)
    model.save(run)
    seconds = perf_counter() - started
    logger.info("Quality model from %d masks of %d scans: %.0f seconds", model.samples, model.scans, seconds)
    return model


def quality_samples(run: Path, device: str | None = None) -> list[Sample]:
    """What a trained run's quality model is fitted on; empty if the training was too short for one to pay.

    The labelled scans are segmented as they are and degraded in the ways of `degradations`; the random draws belong to
    (scan, number) alone. The number of windows is limited to what takes about a tenth of the training's time.
    """
    plan = read_plan(run / "configs" / "plan.json")
    folder = plain_text(read_config(run / "configs" / "train.yaml").get("dataset_dir", ""))
    lists = cases_of(run)
    seen = {item.get("name") for item in lists.get("training", ())}
    entries = [item for key in ("validation", "training") for item in lists.get(key, ()) if item.get("label")]
    entries = list({str(item.get("name")): item for item in entries}.values())[:SCANS]
    steps = plan["epochs"] * plan["steps_per_epoch"]
    budget = int(steps * plan["batch_size"] * WINDOWS_PER_STEP)
    if folder is None or len(entries) < 2 or budget < FEWEST:
        return []
    predictor = Predictor(run, device=device, trust=True)
    predictor.quality_models, regions = [None], predictor.regions
    items = load_items(entries, folder)
    first = [_read(item, plan) for item in items[:3]]
    windows = float(np.median([_windows(volume, plan) for _, volume, _ in first]))
    voxels = float(np.median([label.size for *_, label in first]))
    count = int(min(MOST, max(budget / windows, min(ENOUGH, steps / 9)), MOST_VOXELS / voxels))
    if count < FEWEST:
        return []
    items = items[: max(2, count // 6)]
    each, samples = count // len(items), []
    for number, item in enumerate(items):
        scan, volume, label = first[number] if number < len(first) else _read(item, plan)
        for degraded, clean in _forms(scan.name, volume, label, each, number * each):
            form = degraded.as_volume(volume)
            try:
                prediction = predictor.segment(prepare_volume(form, scan, predictor.models, perf_counter()))
            except MedsegError as error:
                logger.debug("%s: %s", scan.name, error)
                continue
            mask, known = class_indices(prediction.mask, plan | {"ignore_label": None}), degraded.label >= 0
            dice = dice_per_class(mask[known], degraded.label[known], len(plan["labels"]), regions)
            dice = np.zeros_like(dice) if degraded.foreign else dice
            samples.append(Sample(scan.name, prediction.evidence[0], dice, clean, scan.name not in seen))
    return samples


def _read(item: dict[str, Any], plan: dict[str, Any]) -> tuple[Scan, Volume, npt.NDArray[np.int16]]:
    """A labelled scan; of a large one, the structures and what is around them."""
    images = [item["image"]] if isinstance(item["image"], str) else item["image"]
    scan = Scan(str(item["name"]), tuple(map(Path, images)))
    volume = read_scan(scan, len(plan["channels"]))
    label = class_indices(read_nifti(Path(item["label"])).data.reshape(volume.data.shape[:3]), plan, item["label"])
    inside = np.argwhere(label > 0)
    if label.size > LARGE and len(inside):
        margin = np.ceil(MARGIN_MM / volume.grid.spacing).astype(int)
        box = tuple(
            slice(max(0, a), b)
            for a, b in zip(inside.min(axis=0) - margin, inside.max(axis=0) + margin + 1, strict=True)
        )
        volume, label = replace(volume, data=volume.data[box]), label[box]
    return scan, volume, label


def _windows(volume: Volume, plan: dict[str, Any]) -> float:
    """About how many windows of the network a scan takes."""
    size = np.sort(np.asarray(volume.data.shape[:3]) * volume.grid.spacing)
    patch = np.sort(np.asarray(plan["patch_size"]) * plan["spacing"])
    step = patch * (1 - plan["inference"]["overlap"])
    return float(np.prod(np.maximum(1, np.ceil((size - patch) / step) + 1)))


def _forms(
    name: str, volume: Volume, label: npt.NDArray[np.int16], count: int, offset: int
) -> Iterator[tuple[Degraded, bool]]:
    """The scan as it is, and ``count - 1`` degraded forms, whose kinds go on from those of the scan before.

    Every other one has a second, weaker fault on top: with such pairs, faults of unknown kinds are predicted better.
    """
    original = Degraded(volume.channels_first.astype(np.float32, copy=False), label)
    yield original, True
    kinds = list(degradations(len(original.image)).values())
    for number, kind in enumerate(islice(cycle(kinds), offset, offset + count - 1)):
        rng = np.random.default_rng(zlib.crc32(f"{name}/{number}".encode()))
        pair = number % 2 == 1
        form = kind(original, (1 - rng.random()) * (PAIRED if pair else 1), rng)
        if pair:
            second = INTENSITY[int(rng.integers(len(INTENSITY)))]
            form = replace(form, image=second(form.image, (1 - rng.random()) * PAIRED, rng))
        yield form, False
