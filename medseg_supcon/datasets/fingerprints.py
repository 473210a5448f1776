"""The fingerprint of a data set: what planning needs to know, from one reading of every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.datasets.dataset import Case, Dataset
from medseg_supcon.datasets.labels import Floats, class_indices
from medseg_supcon.datasets.regions import Regions
from medseg_supcon.errors import DataError
from medseg_supcon.scans import Volume, count_values, in_parallel, read_header, read_nifti

SAMPLES_PER_CASE = 10_000


@dataclass(frozen=True)
class CaseFingerprint:
    """One case, its axes in RAS order (right, anterior, superior)."""

    name: str
    shape: tuple[int, int, int]  # voxels
    spacing: tuple[float, float, float]  # mm
    orientation: str  # axis codes as stored, e.g. "LPS" (the closest ones, for an oblique scan)
    class_voxels: tuple[int, ...] | None  # per class, ignored ones left out; None for an unlabelled case
    foreground: npt.NDArray[np.float32]  # (channels, n) evenly drawn intensities of the structures; n may be 0


@dataclass(frozen=True)
class Fingerprint:
    """All cases of a data set, and what they have in common."""

    cases: tuple[CaseFingerprint, ...]
    channels: tuple[str, ...]
    classes: tuple[str, ...]  # background first
    regions: Regions | None = None  # of these classes

    @property
    def shapes(self) -> Floats:
        """(n, 3) voxels in RAS order."""
        return np.array([case.shape for case in self.cases], dtype=np.float64)

    @property
    def spacings(self) -> Floats:
        """(n, 3) mm in RAS order."""
        return np.array([case.spacing for case in self.cases], dtype=np.float64)

    @property
    def class_voxels(self) -> Floats:
        """(C,) voxels per class over the labelled cases."""
        counts = [case.class_voxels for case in self.cases if case.class_voxels is not None]
        return np.asarray(np.array(counts, np.float64).reshape(-1, len(self.classes)).sum(axis=0))

    def foreground(self, channel: int) -> dict[str, float]:
        """Intensities of one channel inside the structures, every case counted alike."""
        values = np.concatenate([case.foreground[channel] for case in self.cases]).astype(np.float64)
        if values.size == 0:
            raise DataError("No case has a labelled structure, so the intensities of structures are unknown.")
        low, median, high = np.percentile(values, [0.5, 50, 99.5]).tolist()
        mean, std = float(values.mean()), float(values.std())
        return {"mean": mean, "std": std, "percentile_00_5": low, "median": median, "percentile_99_5": high}

    def summary(self) -> dict[str, Any]:
        """The fingerprint as `plan.json` shows it: a few rounded numbers."""
        labelled = [case for case in self.cases if case.class_voxels is not None]
        volumes, smallest, intensities = {}, {}, {}
        counts = np.array([case.class_voxels for case in labelled]).reshape(-1, len(self.classes))
        of_each = dict(zip(self.classes[1:], counts.T[1:], strict=True))
        if self.regions is not None:
            of_each = dict(zip(self.regions.names, self.regions.membership @ counts.T, strict=True))
        for name, voxels in of_each.items():
            ml = voxels * np.array([np.prod(case.spacing) / 1000 for case in labelled])
            volumes[name] = _spread(ml)
            if voxels.any():
                i = int(np.where(voxels > 0, ml, np.inf).argmin())
                smallest[name] = {"case": labelled[i].name, "voxels": int(voxels[i]), "mm3": readable(1000 * ml[i])}
        for c, name in enumerate(self.channels):
            earlier = self.channels[:c].count(name)  # a repeated name gets its number
            unique = f"{name} ({earlier + 1})" if earlier else name
            intensities[unique] = {key: readable(value) for key, value in self.foreground(c).items()}
        return {
            "cases": len(self.cases),
            "labelled": len(labelled),
            "orientations": dict(Counter(case.orientation for case in self.cases).most_common()),
            "shape": _spread(self.shapes),
            "spacing": _spread(self.spacings),
            "foreground_intensity": intensities,
            "volume_ml": volumes,
            "smallest": smallest,
        }


def readable(value: float, digits: int = 4) -> float:
    """A number rounded to some significant digits."""
    return float(f"{float(value):.{digits}g}")


def _spread(values: Floats) -> dict[str, Any]:
    rows = {"min": values.min(axis=0), "median": np.median(values, axis=0), "max": values.max(axis=0)}
    return {key: [readable(v) for v in row] if np.ndim(row) else readable(float(row)) for key, row in rows.items()}


def fingerprint(
    dataset: Dataset, cases: Sequence[Case] | None = None, known: Mapping[Case, CaseFingerprint] | None = None
) -> Fingerprint:
    """The fingerprint of a data set or of some of its cases; `known` ones (`Report.fingerprints`) are not read again."""
    chosen = tuple(dataset.cases if cases is None else cases)
    if not chosen:
        raise DataError(f"{dataset.root}: there are no cases to analyse.")

    def measure(case: Case) -> CaseFingerprint:
        if known is not None and case in known:
            return known[case]
        if case.label is not None:
            return measure_case(case, dataset, [read_nifti(path) for path in case.images], read_nifti(case.label))
        nothing = np.zeros((len(dataset.channels), 0), dtype=np.float32)
        return CaseFingerprint(case.name, *geometry(case.images[0], *read_header(case.images[0])), None, nothing)

    measured, regions = tuple(in_parallel(measure, chosen)), Regions.of(dataset.label_plan)
    return Fingerprint(measured, dataset.channels, tuple(dataset.labels), regions)


def measure_case(case: Case, dataset: Dataset, volumes: Sequence[Volume], label: Volume) -> CaseFingerprint:
    """The fingerprint of a labelled case whose images and label map have been read."""
    channels = [channel for volume in volumes for channel in volume.channels_first]
    if len(channels) != len(dataset.channels):
        found = f"{len(channels)} channels, but the data set declares {', '.join(dataset.channels)}"
        raise DataError(f"{case.images[0]}: has {found}. Correct the data list or the file.")
    for path, array in zip(case.images * len(channels), channels, strict=False):
        if array.shape != label.data.shape:
            found = f"has {label.data.shape} voxels, but its scan {path} has {array.shape}"
            raise DataError(f"{case.label}: {found}. Export it on the scan's grid.")
    indices = class_indices(label.data, dataset.label_plan, case.label or "label map")
    voxels = count_values(indices)
    counts = tuple(voxels.get(float(c), 0) for c in range(len(dataset.labels)))
    inside = np.flatnonzero(indices.ravel(order="F") > 0)  # NIfTI is stored in Fortran order: no copy
    inside = inside[:: max(1, len(inside) // SAMPLES_PER_CASE)]  # evenly spread: the plan is reproducible
    values = np.stack([array.ravel(order="F")[inside].astype(np.float32) for array in channels])
    values = values[:, np.isfinite(values).all(axis=0)]
    place = geometry(case.images[0], channels[0].shape, volumes[0].affine)
    return CaseFingerprint(case.name, *place, counts, values)


def geometry(
    path: Path, shape: Sequence[int], affine: Floats
) -> tuple[tuple[int, int, int], tuple[float, float, float], str]:
    """Shape and spacing (mm) in RAS order, and the axis codes as stored."""
    if len(shape) < 3:
        raise DataError(f"{path}: is {len(shape)}-D. Training needs 3-D scans.")
    axes = nibabel.orientations.io_orientation(affine)[:, 0]
    if not np.isfinite(axes).all():
        raise DataError(f"{path}: its affine has a zero axis. Export the scan again with a valid header.")
    order, spacing = np.argsort(axes), np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (int(shape[i]) for i in order)
    sx, sy, sz = (float(round(spacing[i], 6)) for i in order)
    return (x, y, z), (sx, sy, sz), "".join(nibabel.orientations.aff2axcodes(affine))
