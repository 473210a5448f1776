"""Many scans into a folder: reading, inference and writing side by side, and a manifest of the outcome."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_supcon.errors import MedsegError, RunError
from medseg_supcon.inference._manifest import Manifest, describe, entry_of
from medseg_supcon.inference._mask import remove_leftovers, write_nifti
from medseg_supcon.inference._memory import is_out_of_memory
from medseg_supcon.inference._scans import Scan

if TYPE_CHECKING:
    from medseg_supcon.inference._predictor import Prediction, Predictor

Progress = Callable[[int, int, dict[str, Any]], None]
logger = logging.getLogger(__name__)


def predict_folder(
    predictor: Predictor,
    scans: Sequence[Scan],
    out: Path,
    probabilities: bool,
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """See `Predictor.run`."""
    _make_writable(out)
    manifest = Manifest(out / "manifest.json", describe(predictor))
    total, finished = len(scans), 0

    def report(entry: dict[str, Any]) -> None:
        nonlocal finished
        finished += 1
        manifest.add(entry)
        if progress is not None:
            progress(finished, total, entry)

    todo = []
    for scan in scans:
        entry = _without_work(scan, out, probabilities, overwrite, manifest)
        if entry is None:
            todo.append(scan)
        else:
            report(entry)
    # One thread reads ahead and one writes behind; at most one scan waits in each.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            ahead: Future[Any] | None = reader.submit(predictor.prepare, todo[0]) if todo else None
            behind: tuple[Scan, Future[dict[str, Any]]] | None = None
            for index, scan in enumerate(todo):
                if ahead is None:  # pragma: no cover  # submitted with the scan before
                    raise RuntimeError("no scan was read ahead")
                current, ahead = ahead, None
                entry, prediction = None, None
                try:
                    prepared = current.result()
                    if index + 1 < len(todo):
                        ahead = reader.submit(predictor.prepare, todo[index + 1])
                    prediction = predictor.segment(prepared, probabilities)
                    del prepared, current
                except Exception as error:
                    entry = _failed(scan, error)
                    if ahead is None and index + 1 < len(todo):
                        ahead = reader.submit(predictor.prepare, todo[index + 1])
                if behind is not None:
                    report(_result(*behind))
                    behind = None
                if prediction is None:
                    report(entry or {})
                else:
                    behind = scan, writer.submit(_write, prediction, out, predictor.labels)
            if behind is not None:
                report(_result(*behind))
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            raise
    return manifest.of_this_call()


def _write(prediction: Prediction, out: Path, labels: dict[str, float]) -> dict[str, Any]:
    entry = entry_of(prediction, labels)
    if prediction.probabilities is not None:
        (out / "probabilities").mkdir(exist_ok=True)
        scores = np.moveaxis(prediction.probabilities, 0, -1)
        write_nifti(out / "probabilities" / f"{prediction.name}.nii.gz", scores, prediction.grid)
    # The mask comes last: where it is, the scan is finished.
    write_nifti(out / f"{prediction.name}.nii.gz", prediction.mask, prediction.grid)
    return entry


def _result(scan: Scan, future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        return _failed(scan, error, writing=True)


def _failed(scan: Scan, error: Exception, writing: bool = False) -> dict[str, Any]:
    if isinstance(error, MedsegError):
        sentence = str(error)
    elif is_out_of_memory(error):
        sentence = (
            f"{scan.source}: there is too little memory for this scan. Free some, or use a larger machine."
        )
    elif isinstance(error, OSError) and writing:
        sentence = (
            f"{scan.source}: the mask {scan.name}.nii.gz could not be written ({error.strerror or error}). "
        )
        sentence += "Free space, or choose another --out."
    else:
        reason = " ".join(str(error).split())[:200]
        sentence = f"{scan.source}: the prediction failed ({type(error).__name__}: {reason})."
        logger.debug("%s", scan.name, exc_info=error)
    return {"name": scan.name, "status": "failed", "error": sentence}


def _without_work(
    scan: Scan, out: Path, probabilities: bool, overwrite: bool, manifest: Manifest
) -> dict[str, Any] | None:
    """The entry of a scan that needs no prediction: refused, or finished by an earlier call."""
    if scan.problem is not None:
        return {"name": scan.name, "status": "failed", "error": scan.problem}
    mask = out / f"{scan.name}.nii.gz"
    if not mask.exists():
        return None
    if any(file.exists() and mask.samefile(file) for file in scan.files):
        sentence = f"{mask}: the mask would replace the scan itself. Choose another --out."
        return {"name": scan.name, "status": "failed", "error": sentence}
    if overwrite or (probabilities and not (out / "probabilities" / mask.name).exists()):
        return None
    return manifest.skipped(scan.name)


def _make_writable(out: Path) -> None:
    probe = out / f".probe.{os.getpid()}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{out}: masks cannot be written there ({error.strerror}). Choose another --out."
        ) from error
