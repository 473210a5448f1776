"""Input of the inference benchmarks: a CT-like scan, and a planned run with seeded weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from medseg_supcon.datasets import Case, CaseFingerprint, Dataset, Fingerprint, Split
from medseg_supcon.networks import build_network
from medseg_supcon.plan import make_plan
from medseg_supcon.training import prepare_run

AIR, TISSUE, NOISE = -1000, 40, 20  # HU
DENSITIES = (-400, 400)  # of the organs, HU


def make_scan(path: Path, shape: Sequence[int], spacing: Sequence[float], organs: int) -> None:
    """Write an int16 CT of a body with organs (ellipsoids of several densities) and noise, plane by plane."""
    rng = np.random.default_rng(0)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    centres = rng.uniform(-0.5, 0.5, (organs, 3)).astype(np.float32)
    radii = rng.uniform(0.1, 0.35, (organs, 3)).astype(np.float32)
    scan = np.empty(shape, dtype=np.int16, order="F")
    for k, height in enumerate(z):
        inside = x[:, None] ** 2 + y[None, :] ** 2 + (height / 1.2) ** 2 < 0.8
        plane = np.where(inside, TISSUE, AIR).astype(np.float32)
        for (a, b, c), (ra, rb, rc), density in zip(centres, radii, np.linspace(*DENSITIES, organs), strict=True):
            far = ((x[:, None] - a) / ra) ** 2 + ((y[None, :] - b) / rb) ** 2 + ((height - c) / rc) ** 2
            plane[far < 1] = density
        scan[..., k] = plane + NOISE * rng.standard_normal(plane.shape, dtype=np.float32)
    image = nibabel.Nifti1Image(scan, np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def make_run(
    run: Path,
    scan: Path,
    shape: Sequence[int],
    spacing: Sequence[float],
    organs: int,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Make a run as `medseg plan` does on a CPU for scans like this one, with random weights from seed 0.

    Args:
        run: folder to write.
        scan: file of the scan; it is not read.
        shape: voxels per axis.
        spacing: mm.
        organs: number of classes besides background.
        changes: entries to set in the plan.

    Returns:
        The plan.
    """
    labels: dict[str, int | float] = {"background": 0, **{f"organ {i + 1}": i + 1 for i in range(organs)}}
    dataset = Dataset(scan.parent, "CT", (Case(scan.name, (scan,), scan),), ("CT",), labels)
    intensities = np.linspace(*DENSITIES, 1000, dtype=np.float32)[None]
    voxels = tuple(int(np.prod(shape)) // (organs + 1) for _ in labels)
    x, y, z = (int(n) for n in shape)
    a, b, c = (float(mm) for mm in spacing)
    case = CaseFingerprint(scan.name, (x, y, z), (a, b, c), "RAS", voxels, intensities)
    plan = make_plan(Fingerprint((case,), dataset.channels, tuple(labels)), dataset, device="cpu")
    plan.update(changes)
    prepare_run(dataset, Split(dataset.cases, (), ()), run, epochs=1, device="cpu", plan=plan)
    torch.manual_seed(0)
    network = build_network(plan["network_def"], in_channels=1, num_classes=organs + 1)
    (run / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), run / "models" / "model.pt")
    return plan


if __name__ == "__main__":  # run as its own process, so that the measuring process stays small
    wanted = json.loads(sys.argv[1])
    file, geometry = Path(wanted["scan"]), (wanted["shape"], wanted["spacing"], wanted["organs"])
    if not file.exists():
        make_scan(file, *geometry)
    make_run(Path(wanted["run"]), file, *geometry, wanted["changes"])
