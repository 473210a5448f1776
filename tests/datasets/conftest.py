"""Small data sets on disk, written with nibabel and json alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

SHAPE = (12, 10, 8)


def write_nifti(path, data, affine=None):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.asarray(data), np.diag([1.0, 1, 1, 1]) if affine is None else affine)
    nibabel.save(image, path)
    return path


def scan_and_label(number, shape=SHAPE, channels=None):
    rng = np.random.default_rng(number)
    size = shape if channels is None else (*shape, channels)
    scan = rng.normal(100, 20, size=size).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[2:5, 2:5, 2:6], label[6:9, 3:7, 2:6] = 1, 2
    return scan, label


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_decathlon(root, cases=4, channels=None, **changes):
    """A folder in the decathlon's format; `channels` names make the scans 4-D."""
    items = []
    for number in range(cases):
        scan, label = scan_and_label(number, channels=channels and len(channels))
        write_nifti(root / "imagesTr" / f"case_{number}.nii.gz", scan)
        write_nifti(root / "labelsTr" / f"case_{number}.nii.gz", label)
        items.append({"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"})
    content = {
        "name": "Toy",
        "modality": {str(i): name for i, name in enumerate(channels or ["MRI"])},
        "labels": {"0": "background", "1": "tumour", "2": "vessel"},
        "training": items,
        "test": [],
        **changes,
    }
    write_json(root / "dataset.json", {key: value for key, value in content.items() if value is not None})
    return root


def write_nnunet(root, cases=4, channels=("T1", "T2"), **changes):
    """A folder in nnU-Net v2's raw layout."""
    for number in range(cases):
        scan, label = scan_and_label(number, channels=len(channels))
        for c in range(len(channels)):
            write_nifti(root / "imagesTr" / f"case_{number}_{c:04d}.nii.gz", scan[..., c])
        write_nifti(root / "labelsTr" / f"case_{number}.nii.gz", label)
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "tumour": 1, "vessel": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **changes,
    }
    write_json(root / "dataset.json", {key: value for key, value in content.items() if value is not None})
    return root


@pytest.fixture(scope="session")
def disk():
    """Writers of files and of whole data sets."""
    return SimpleNamespace(
        nifti=write_nifti,
        json=write_json,
        decathlon=write_decathlon,
        nnunet=write_nnunet,
        scan_and_label=scan_and_label,
    )


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A folder with four small phantoms and one unseen scan."""
    from medseg_supcon.datasets import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", cases=4, unseen=1, size=32)
