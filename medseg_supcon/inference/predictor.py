"""The predictor: a scan in, the mask in the scan's own grid out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation

from medseg_supcon.bundle import Model, load_model
from medseg_supcon.datasets import label_type
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.inference.find_scans import find_scans, refuse_equal_names
from medseg_supcon.inference.folder import predict_folder
from medseg_supcon.inference.memory import attempts, keep_freed_memory
from medseg_supcon.inference.resample import Way
from medseg_supcon.inference.sliding_window import (
    add,
    add_inverse,
    batch_on,
    keep_largest,
    label,
    network_outputs,
    windows,
)
from medseg_supcon.scans import Grid, Scan, Volume, outliers, read_scan

MOST_VOXELS = 4e9  # on the model's grid: 16 GB, a scan of 1600 voxels a side


@dataclass(frozen=True)
class Prepared:
    """A scan read and preprocessed for each model, all on the CPU."""

    name: str
    grid: Grid
    affine: npt.NDArray[np.float64]
    images: list[MetaTensor]
    seconds: float
    warnings: list[str]


def prepare(scan: Scan, models: Sequence[Model]) -> Prepared:
    """Reads a scan and preprocesses it for each model.

    Raises:
        DataError: it cannot be read, or is not a scan that the models take.
    """
    started = time.perf_counter()
    volume = read_scan(scan, len(models[0].plan["channels"]))
    warnings = [*scan.warnings, *(issue.sentence for issue in volume.issues), *_oddities(volume)]
    for model in models:
        _check_size(model, volume, scan)
    images = [_preprocess(model, volume, scan) for model in models]
    return Prepared(
        scan.name, volume.grid, volume.monai_affine, images, time.perf_counter() - started, warnings
    )


def _preprocess(model: Model, volume: Volume, scan: Scan) -> MetaTensor:
    meta = {"original_affine": volume.monai_affine, "spatial_shape": volume.data.shape[:3], "space": "RAS"}
    image = MetaTensor(
        torch.from_numpy(volume.channels_first), affine=torch.from_numpy(volume.monai_affine), meta=meta
    )
    image.meta["original_channel_dim"] = 0
    image.meta["filename_or_obj"] = str(scan.files[0])
    prepared: MetaTensor = model.preprocessing({"image": image})["image"]
    return prepared


def _check_size(model: Model, volume: Volume, scan: Scan) -> None:
    """A header in the wrong unit would ask for more memory than there is, or shrink the body to a voxel."""
    target = np.empty(3)  # mm along R, A, S
    target[axcodes2ornt(model.plan["orientation"])[:, 0].astype(int)] = model.plan["spacing"]
    spacing = np.linalg.norm(volume.monai_affine[:3, :3], axis=0)
    size = volume.data.shape[:3] * spacing / target[io_orientation(volume.monai_affine)[:, 0].astype(int)]
    if np.prod(np.maximum(size, 1)) > MOST_VOXELS or (max(volume.data.shape[:3]) > 3 and size.max() < 1.5):
        sizes = " x ".join(f"{s:.3g}" for s in spacing)
        wanted = " x ".join(f"{s:.3g}" for s in model.plan["spacing"])
        raise DataError(
            f"{scan.source}: its voxels are {sizes} mm by its header, and the model works at {wanted} mm: one of the two "
            "is wrong by far. Correct the header (NIfTI's unit is mm)."
        )


def _oddities(volume: Volume) -> list[str]:
    if volume.data.size and volume.data.min() == volume.data.max():
        return ["all voxels have one value"]
    warnings = ["is a single slice: the model works in 3-D"] if 1 in volume.data.shape[:3] else []
    for number, channel in enumerate(volume.channels_first):
        if (outlier := outliers(channel)) is not None:
            where = f"channel {number}: " if volume.data.ndim == 4 else ""
            value, count = outlier
            warnings.append(
                f"{where}{count} voxels are far outside all others (up to {value:.3g}): after normalisation the others "
                "hardly differ, and the mask may be wrong. Repair them"
            )
    return warnings


@dataclass(frozen=True)
class Prediction:
    """What the model says about one scan.

    Attributes:
        name: the scan's.
        mask: (X, Y, Z) in the scan's own grid, the data set's label values, the smallest type for them.
        probabilities: (K, X, Y, Z) float32 in the classes' order, or None if they were not asked for.
        grid: where the voxels are.
        seconds: for preprocessing and inference.
        warnings: what a person should know before using the mask.
    """

    name: str
    mask: npt.NDArray[Any]
    probabilities: npt.NDArray[np.float32] | None
    grid: Grid
    seconds: float
    warnings: list[str] = field(default_factory=list)


class Predictor:
    """Masks of scans from one run, or from several as an ensemble (the mean of their probabilities).

    Gives the masks of the bundle's own ``inference.yaml``, but for voxels where two classes tie to within
    rounding, in bounded memory: with one run and no ``probabilities`` no more than a patch's depth of all
    classes is held at once.

    Args:
        run: a run's folder, or several.
        device: "cpu", "cuda", "cuda:1", ...; None: a GPU where there is one.
        tta: average over mirrorings along the plan's ``flip_axes`` (probabilities, per window).
        trust: accept a run whose config or network is not of the shape that medseg writes; it is code.
        amp: half precision; None: on GPUs.

    Raises:
        RunError: a run is missing, incomplete, damaged or not trusted; runs of an ensemble differ in labels
            or channels; the device does not exist.
        ConfigError: a run's plan was edited into what no plan can be.

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
    ) -> None:
        runs = [run] if isinstance(run, str | Path) else list(run)
        if not runs:
            raise ValueError("run must name at least one run folder, got an empty list")
        self.device = _device(device)
        self.models: list[Model] = [load_model(path, trust) for path in runs]
        self.tta = tta
        self.amp = self.device.type == "cuda" if amp is None else amp
        self.plan = self.models[0].plan
        for path, model in zip(runs[1:], self.models[1:], strict=True):
            for key in ("labels", "channels"):
                # As text: classes in another order are other classes.
                if json.dumps(model.plan[key]) != json.dumps(self.plan[key]):
                    raise RunError(
                        f"{path} and {runs[0]} differ in {key} ({model.plan[key]}, {self.plan[key]}). "
                        "Only runs for one task can predict together."
                    )

    @property
    def labels(self) -> dict[str, float]:
        """Class name -> value in the masks, in class order."""
        return dict(self.plan["labels"])

    def find_scans(self, paths: Iterable[str | Path]) -> list[Scan]:
        """`find_scans` with the model's channels."""
        return find_scans(paths, self.plan["channels"])

    def predict(self, scan: Scan | str | Path, probabilities: bool = False) -> Prediction:
        """Segments one scan.

        Raises:
            DataError: it cannot be read, is not a scan that the model takes, or is a folder of several.
        """
        if not isinstance(scan, Scan):
            found = self.find_scans([scan])
            if len(found) > 1:
                names = ", ".join(one.name for one in found[:3])
                raise DataError(
                    f"{scan}: holds {len(found)} scans ({names}, ...), expected one. Give one of them."
                )
            scan = found[0]
        return self.segment(self.prepare(scan), probabilities)

    def run(
        self,
        scans: Iterable[Scan | str | Path],
        out: str | Path,
        probabilities: bool = False,
        overwrite: bool = False,
        progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Segments scans into a folder; a scan that fails is reported and the rest go on.

        Args:
            scans: `Scan`s, or files and folders; two that would get one name are both refused.
            out: gets ``<name>.nii.gz`` per scan, ``manifest.json``, and a folder of ``probabilities``.
            probabilities: write (X, Y, Z, K) float32 NIfTI to ``out/probabilities`` too.
            overwrite: redo scans that have their files already; otherwise they are skipped, with a warning where
                another model or other settings made them.
            progress: called with (scans done, scans in all, the scan's entry of the manifest) after each.

        Returns:
            what ``manifest.json`` holds, of this call's scans: ``scans`` (each with ``status`` "done",
            "skipped" or "failed", and ``error``), ``summary`` (how many of each).

        Raises:
            RunError: the folder cannot be written to.
        """
        given = list(scans)
        ready = [scan for scan in given if isinstance(scan, Scan)]
        if len(ready) < len(given):
            ready += self.find_scans(scan for scan in given if not isinstance(scan, Scan))
        ready = refuse_equal_names(list(dict.fromkeys(ready)))  # one given twice is one
        return predict_folder(self, ready, Path(out), probabilities, overwrite, progress)

    def prepare(self, scan: Scan) -> Prepared:
        """Reads and preprocesses a scan; touches no GPU, so that it can go on beside `segment`.

        Raises:
            DataError: it cannot be read, or is not a scan that the model takes.
        """
        return prepare(scan, self.models)

    def segment(self, prepared: Prepared, probabilities: bool = False) -> Prediction:
        """The mask of a prepared scan. Runs out of memory on the GPU: tries again with less there.

        Raises:
            torch.OutOfMemoryError, MemoryError: there is too little memory even for one window on the CPU.
        """
        started = time.perf_counter()
        warnings = list(prepared.warnings)
        for way in attempts(self.device, self.plan["inference"]["sw_batch_size"], warnings):
            with way, keep_freed_memory(way.device.type == "cpu"):
                classes, scores = self._infer(prepared, way.device, way.buffers, way.batch, probabilities)
        keep = [i for i, name in enumerate(self.labels) if name in self.plan["keep_largest"]]
        keep_largest(classes, keep)
        if not classes.any():
            warnings.append("no label was found: the mask is empty")
        values = np.array(list(self.labels.values()), dtype=label_type(self.labels.values()))
        seconds = prepared.seconds + time.perf_counter() - started
        return Prediction(prepared.name, values[classes], scores, prepared.grid, seconds, warnings)

    @torch.inference_mode()
    def _infer(
        self, prepared: Prepared, device: torch.device, buffers: torch.device, batch: int, probabilities: bool
    ) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.float32] | None]:
        """Class indices (X, Y, Z), and probabilities (K, X, Y, Z) where they are wanted."""
        shape, count = prepared.grid.shape[:3], len(self.labels)
        classes = np.zeros(shape, dtype=np.uint8 if count <= 256 else np.uint16)
        together = probabilities or len(self.models) > 1
        scores = np.zeros((count, *shape), dtype=np.float32) if together else None
        for model, image in zip(self.models, prepared.images, strict=True):
            network = model.network.to(device)
            softmax = not self.tta
            predict = network_outputs(network, model, self.tta, self._autocast(device))
            chunks = windows(
                image.as_tensor().to(buffers),
                predict,
                model.plan["patch_size"],
                model.plan["inference"]["overlap"],
                batch_on(device, batch, model.plan["patch_size"]),
                device,
                buffers,
            )
            affine = np.asarray(image.affine, dtype=np.float64)
            way = Way.between(affine, image.shape[1:], prepared.affine, shape) if model.simple else None
            if way is None and scores is None:
                scores = np.zeros((count, *shape), dtype=np.float32)
            if scores is None:
                label(classes, cast(Way, way), chunks, softmax)
            elif way is None:
                add_inverse(scores, model, image, chunks, softmax, len(self.models))
            else:
                add(scores, way, chunks, softmax, len(self.models))
        if scores is not None:
            classes[:] = scores.argmax(axis=0)
        return classes, scores if probabilities else None

    def _autocast(self, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
        if self.amp and device.type == self.device.type:
            return lambda: torch.autocast(device.type)
        return nullcontext


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}). Try --device cpu."
        ) from error
    return device
