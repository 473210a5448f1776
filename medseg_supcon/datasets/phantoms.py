"""Phantoms: a small 3-D data set made on the spot, for the demo and for tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.affines import from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medseg_supcon.datasets.labels import Floats
from medseg_supcon.errors import DataError

PHANTOM_LABELS = {"background": 0, "capsule": 1, "core": 2, "anterior horn": 3, "posterior horn": 4, "nodule": 5}
ORIENTATIONS = ("RAS", "LPS", "PIR", "LAS", "ASL", "SRP", "RSA", "IPL")
SPACINGS = ((1, 1, 1), (0.8, 0.8, 0.8), (1, 1, 2), (1.2, 1, 0.9), (1.5, 1.2, 1.2), (0.9, 0.9, 1.5))  # mm
AIR, TISSUE, BRIGHT = 0.05, 0.5, 0.85


def make_phantoms(folder: str | Path, *, cases: int = 12, unseen: int = 4, seed: int = 0, size: float = 56.0) -> Path:
    """Write a data set of phantoms in the decathlon's format, the same one for the same arguments.

    Each scan shows a body with a capsule round a core, a horn whose anterior and posterior halves are two classes, and a
    nodule (about 0.1 % of the voxels) on top of the capsule. Capsule and horns are equally bright, the core is as grey as
    the body, and there are other bright spots like the nodule: intensity alone cannot separate the classes. Shapes are
    deformed smoothly; bias field, noise, intensity scale, voxel size (0.8 to 2 mm), axis order and tilt vary.

    Args:
        folder: a new or empty folder (`DataError` otherwise), which is returned.
        cases: labelled scans, in imagesTr and labelsTr.
        unseen: scans to predict later, in imagesTs and labelsTs; ``dataset.json`` names the scans under "test".
        seed: of all draws; a case depends only on the seed and its own number.
        size: edge of the scanned cube in mm, at least 16; every structure scales with it.

    Example:
        >>> import tempfile
        >>> from medseg_supcon.datasets import make_phantoms
        >>> folder = make_phantoms(tempfile.mkdtemp() + "/phantoms", cases=1, unseen=0)
        >>> sorted(file.name for file in folder.iterdir())
        ['dataset.json', 'imagesTr', 'labelsTr']
    """
    if cases < 1 or unseen < 0 or size < 16:
        raise ValueError(f"cases must be at least 1, unseen 0 and size 16 mm, got {cases}, {unseen} and {size}")
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root}: is not empty. Give a new folder for the phantoms, or delete this one.")
    items = []
    for number in range(cases + unseen):
        part = "Tr" if number < cases else "Ts"
        name = f"phantom_{number + 1:02d}.nii.gz"
        for kind, image in zip(("images", "labels"), _phantom(number, seed, size), strict=True):
            (root / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
            nibabel.save(image, root / f"{kind}{part}" / name)
        items.append({"image": f"./images{part}/{name}", "label": f"./labels{part}/{name}"})
    content: dict[str, Any] = {"name": "Phantoms", "tensorImageSize": "3D", "modality": {"0": "MRI"}}
    content["description"] = "Synthetic scans; intensity alone does not separate the structures."
    content["labels"] = {str(value): name for name, value in PHANTOM_LABELS.items()}
    content |= {"numTraining": cases, "numTest": unseen, "training": items[:cases]}
    content["test"] = [item["image"] for item in items[cases:]]
    (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return root


def _waves(rng: np.random.Generator, points: Floats, size: float, outputs: int, height: float) -> Floats:
    """A smooth random field (..., outputs) at points (..., 3): five plane waves, about as long as the scanned cube."""
    directions = rng.normal(size=(5, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = rng.uniform(0.6, 1.4, size=(5, 1)) * size
    heights = rng.normal(size=(5, outputs)) * height / math.sqrt(5)
    phases = rng.uniform(0, 2 * math.pi, 5)
    return np.asarray(np.sin(points @ (2 * math.pi * directions / lengths).T + phases) @ heights)


def _phantom(number: int, seed: int, size: float) -> tuple[Any, Any]:
    """Scan and label map of one phantom."""
    rng = np.random.default_rng([seed, number])
    spacing = np.array(SPACINGS[number % len(SPACINGS)]) * size / 56
    shape = tuple(int(n) for n in np.round(size / spacing * rng.uniform(0.95, 1.05, 3)))
    tilt = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3) * (number % 3 != 0), degrees=True).as_matrix()
    axes = tilt * spacing
    middle = (np.array(shape) - 1) / 2
    affine = from_matvec(axes, rng.uniform(-80, 80, 3) - axes @ middle)
    # The anatomy has its own frame: roughly in the middle of the scan and along the scanner's axes.
    grid = np.stack(list(np.indices(shape, dtype=np.float64)), axis=-1)
    centred = (grid - middle) @ axes.T + rng.uniform(-0.04, 0.04, 3) * size
    turn = Rotation.from_euler("xyz", rng.uniform(-10, 10, 3), degrees=True).as_matrix()
    points = centred @ turn.T * rng.uniform(0.92, 1.1)
    points = (points + _waves(rng, points, size, 3, 0.028 * size)) / size
    label, clean = _anatomy(points, rng)
    bias = np.exp(_waves(rng, centred, 2 * size, 1, 0.18)[..., 0])
    noise = rng.normal(size=shape) * rng.uniform(0.03, 0.06)
    scale = 10 ** rng.uniform(2, 4.5)
    scan = np.maximum(gaussian_filter(clean, 0.6) * bias + noise, 0) * scale
    stored = scan.astype(np.float32) if number % 4 == 3 else np.round(scan).astype(np.int32)
    codes = ORIENTATIONS[number % len(ORIENTATIONS)]
    return _stored(stored, affine, codes), _stored(label, affine, codes)


def _anatomy(p: Floats, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Label map and noise-free intensities at points (..., 3) given in edges of the scanned cube, RAS."""

    def ball(centre: Any, radii: Any) -> Floats:
        return np.asarray(np.linalg.norm((p - np.asarray(centre)) / np.asarray(radii), axis=-1))

    label = np.zeros(p.shape[:-1], dtype=np.uint8)
    intensity = np.where(ball((0, 0, 0), (0.42, 0.46, 0.43)) < 1, TISSUE, AIR)
    horn = ball((0, 0.0, -0.2), np.array([0.1, 0.27, 0.085]) * rng.uniform(0.9, 1.12)) < 1
    label[horn], intensity[horn] = np.where(p[..., 1] > 0.25 * (p[..., 2] + 0.2), 3, 4)[horn], BRIGHT
    capsule = ball((0, 0, 0.07), radii := np.array([0.23, 0.2, 0.14]) * rng.uniform(0.9, 1.1))
    inner = capsule / rng.uniform(0.6, 0.72)
    label[capsule < 1], intensity[capsule < 1] = 1, BRIGHT
    label[inner < 1], intensity[inner < 1] = 2, TISSUE
    angle = rng.uniform(-0.5, 0.5)
    top = np.array([0, radii[1] * math.sin(angle), 0.07 + radii[2] * math.cos(angle)])
    nodule = ball(top + np.array([0, 0, 0.055]), rng.uniform(0.056, 0.07) * rng.uniform(0.95, 1.05, 3)) < 1
    nodule &= label == 0
    label[nodule], intensity[nodule] = 5, 1.15 * BRIGHT
    for _ in range(3):  # spots that differ from the nodule only by their place
        side, height = rng.choice([-1, 1]), rng.uniform(-0.2, 0.12)
        centre = (side * rng.uniform(0.3, 0.34), rng.uniform(-0.15, 0.15), height)
        intensity[(ball(centre, rng.uniform(0.04, 0.06)) < 1) & (label == 0)] = 1.15 * BRIGHT
    return label, intensity


def _stored(data: npt.NDArray[Any], affine: Floats, codes: str) -> Any:
    """A NIfTI image whose axes run along `codes`, of the same voxels in the same places."""
    image = nibabel.Nifti1Image(data, affine)
    start, end = nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(codes))
    image = image.as_reoriented(nibabel.orientations.ornt_transform(start, end))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image
