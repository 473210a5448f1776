"""The predictor: a scan in, the mask in the scan's own grid out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_supcon.bundle import Model, load_model, member_runs
from medseg_supcon.datasets import Regions, label_type, mask_labels, output_channels, target_names
from medseg_supcon.errors import ConfigError, DataError, RunError
from medseg_supcon.inference.components import postprocess
from medseg_supcon.inference.devices import Predict, share_out
from medseg_supcon.inference.dicom_seg import DicomSegWriter
from medseg_supcon.inference.find_scans import find_scans, refuse_equal_names
from medseg_supcon.inference.folder import Progress, Report, predict_folder, segment_each, sentence, write_result
from medseg_supcon.inference.manifest import describe
from medseg_supcon.inference.prepare import Prediction, Prepared, adding, label, paint, prepare
from medseg_supcon.inference.sliding_window import activation, batch_on, network_outputs, windows, with_less_memory
from medseg_supcon.networks import classifier_name
from medseg_supcon.quality import PassEvidence, QualityModel, agreement, rate
from medseg_supcon.scans import Scan


class Predictor:
    """Masks of scans from one run, or from several as an ensemble (the mean of their probabilities).

    The masks are those of the bundle's own ``inference.yaml``, except for voxels where two classes tie to within
    rounding. Memory is bounded: with one run and without ``probabilities``, all classes are in memory only for one
    patch's depth at a time.

    Args:
        run: a run's folder, or several; a folder of ``medseg train --folds`` stands for its folds. Or the name of a bundle
            that comes with this package: "hippocampus".
        device: "cpu", "cuda", "cuda:1", ...; None: the first GPU, or the CPU. With several, "cuda:0,cuda:1", `run` shares
            the scans out to one process per device, and all else uses the first.
        tta: average over mirrorings along the plan's ``flip_axes`` (probabilities, per window).
        trust: accept a run whose config or network is not what medseg writes; it may run any code.
        amp: half precision; None: on GPUs.
        quality: also say how far to trust each mask.
        review_below: a mask is good if the lower end of its predicted Dice is at least this; None: the runs' own.

    Attributes:
        warnings: what users should know about the runs, such as an interrupted training.

    Raises:
        RunError: a run is missing, incomplete, damaged or not trusted; runs of an ensemble differ in labels
            or channels; the device does not exist.
        ConfigError: a run's plan is invalid.

    Example:
        >>> predictor = Predictor("RUN")  # doctest: +SKIP
        >>> predictor.predict("scan.nii.gz").mask.shape  # doctest: +SKIP
        (240, 240, 155)
    """

    def __init__(
        self,
        run: str | Path | Sequence[str | Path],
        device: str | torch.device | None = None,
        tta: bool = False,
        trust: bool = False,
        amp: bool | None = None,
        quality: bool = True,
        review_below: float | None = None,
    ) -> None:
        runs = [member for path in ([run] if isinstance(run, str | Path) else run) for member in member_runs(path)]
        if not runs:
            raise ValueError("run must name at least one run folder, got an empty list")
        self.devices = [_device(name) for name in (device.split(",") if isinstance(device, str) else [device])]
        self.device = self.devices[0]
        self.arguments = {"run": [str(Path(path).resolve()) for path in runs], "tta": tta, "trust": trust, "amp": amp}
        self.arguments |= {"quality": quality, "review_below": review_below}
        self.models: list[Model] = [load_model(path, trust) for path in runs]
        self.tta = tta
        self.amp = self.device.type == "cuda" if amp is None else amp
        self.plan = self.models[0].plan
        self.regions = Regions.of(self.plan)
        self.rates, self.review_below = quality, review_below
        self.quality_models = [QualityModel.load(path) if quality else None for path in runs]
        self.warnings = [warning for model in self.models for warning in model.warnings]
        for path, model in zip(runs[1:], self.models[1:], strict=True):
            for key in ("labels", "channels", "regions", "regions_class_order"):
                # As text: classes in another order are other classes.
                if json.dumps(model.plan.get(key)) != json.dumps(self.plan.get(key)):
                    found = f"differ in {key} ({model.plan.get(key)}, {self.plan.get(key)})"
                    raise RunError(f"{path} and {runs[0]} {found}. An ensemble needs runs of the same task.")

    @property
    def labels(self) -> dict[str, Any]:
        """Class name -> value in the masks, in class order, the background first; of regions, lists of values."""
        return mask_labels(self.plan)

    def find_scans(self, paths: Iterable[str | Path]) -> list[Scan]:
        """`find_scans` with the model's channels."""
        return find_scans(paths, self.plan["channels"])

    def predict(self, scan: Scan | str | Path, probabilities: bool = False) -> Prediction:
        """Segment one scan.

        Raises:
            DataError: it cannot be read, is not a scan that the model takes, or is a folder of several.
        """
        if not isinstance(scan, Scan):
            found = self.find_scans([scan])
            if len(found) > 1:
                names = ", ".join(one.name for one in found[:3])
                raise DataError(f"{scan} contains {len(found)} scans ({names}, ...), expected one. Pass one of them.")
            scan = found[0]
        return self.segment(self.prepare(scan), probabilities)

    def run(
        self,
        scans: Iterable[Scan | str | Path],
        out: str | Path,
        probabilities: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
        dicom_seg: bool = False,
        pictures: bool = False,
    ) -> dict[str, Any]:
        """Segment scans into a folder; a scan that fails is reported, and the rest continue.

        Args:
            scans: `Scan`s, or files and folders; two that would get one name are both refused.
            out: gets ``<name>.nii.gz`` per scan, ``manifest.json``, ``quality.csv``, and a folder of ``probabilities``.
            probabilities: write (X, Y, Z, K) float32 NIfTI to ``out/probabilities`` too.
            overwrite: replace files that exist; otherwise their scans are skipped, with a warning if another model
                or other settings made them.
            dicom_seg: write ``<name>.seg.dcm`` too, a DICOM segmentation object (see `DicomSegWriter`).
            progress: called with (scans done, scans in total, the scan's entry of the manifest) after each.
            pictures: also write ``review.html``, a page that shows scans and masks, worst first.

        Returns:
            the content of ``manifest.json`` for this call's scans: ``scans`` (each with ``status`` "done",
            "skipped" or "failed", and ``error``), ``summary`` (how many of each).

        Raises:
            RunError: the folder cannot be written to.
            ConfigError: `dicom_seg` without highdicom.
        """
        given = list(scans)
        ready = [scan for scan in given if isinstance(scan, Scan)]
        ready += self.find_scans(scan for scan in given if not isinstance(scan, Scan))
        ready = refuse_equal_names(list(dict.fromkeys(ready)))  # a scan given twice is one scan
        head = describe(self.models, self.tta, self.device, self.amp)
        files = {
            "out": Path(out),
            "labels": head["labels"],
            "dicom_seg": DicomSegWriter(self.models) if dicom_seg else None,
        }
        each = partial(self._run_each, probabilities, files)
        if len(self.devices) > 1:
            head["device"] = ",".join(map(str, self.devices))
            start = partial(_start, self.arguments, probabilities, files | {"dicom_seg": dicom_seg})
            each = partial(share_out, list(map(str, self.devices)), start)
        return predict_folder(
            each, head, ready, Path(out), probabilities, overwrite, progress, files["dicom_seg"], pictures
        )

    def _run_each(self, probabilities: bool, files: dict[str, Any], scans: Iterable[Scan], report: Report) -> None:
        write = partial(write_result, **files)
        segment_each(scans, self.prepare, lambda prepared: self.segment(prepared, probabilities), write, report)

    def prepare(self, scan: Scan) -> Prepared:
        """Read and preprocess a scan; needs no GPU, so that it can run beside `segment`. DataError as for `predict`."""
        return prepare(scan, self.models)

    def segment(self, prepared: Prepared, probabilities: bool = False) -> Prediction:
        """The mask of a prepared scan; if the GPU's memory is too small, it is tried again with less.

        DataError if the network's output is NaN or infinite; MemoryError or torch's own error if one window on the CPU
        needs too much memory.
        """
        started, warnings = time.perf_counter(), list(prepared.warnings)
        infer = partial(self._infer, prepared, probabilities)
        batch = self.plan["inference"]["sw_batch_size"]
        classes, scores, passes, masks = with_less_memory(infer, self.device, batch, warnings)
        postprocess(classes, self.plan, 1000 * prepared.grid.voxel_ml)
        if not classes.any():
            warnings.append("no structure was found: the mask is empty")
        evidence = [
            p.of(classes, prepared.grid.spacing, m.plan["spacing"]) for p, m in zip(passes, self.models, strict=False)
        ]
        quality = None
        if evidence:
            together = agreement(masks, len(self.labels), self.regions) if len(masks) > 1 else None
            models, below = self.quality_models, self.review_below
            quality = rate(self.plan, prepared.grid, evidence, models, prepared.doubts, together, below)
        labels = self.plan["labels"].values()
        values = np.array(list(labels), dtype=label_type(labels))
        seconds = prepared.seconds + time.perf_counter() - started
        return Prediction(prepared.name, values[classes], scores, prepared.grid, seconds, warnings, quality, evidence)

    @torch.inference_mode()
    def _infer(
        self, prepared: Prepared, probabilities: bool, device: torch.device, buffers: torch.device, batch: int
    ) -> tuple[
        npt.NDArray[np.integer[Any]], npt.NDArray[np.float32] | None, list[PassEvidence], list[npt.NDArray[Any]]
    ]:
        """Class indices (X, Y, Z), probabilities (K, X, Y, Z) if they are wanted, and per run what its pass showed and,
        in an ensemble, its own class indices.
        """
        shape, count, members = prepared.grid.shape[:3], output_channels(self.plan), len(self.models)
        classes = np.zeros(shape, dtype=np.uint8 if len(self.plan["labels"]) <= 256 else np.uint16)
        scores = np.zeros((count, *shape), dtype=np.float32) if probabilities or members > 1 else None
        passes: list[PassEvidence] = []
        masks = [np.zeros_like(classes) for _ in self.models] if members > 1 else [classes]
        for model, (image, way_back), mask in zip(self.models, prepared.images, masks, strict=True):
            patch, overlap = model.plan["patch_size"], model.plan["inference"]["overlap"]
            outputs = network_outputs(model, device, self.tta, self.amp and device.type == self.device.type)
            image = image.as_tensor().to(buffers)
            activate = None if self.tta else activation(self.plan)
            if self.rates:
                rated = len(target_names(self.plan)) + 1
                passes.append(PassEvidence(_classifier(model), image, rated, not self.tta, self.regions))
                outputs = passes[-1].windows(outputs)
            chunks = windows(image, outputs, patch, overlap, batch_on(device, batch, patch), device, buffers)
            chunks = _finite(chunks, f"{prepared.name}: the output of the network of {model.name}")
            if self.rates:
                chunks, activate = passes[-1].chunks(chunks), None
            blocks = way_back.blocks(chunks, activate)
            if scores is not None:
                blocks = adding(scores, way_back.order, blocks, members)
            if self.regions is None:
                label(mask, way_back.order, blocks)
            else:
                paint(mask, way_back.order, blocks, self.regions.written)
        if scores is not None and members > 1:
            joined = scores.argmax(axis=0) if self.regions is None else self.regions.paint(scores)
            classes = joined.astype(classes.dtype)
        return classes, scores if probabilities else None, passes, masks


def _start(arguments: dict[str, Any], probabilities: bool, files: dict[str, Any], device: str) -> Predict:
    """In the process of a device: what predicts the scans there."""
    predictor = Predictor(device=device, **arguments)
    writer = DicomSegWriter(predictor.models) if files["dicom_seg"] else None

    def predict(scans: Iterable[Scan], report: Report) -> None:
        def tell(scan: Scan, outcome: dict[str, Any] | BaseException) -> None:
            report(scan, DataError(sentence(scan, outcome)) if isinstance(outcome, BaseException) else outcome)

        predictor._run_each(probabilities, files | {"dicom_seg": writer}, scans, tell)

    return predict


def _classifier(model: Model) -> torch.nn.Module | None:
    """The layer that reads a network's features; None if it is not a 1x1x1 convolution."""
    try:
        return model.network.get_submodule(classifier_name(model.network))
    except ConfigError:
        return None


def _finite(chunks: Iterable[Tensor], what: str) -> Iterator[Tensor]:
    for chunk in chunks:
        if not torch.isfinite(chunk.sum()):  # a sum is one pass, and NaN and infinity stay in it
            raise DataError(f"{what} contains NaN or infinity. Check the intensities of the scan.")
        yield chunk


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device {str(name)!r} cannot be used ({reason}). Try --device cpu.") from error
    return device
