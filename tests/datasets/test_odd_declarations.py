"""Declarations of a data set that were once taken wrongly without a word."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_supcon.datasets import check_dataset, normalisation, read_dataset
from medseg_supcon.errors import DataError

LABELS = {"background": 0, "organ": 1}


def write(root: Path, scale: float = 1.0, **content: object) -> Path:
    rng = np.random.default_rng(0)
    for n in range(4):
        for folder, voxels in (
            ("imagesTr", rng.uniform(-1, 1, (6, 6, 6)) * scale),
            ("labelsTr", np.eye(6)[None] * np.ones((6, 1, 1))),
        ):
            (root / folder).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.eye(4)), root / folder / f"c{n}.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS} | content))
    return root


def listed(*numbers: int, label: bool = True) -> list[dict[str, str]]:
    return [{"image": f"imagesTr/c{n}.nii.gz"} | ({"label": f"labelsTr/c{n}.nii.gz"} if label else {}) for n in numbers]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"ignore_label": 0}, "the background and the ignore label are both 0"),
        ({"labels": {"ignore": 0, "organ": 1}}, "the background and the ignore label are both 0"),
        (
            {"training": listed(0, 1), "validation": listed(2, 3, label=False)},
            "'c2' under \"validation\" has no",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, content, sentence):
    with pytest.raises(DataError, match=sentence):
        read_dataset(write(tmp_path, **content))


@pytest.mark.parametrize("ending", ["nii.gz", ".NII.GZ", " .nii.gz"])
def test_a_file_ending_without_dot_or_in_capitals_is_one(tmp_path, ending):
    assert len(read_dataset(write(tmp_path, file_ending=ending)).labelled) == 4


@pytest.mark.parametrize(("scale", "warned"), [(1.0, True), (1000.0, False)])
def test_ct_scaled_to_a_small_range_is_not_in_hounsfield_units(tmp_path, scale, warned):
    report = check_dataset(read_dataset(write(tmp_path, scale, modality={"0": "CT"})))
    assert any(finding.code == "not_hounsfield" for finding in report.findings) == warned


def test_a_normalisation_is_known_however_it_is_written():
    assert {normalisation(name) for name in ("no_norm", "NoNorm", "no norm")} == {"nonorm"}
