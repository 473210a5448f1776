"""Many scans into a folder: reading, inference and writing side by side, and a manifest of the outcome."""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from medseg_supcon.errors import DataError, MedsegError, RunError
from medseg_supcon.files import remove_leftovers, temporary_name
from medseg_supcon.inference.dicom_seg import SEG_ENDING, DicomSegWriter
from medseg_supcon.inference.find_scans import keep_names
from medseg_supcon.inference.manifest import Manifest, entry_of
from medseg_supcon.inference.memory import is_out_of_memory
from medseg_supcon.inference.prepare import Prediction, Prepared
from medseg_supcon.scans import Scan, is_mask_of, is_whole, read_nifti, write_nifti

Progress = Callable[[int, int, dict[str, Any]], None]
CURES = {
    errno.ENAMETOOLONG: "Give the scan a shorter name.",
    errno.EACCES: "Choose another --out, or change its permissions.",
    errno.ENOSPC: "Free disk space, or choose another --out.",
    errno.EDQUOT: "Free disk space, or choose another --out.",
}
logger = logging.getLogger(__name__)


def predict_folder(
    prepare: Callable[[Scan], Prepared],
    segment: Callable[[Prepared, bool], Prediction],
    head: dict[str, Any],
    scans: Sequence[Scan],
    out: Path,
    probabilities: bool,
    overwrite: bool,
    progress: Progress | None,
    dicom_seg: DicomSegWriter | None = None,
) -> dict[str, Any]:
    """See `Predictor.run`.

    Args:
        prepare: reads and preprocesses a scan.
        segment: makes its mask, and probabilities if wanted.
        head: of the manifest, from `describe`.
        dicom_seg: writes a DICOM segmentation object beside each mask.
    """
    make_writable(out)
    manifest = Manifest(out / "manifest.json", head)
    scans = keep_names(scans, manifest.earlier)
    total, finished = len(scans), 0

    def report(entry: dict[str, Any]) -> None:
        nonlocal finished
        finished += 1
        manifest.add(entry)
        if progress is not None:
            progress(finished, total, entry)

    todo = []
    for scan in scans:
        entry = _without_work(scan, out, probabilities, overwrite, manifest, dicom_seg)
        if entry is None:
            todo.append(scan)
        else:
            report(entry)
    # One thread reads the next scan and one writes the last mask, while this one segments.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pending: tuple[Scan, Future[dict[str, Any]]] | None = None
        try:
            for scan, prepared in read_ahead(reader, prepare, todo):
                outcome: Prediction | dict[str, Any]
                try:
                    outcome = segment(prepared.result(), probabilities)
                except Exception as error:
                    outcome = _failed(scan, error)
                if pending is not None:
                    report(_written(*pending))
                    pending = None
                if isinstance(outcome, dict):
                    report(outcome)
                else:
                    pending = scan, writer.submit(_write, outcome, out, head["labels"], scan, dicom_seg)
            if pending is not None:
                report(_written(*pending))
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            with suppress(RunError):
                if pending is not None:  # Ctrl-C: the last mask is finished, and listed
                    manifest.add(_written(*pending))
                manifest.write()
            raise
    manifest.write()
    return manifest.of_this_call()


def read_ahead(
    reader: ThreadPoolExecutor, prepare: Callable[[Scan], Prepared], scans: Sequence[Scan]
) -> Iterator[tuple[Scan, Future[Prepared]]]:
    """Each scan with its future, when the next one is being read; at most two are in memory."""
    coming: deque[tuple[Scan, Future[Prepared]]] = deque()
    for scan in scans:
        coming.append((scan, reader.submit(prepare, scan)))
        if len(coming) == 2:
            yield coming.popleft()
    while coming:
        yield coming.popleft()


def _write(
    prediction: Prediction, out: Path, labels: dict[str, float], scan: Scan, dicom_seg: DicomSegWriter | None
) -> dict[str, Any]:
    entry = entry_of(prediction, labels)
    if prediction.probabilities is not None:
        (out / "probabilities").mkdir(exist_ok=True)
        scores = np.moveaxis(prediction.probabilities, 0, -1)
        write_nifti(out / "probabilities" / f"{prediction.name}.nii.gz", scores, prediction.grid)
    earlier = out / f"{prediction.name}{SEG_ENDING}"
    if os.path.exists(earlier):  # noqa: PTH110 - of the mask that is replaced now
        earlier.unlink()
    # The mask comes last: if it exists, the scan is finished.
    write_nifti(out / f"{prediction.name}.nii.gz", prediction.mask, prediction.grid)
    if dicom_seg is not None:
        try:
            dicom_seg.write(prediction.mask, scan, out)
        except DataError as error:
            return {**entry, "status": "failed", "error": str(error)}
    return entry


def _written(scan: Scan, future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return _with_series(scan, future.result())
    except Exception as error:
        return _failed(scan, error, writing=True)


def _with_series(scan: Scan, entry: dict[str, Any]) -> dict[str, Any]:
    """The next call finds the mask of a DICOM series by its digest."""
    return entry | ({"series": scan.series} if scan.series else {})


def _failed(scan: Scan, error: Exception, writing: bool = False) -> dict[str, Any]:
    if isinstance(error, MedsegError):
        sentence = str(error)
    elif is_out_of_memory(error):
        sentence = (
            f"{scan.source}: not enough memory for this scan. Close other programs, or use a machine with more memory."
        )
    elif isinstance(error, OSError) and writing:
        cure = CURES.get(error.errno or 0, "Choose another --out.")
        sentence = (
            f"{scan.source}: the mask {scan.name}.nii.gz could not be written ({error.strerror or error}). {cure}"
        )
    else:
        reason = " ".join(str(error).split())[:200]
        sentence = f"{scan.source}: the prediction failed ({type(error).__name__}: {reason})."
        logger.debug("%s", scan.name, exc_info=error)
    return {"name": scan.name, "status": "failed", "error": sentence}


def _without_work(
    scan: Scan,
    out: Path,
    probabilities: bool,
    overwrite: bool,
    manifest: Manifest,
    dicom_seg: DicomSegWriter | None,
) -> dict[str, Any] | None:
    """The entry of a scan that needs no prediction: refused, or finished by an earlier call."""
    if scan.problem is not None:
        return {"name": scan.name, "status": "failed", "error": scan.problem}
    mask = out / f"{scan.name}.nii.gz"
    for result in (mask, out / f"{scan.name}{SEG_ENDING}"):
        # Path.exists raises if a name is too long
        if os.path.exists(result) and any(os.path.exists(file) and result.samefile(file) for file in scan.files):  # noqa: PTH110
            sentence = f"{result}: the mask would replace the scan itself. Choose another --out."
            return {"name": scan.name, "status": "failed", "error": sentence}
    if not os.path.exists(mask):  # noqa: PTH110
        return None
    if overwrite or not is_whole(mask):
        return None
    theirs = manifest.earlier.get(scan.name, {}).get("series")
    other_series = bool(scan.series and theirs) and theirs != scan.series
    if other_series or not is_mask_of(mask, scan):
        why = "it is another DICOM series" if other_series else "shape or affine differ"
        sentence = (
            f"{scan.source}: {mask} already exists and belongs to another scan ({why}). Choose another --out, "
            "or replace it with --overwrite."
        )
        return {"name": scan.name, "status": "failed", "error": sentence}
    if probabilities and not (out / "probabilities" / mask.name).exists():
        return None
    if dicom_seg is not None and not os.path.exists(out / f"{scan.name}{SEG_ENDING}"):  # noqa: PTH110
        try:
            if not manifest.is_ours(scan.name):
                raise DataError(
                    f"{scan.source}: no DICOM segmentation is made of {mask}: its manifest does not say that this model made "
                    "it. Replace it with --overwrite, or choose another --out."
                )
            dicom_seg.write(read_nifti(mask).data, scan, out)
        except DataError as error:
            return {"name": scan.name, "status": "failed", "error": str(error)}
    return _with_series(scan, manifest.skipped(scan.name))


def make_writable(out: Path) -> None:
    """Make a folder for masks, without leftovers of a killed process.

    Raises:
        RunError: files cannot be written there.
    """
    probe = temporary_name(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        remove_leftovers(out / "probabilities")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{out}: masks cannot be written there ({error.strerror}). Choose another --out.") from error
