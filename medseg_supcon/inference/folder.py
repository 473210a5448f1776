"""Predicts many scans into a folder: reading, inference and writing run in parallel, and a manifest lists the outcome."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise, tee
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medseg_supcon.errors import DataError, MedsegError, RunError
from medseg_supcon.files import remove_leftovers, temporary_name
from medseg_supcon.inference.dicom_seg import SEG_ENDING, DicomSegWriter
from medseg_supcon.inference.find_scans import keep_names
from medseg_supcon.inference.manifest import Manifest, entry_of
from medseg_supcon.inference.prepare import Prediction, Prepared
from medseg_supcon.inference.sliding_window import is_out_of_memory
from medseg_supcon.quality import folder_entries, write_page, write_table
from medseg_supcon.scans import Scan, is_mask_of, is_whole, read_nifti, write_nifti

Progress = Callable[[int, int, dict[str, Any]], None]
Report = Callable[[Scan, dict[str, Any] | BaseException], None]
Result = TypeVar("Result")
FULL = "Free disk space, or choose another --out."
CURES = {errno.ENAMETOOLONG: "Give the scan a shorter name.", errno.ENOSPC: FULL, errno.EDQUOT: FULL}
logger = logging.getLogger(__name__)


def segment_each(
    scans: Iterable[Scan],
    prepare: Callable[[Scan], Prepared],
    segment: Callable[[Prepared], Prediction],
    write: Callable[[Scan, Prediction], Result],
    report: Callable[[Scan, Result | BaseException], None],
) -> None:
    """``write(scan, segment(prepare(scan)))`` of each scan; one thread reads ahead and one writes, while this one segments.

    ``report`` is called in this thread, in order, with what ``write`` returned or what one of the three raised. After
    Ctrl-C the last mask is still finished and reported.
    """
    pending: list[tuple[Scan, Future[Result]]] = []

    def finish() -> None:
        if pending:
            scan, future = pending[0]
            outcome = future.exception() or future.result()
            pending.clear()
            report(scan, outcome)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        scans, to_read = tee(scans)
        reading = chain((reader.submit(prepare, scan) for scan in to_read), [Future[Prepared]()])
        try:
            for (prepared, _), scan in zip(pairwise(reading), scans, strict=True):  # the next is being read
                try:
                    prediction = segment(prepared.result())
                except Exception as error:
                    finish()
                    report(scan, error)
                else:
                    finish()
                    pending.append((scan, writer.submit(write, scan, prediction)))
            finish()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            finish()
            raise


def predict_folder(
    predict_each: Callable[[Sequence[Scan], Report], None],
    head: dict[str, Any],
    scans: Sequence[Scan],
    out: Path,
    probabilities: bool,
    overwrite: bool,
    progress: Progress | None,
    dicom_seg: DicomSegWriter | None = None,
    pictures: bool = False,
) -> dict[str, Any]:
    """See `Predictor.run`; ``head`` is that of the manifest, from `describe`.

    ``predict_each`` predicts scans and writes their masks; it may report them in any order.
    """
    make_writable(out)
    manifest = Manifest(out / "manifest.json", head)
    scans = keep_names(scans, manifest.earlier)

    def report(scan: Scan, outcome: dict[str, Any] | BaseException) -> None:
        if isinstance(outcome, BaseException):
            entry = {"name": scan.name, "status": "failed", "error": sentence(scan, outcome)}
        else:  # the next call finds the mask of a DICOM series by its digest
            entry = outcome | ({"series": scan.series} if scan.series else {})
        manifest.add(entry)
        if progress is not None:
            progress(len(manifest.entries), len(scans), entry)

    try:
        todo = []
        for scan in scans:
            outcome = _without_work(scan, out, probabilities, overwrite, manifest, dicom_seg)
            if outcome is None:
                todo.append(scan)
            else:
                report(scan, outcome)
        predict_each(todo, report)
    finally:
        manifest.arrange([scan.name for scan in todo])
        manifest.write()
    made = {entry["name"]: entry for entry in manifest.entries if entry["status"] != "failed"}
    if rated := [entry for entry in (manifest.earlier | made).values() if entry.get("quality")]:
        write_table(out / "quality.csv", rated, list(head["labels"])[1:])
    if pictures and any(entry["status"] != "failed" for entry in manifest.entries):
        entries, labels, notes = folder_entries(out, scans)
        write_page(out / "review.html", entries, labels, out.absolute().name, notes)
    return manifest.content()


def write_result(
    scan: Scan, prediction: Prediction, *, out: Path, labels: dict[str, float], dicom_seg: DicomSegWriter | None
) -> dict[str, Any]:
    """Write the files of a segmented scan; its entry of the manifest."""
    entry, file = entry_of(prediction, labels), f"{scan.name}.nii.gz"
    try:
        if prediction.probabilities is not None:
            (out / "probabilities").mkdir(exist_ok=True)
            scores = np.moveaxis(prediction.probabilities, 0, -1)
            write_nifti(out / "probabilities" / file, scores, prediction.grid)
        if os.path.exists(out / f"{scan.name}{SEG_ENDING}"):  # noqa: PTH110 - of the mask that is replaced now
            (out / f"{scan.name}{SEG_ENDING}").unlink()
        # The mask comes last: if it exists, the scan is finished.
        write_nifti(out / file, prediction.mask, prediction.grid)
    except OSError as error:
        cure = CURES.get(error.errno or 0, "Choose another --out.")
        reason = error.strerror or error
        raise DataError(f"{out / file}: the mask could not be written ({reason}). {cure}") from error
    if dicom_seg is not None:
        try:
            dicom_seg.write(prediction.mask, scan, out)
        except DataError as error:
            return {**entry, "status": "failed", "error": str(error)}
    return entry


def sentence(scan: Scan, error: BaseException) -> str:
    """A sentence about a scan that failed."""
    if isinstance(error, MedsegError):
        return str(error)
    if is_out_of_memory(error):
        cure = "Close other programs, or use a machine with more memory."
        return f"{scan.source}: not enough memory for this scan. {cure}"
    logger.debug("%s", scan.name, exc_info=error)
    return f"{scan.source}: the prediction failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})."


def _without_work(
    scan: Scan,
    out: Path,
    probabilities: bool,
    overwrite: bool,
    manifest: Manifest,
    dicom_seg: DicomSegWriter | None,
) -> dict[str, Any] | DataError | None:
    """The entry of a scan that an earlier call finished, or why it is refused; None: it needs a prediction."""
    if scan.problem is not None:
        return DataError(scan.problem)
    mask = out / f"{scan.name}.nii.gz"
    for result in (mask, out / f"{scan.name}{SEG_ENDING}"):
        # Path.exists raises if a name is too long
        if os.path.exists(result) and any(os.path.exists(file) and result.samefile(file) for file in scan.files):  # noqa: PTH110
            return DataError(f"{result}: the mask would replace the scan itself. Choose another --out.")
    if not os.path.exists(mask):  # noqa: PTH110
        return None
    if overwrite or not is_whole(mask):
        return None
    theirs = manifest.earlier.get(scan.name, {}).get("series")
    other_series = bool(scan.series and theirs) and theirs != scan.series
    if other_series or not is_mask_of(mask, scan):
        why = "it is another DICOM series" if other_series else "shape or affine differ"
        cure = "Choose another --out, or replace it with --overwrite."
        return DataError(f"{scan.source}: {mask} already exists and belongs to another scan ({why}). {cure}")
    if probabilities and not (out / "probabilities" / mask.name).exists():
        return None
    if dicom_seg is not None and not os.path.exists(out / f"{scan.name}{SEG_ENDING}"):  # noqa: PTH110
        if not manifest.is_ours(scan.name):
            cure = "Replace it with --overwrite, or choose another --out."
            reason = "the manifest does not say that this model made it"
            return DataError(f"{scan.source}: no DICOM segmentation is made of {mask}: {reason}. {cure}")
        try:
            dicom_seg.write(read_nifti(mask).data, scan, out)
        except DataError as error:
            return error
    return manifest.skipped(scan.name)


def make_writable(out: Path) -> None:
    """Make a folder for masks, without leftovers of a killed process; RunError if files cannot be written there."""
    probe = temporary_name(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        remove_leftovers(out / "probabilities")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{out}: masks cannot be written there ({error.strerror}). Choose another --out.") from error
