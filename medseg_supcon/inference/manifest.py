"""manifest.json: the outcome of each scan, and which model made it. It names scans, and contains nothing of a patient."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medseg_supcon import __version__
from medseg_supcon.bundle import Model
from medseg_supcon.datasets import is_in, mask_labels
from medseg_supcon.errors import RunError
from medseg_supcon.files import folder_lock, write_whole
from medseg_supcon.inference.prepare import Prediction
from medseg_supcon.scans import Grid, read_nifti

STATUSES = ("done", "skipped", "failed")
EXISTED = "the mask already existed"
PAUSE = 20  # times as long as the last writing took: rewriting a long file after every scan is quadratic
PACKAGES = ("torch", "monai", "numpy", "nibabel", "pydicom", "SimpleITK", "scipy")
# The parts of a plan that affect the mask; the number of windows per batch does not.
DECISIVE = (
    "channels", "orientation", "spacing", "intensity", "patch_size", "network_def", "keep_largest", "smallest_mm3",
)  # fmt: skip
logger = logging.getLogger(__name__)


def describe(models: Sequence[Model], tta: bool, device: torch.device, amp: bool) -> dict[str, Any]:
    """The head of a manifest: models, settings and software."""
    packages = {"python": platform.python_version(), "medseg-supcon": __version__}
    for package in PACKAGES:
        packages[package] = "unknown"
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    settings: list[Any] = []
    for model in models:
        plan, flips = model.plan, model.plan["flip_axes"] if tta else []
        settings += [list(plan["labels"].items()), plan["inference"]["overlap"], flips]
        settings += [list(plan.get("regions", {}).items()), plan.get("regions_class_order")]
        settings += [model.preprocessing_def, *(plan.get(key) for key in DECISIVE)]
    return {
        "models": [{"name": model.name, "sha256": model.sha256} for model in models],
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "labels": mask_labels(models[0].plan),
        "tta": tta,
        "device": str(device),
        "half_precision": amp,
        "packages": packages,
        "warnings": [warning for model in models for warning in model.warnings],
    }


def entry_of(prediction: Prediction, labels: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a segmented scan."""
    return {
        "name": prediction.name,
        "status": "done",
        "seconds": round(prediction.seconds, 3),
        **_mask_facts(prediction.mask, prediction.grid, labels),
        "warnings": list(prediction.warnings),
        **({"quality": prediction.quality} if prediction.quality is not None else {}),
    }


def _mask_facts(mask: npt.NDArray[Any], grid: Grid, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, spacing, and per foreground class or region voxels, volume (ml) and whether it touches the border."""
    border = np.concatenate([mask.take(i, axis).ravel() for axis in range(3) for i in (0, -1)])
    facts = {}
    for name, value in list(labels.items())[1:]:
        voxels, touches = int(np.count_nonzero(is_in(mask, value))), bool(is_in(border, value).any())
        volume = round(voxels * grid.voxel_ml, 4)
        facts[name] = {"value": value, "voxels": voxels, "volume_ml": volume, "touches_border": touches}
    return {"shape": list(mask.shape), "spacing_mm": [round(float(mm), 5) for mm in grid.spacing], "labels": facts}


class Manifest:
    """The entries of a folder of masks; those of earlier calls stay in it.

    Writing the file takes at most a twentieth of the time. A process that is killed can lose the last entries, but not the
    masks: the next call creates their entries again from the masks.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head, self.due = path, head, time.monotonic()
        self.entries: list[dict[str, Any]] = []
        # Distinguishes a mask of this call from one by another model or with other settings.
        self.made_by = {"models": [model["sha256"] for model in head["models"]], "settings": head["settings"]}
        self.earlier, damaged = _read(path)
        if damaged:
            logger.warning("%s: %d of its entries are not in medseg's format, and are ignored", path, damaged)

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry, and write the file if that is due."""
        if entry["status"] == "done" or (entry["status"] == "failed" and "labels" in entry):  # its mask was made now
            entry |= self.made_by
        self.entries.append(entry)
        if time.monotonic() >= self.due:
            self.write()

    def arrange(self, names: Sequence[str]) -> None:
        """Put the entries of some scans into this order, after all others."""
        place = {name: number for number, name in enumerate(names, 1)}
        self.entries.sort(key=lambda entry: place.get(entry["name"], 0))

    def write(self) -> None:
        """Write the file, with what other processes have added to it; RunError if that is not possible."""
        started = time.monotonic()
        tried = {entry["name"] for entry in self.entries}
        made = {entry["name"] for entry in self.entries if entry["status"] != "failed"}
        try:
            with folder_lock(self.path.parent):
                self.earlier, _ = _read(self.path)
                # The mask of an earlier call is still there if this one failed.
                replaced = {"failed": tried, "done": made, "skipped": made}
                kept = [e for e in self.earlier.values() if e["name"] not in replaced[e["status"]]]
                text = json.dumps(self.content(kept), indent=1, allow_nan=False) + "\n"
                write_whole(self.path, lambda file: file.write(text.encode()))
        except OSError as error:
            cure = "Free disk space, or choose another --out. Finished masks are kept."
            raise RunError(f"{self.path} could not be written ({error.strerror}). {cure}") from error
        self.due = time.monotonic() + PAUSE * (time.monotonic() - started)

    def is_ours(self, name: str) -> bool:
        """Whether an earlier entry says that this call's model and settings made a mask."""
        earlier = self.earlier.get(name, {})
        return all(earlier.get(key) == value for key, value in self.made_by.items())

    def skipped(self, name: str) -> dict[str, Any]:
        """The entry of a scan whose mask exists; made from the mask if the file has none."""
        earlier = self.earlier.get(name, {})
        entry = {**earlier, "name": name, "status": "skipped"}
        entry.pop("error", None)
        if not isinstance(entry.get("labels"), dict):
            mask = read_nifti(self.path.parent / f"{name}.nii.gz")
            entry |= _mask_facts(mask.data, mask.grid, self.head["labels"])
        made_by = {key: earlier.get(key) for key in self.made_by}
        if made_by == self.made_by:
            return entry
        if None in made_by.values():
            note = "; the manifest does not say which model made it"
        elif made_by["models"] != self.made_by["models"]:
            note = " and was made by another model"
        else:
            note = " and was made with other settings (plan.json or --tta)"
        warnings = [warning for warning in earlier.get("warnings", []) if not warning.startswith(EXISTED)]
        return {**entry, **made_by, "warnings": [*warnings, EXISTED + note]}

    def content(self, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The manifest: entries of earlier calls, then those of this one."""
        scans = [*earlier, *self.entries]
        counts = {s: sum(entry["status"] == s for entry in scans) for s in STATUSES}
        return {**self.head, "summary": counts, "scans": scans}


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Entries by name, a finished one before a failed one, and how many are not valid."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["scans"]
    except FileNotFoundError:
        return {}, 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        return {}, 1
    valid = [entry for entry in entries if _is_valid(entry)]
    by_name: dict[str, dict[str, Any]] = {}
    for entry in valid:
        if entry["status"] != "failed" or entry["name"] not in by_name:
            by_name[entry["name"]] = entry
    return by_name, len(entries) - len(valid)


def _is_valid(entry: Any) -> bool:
    """Whether an entry has the keys that are read, and can be written again."""
    try:
        json.dumps([[[[entry]]]], indent=1, allow_nan=False)  # deeper than in the file
        name, warnings = entry["name"], entry.get("warnings", [])
        texts = isinstance(warnings, list) and all(isinstance(text, str) for text in (name, *warnings))
        return texts and entry["status"] in STATUSES
    except (ValueError, RecursionError, TypeError, KeyError):  # NaN, infinity, too many levels, or no mapping
        return False
