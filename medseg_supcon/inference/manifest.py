"""manifest.json: what became of each scan, with which model. It names scans, and nothing of a patient."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_supcon import __version__
from medseg_supcon.errors import RunError
from medseg_supcon.files import folder_lock, write_whole

if TYPE_CHECKING:
    from medseg_supcon.inference.predictor import Prediction, Predictor

STATUSES = ("done", "skipped", "failed")
JOURNAL = ".medseg-manifest.jsonl"  # entries that are not in the manifest yet, a line each
PAUSE = 5.0  # seconds between two writings of the whole manifest
logger = logging.getLogger(__name__)
PACKAGES = ("torch", "monai", "numpy", "nibabel", "pydicom", "SimpleITK", "scipy")
# What of a plan decides a mask. How many windows go together does not.
DECISIVE = ("channels", "orientation", "spacing", "intensity", "patch_size", "network_def", "keep_largest")


def describe(predictor: Predictor) -> dict[str, Any]:
    """The model and the software, for the manifest's head."""
    packages = {"python": platform.python_version(), "medseg-supcon": __version__}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "unknown"
    return {
        "models": [{"name": model.name, "sha256": model.sha256} for model in predictor.models],
        "settings": _settings(predictor),
        "labels": predictor.labels,
        "tta": predictor.tta,
        "device": str(predictor.device),
        "half_precision": predictor.amp,
        "packages": packages,
    }


def _settings(predictor: Predictor) -> str:
    """SHA-256 of all but the weights that decides a mask: the plans, the preprocessing, --tta."""
    parts: list[Any] = []
    for model in predictor.models:
        plan, flips = model.plan, model.plan["flip_axes"] if predictor.tta else []
        parts += [list(plan["labels"].items()), plan["inference"]["overlap"], flips, model.preprocessing_def]
        parts += [plan[key] for key in DECISIVE]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def entry_of(prediction: Prediction, labels: dict[str, float]) -> dict[str, Any]:
    """A finished scan's entry: per foreground label voxels, volume (ml) and whether it touches the border."""
    mask, found = prediction.mask, {}
    border = np.concatenate([mask.take(i, axis).ravel() for axis in range(3) for i in (0, -1)])
    for name, value in list(labels.items())[1:]:
        voxels = int(np.count_nonzero(mask == value))
        found[name] = {
            "value": value,
            "voxels": voxels,
            "volume_ml": round(voxels * prediction.grid.voxel_ml, 4),
            "touches_border": bool((border == value).any()),
        }
    return {
        "name": prediction.name,
        "status": "done",
        "seconds": round(prediction.seconds, 3),
        "shape": list(prediction.grid.shape),
        "spacing_mm": [round(float(s), 5) for s in prediction.grid.spacing],
        "labels": found,
        "warnings": list(prediction.warnings),
    }


class Manifest:
    """The file, no more than a few seconds behind; entries of earlier calls into the folder stay in it.

    To write it after each of thousands of scans would take longer and longer. What is not in it yet stands in a journal
    beside it, which outlives a process that is killed: whoever reads or writes the manifest next takes it over.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.entries: list[dict[str, Any]] = []
        self.due = time.monotonic()
        self.earlier, odd = _read(path)
        if odd:
            logger.warning("%s: %d of its entries are not as medseg writes them and are left out", path, odd)

    def add(self, entry: dict[str, Any]) -> None:
        """Adds an entry, to the file or to the journal.

        Raises:
            RunError: it cannot be written.
        """
        if entry["status"] == "done":
            entry |= self._made_by()
        if (
            entry not in self.entries[-1:]
        ):  # Ctrl-C may come between this and what follows, and the entry again
            self.entries.append(entry)
        if time.monotonic() >= self.due:
            self.write()
            return
        try:
            with folder_lock(self.path.parent), self.journal.open("a", encoding="utf-8") as stream:
                # begun with a new line: the one before may be a killed process's half
                stream.write("\n" + json.dumps(entry, allow_nan=False))
        except OSError as error:
            raise self._not_written(error) from error

    def write(self) -> None:
        """Writes the file, with what other processes have added to it and to the journal.

        Raises:
            RunError: it cannot be written.
        """
        tried = {entry["name"] for entry in self.entries}
        made = {entry["name"] for entry in self.entries if entry["status"] != "failed"}
        try:
            with folder_lock(self.path.parent):
                self.earlier, _ = _read(self.path)
                # The mask of an earlier call is there still where this one failed.
                kept = [
                    e
                    for e in self.earlier.values()
                    if e["name"] not in (tried if e["status"] == "failed" else made)
                ]
                scans = [*kept, *self.entries]
                text = json.dumps(self._with(scans), indent=1, allow_nan=False) + "\n"
                write_whole(self.path, lambda file: file.write(text.encode()))
                self.journal.unlink(missing_ok=True)
        except OSError as error:
            raise self._not_written(error) from error
        self.due = time.monotonic() + PAUSE

    @property
    def journal(self) -> Path:
        """The file of entries that wait."""
        return self.path.parent / JOURNAL

    def _not_written(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} could not be written ({error.strerror}). Free space or choose another --out; "
            "finished masks stay."
        )

    def skipped(self, name: str) -> dict[str, Any]:
        """The entry of a scan whose mask was there already."""
        earlier = self.earlier.get(name, {})
        entry = {**earlier, "name": name, "status": "skipped"}
        entry.pop("error", None)
        made_by = {key: earlier.get(key) for key in self._made_by()}
        if None in made_by.values():
            note = "the mask was there already, and the manifest does not say what made it"
        elif made_by["models"] != self._made_by()["models"]:
            note = "the mask was there already, made by another model"
        elif made_by != self._made_by():
            note = "the mask was there already, made with other settings (plan.json or --tta)"
        else:
            return entry
        warnings = [w for w in earlier.get("warnings", []) if not w.startswith("the mask was there")]
        return {**entry, **made_by, "warnings": [*warnings, note]}

    def _made_by(self) -> dict[str, Any]:
        """What tells a mask of this call from that of another model or of other settings."""
        models = [model["sha256"] for model in self.head["models"]]
        return {"models": models, "settings": self.head["settings"]}

    def of_this_call(self) -> dict[str, Any]:
        """The manifest without the entries of earlier calls."""
        return self._with(self.entries)

    def _with(self, scans: list[dict[str, Any]]) -> dict[str, Any]:
        counts = {s: sum(entry["status"] == s for entry in scans) for s in STATUSES}
        return {**self.head, "summary": counts, "scans": scans}


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Entries by name, a finished one before a failed one, and how many are not as they should be."""
    waiting = _read_journal(path.parent / JOURNAL)  # first: another process may be moving it into the file
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["scans"]
    except (OSError, ValueError, KeyError, TypeError):
        entries = []
    found: dict[str, dict[str, Any]] = {}
    good = [entry for entry in entries if _is_sound(entry)] if isinstance(entries, list) else []
    for entry in [*good, *waiting]:
        if entry["status"] != "failed" or entry["name"] not in found:
            found[entry["name"]] = entry
    return found, (len(entries) if isinstance(entries, list) else 1) - len(good)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries that wait; not a line that a killed process left half written."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [entry for entry in found if _is_sound(entry)]


def _is_sound(entry: Any) -> bool:
    """Whether an entry has what is read of it."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.get("status") in STATUSES
        and isinstance(warnings := entry.get("warnings", []), list)
        and all(isinstance(warning, str) for warning in warnings)
    )
