"""Phantoms: the same for the same seed, varied, in place, and beyond thresholds."""

from __future__ import annotations

import filecmp
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medseg_supcon.datasets import PHANTOM_LABELS, check_dataset, make_phantoms, read_dataset
from medseg_supcon.errors import DataError


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("full") / "phantoms")


def pairs(root, part):
    return [(file, root / f"labels{part}" / file.name) for file in sorted((root / f"images{part}").iterdir())]


def test_the_demo_set_is_whole_and_clean(full):
    assert [len(pairs(full, part)) for part in ("Tr", "Ts")] == [12, 4]
    assert all(label.is_file() for part in ("Tr", "Ts") for _, label in pairs(full, part))
    dataset = read_dataset(full)
    assert dataset.labels == PHANTOM_LABELS
    assert not check_dataset(dataset).findings
    assert len(json.loads((full / "dataset.json").read_text())["test"]) == 4


def test_same_seed_same_files_whatever_the_number(tmp_path, phantoms):
    again = make_phantoms(tmp_path / "again", cases=3, unseen=0, size=32)
    other = make_phantoms(tmp_path / "other", cases=1, unseen=0, size=32, seed=1)
    for folder in ("imagesTr", "labelsTr"):
        for n in (1, 2, 3):
            a, b = (nibabel.load(root / folder / f"phantom_0{n}.nii.gz") for root in (phantoms, again))
            assert np.array_equal(a.dataobj, b.dataobj) and np.array_equal(a.affine, b.affine)
    name = "imagesTr/phantom_01.nii.gz"
    assert not filecmp.cmp(phantoms / name, other / name, shallow=False)


def test_geometry_varies_and_both_readers_agree_on_it(full):
    codes, tilts, coarse = set(), 0, 0
    for image, label in pairs(full, "Tr") + pairs(full, "Ts"):
        scan = nibabel.load(image)
        assert np.array_equal(scan.affine, nibabel.load(label).affine)
        assert min(scan.shape) >= 24 and max(scan.shape) <= 80
        codes.add(nibabel.aff2axcodes(scan.affine))
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
        coarse += spacing.max() / spacing.min() > 1.9
        tilts += np.abs(scan.affine[:3, :3] / spacing).max() < 0.9999
        index = [3, 5, 7]
        itk = sitk.ReadImage(str(image)).TransformIndexToPhysicalPoint(index)
        here = (scan.affine @ [*index, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(itk, here, atol=1e-3)
    assert len(codes) >= 6 and tilts >= 5 and coarse >= 2


def test_structures_lie_where_their_names_say(full):
    for image, label in pairs(full, "Tr"):
        file = nibabel.load(label)
        data = np.asanyarray(file.dataobj)
        centre = {
            name: nibabel.affines.apply_affine(file.affine, np.argwhere(data == value).mean(axis=0))
            for name, value in PHANTOM_LABELS.items()
        }
        assert centre["anterior horn"][1] > centre["posterior horn"][1] + 5, image
        assert centre["nodule"][2] > centre["core"][2] + 5
        assert np.linalg.norm(centre["core"] - centre["capsule"]) < 3
        shares = np.bincount(data.ravel(), minlength=6) / data.size
        assert 2e-4 < shares[5] < 0.005, "a rare class"
        assert shares[1:5].min() > 0.002


def test_no_threshold_separates_the_structures(full):
    """An oracle that sees the labels and picks the best interval of each class and scan still fails."""
    best = {value: [] for value in PHANTOM_LABELS.values() if value}
    for image, label in pairs(full, "Tr"):
        scan, truth = (np.asanyarray(nibabel.load(f).dataobj).ravel() for f in (image, label))
        edges = np.quantile(scan, np.linspace(0, 1, 201))
        bins = np.clip(np.searchsorted(edges, scan, side="right") - 1, 0, 199)
        total = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=200))])
        for value, scores in best.items():
            hits = np.concatenate([[0], np.cumsum(np.bincount(bins[truth == value], minlength=200))])
            inside, found = hits[None] - hits[:, None], total[None] - total[:, None]
            scores.append((2 * inside / np.maximum(found + hits[-1], 1)).max())
    means = {value: np.mean(scores) for value, scores in best.items()}
    assert np.mean(list(means.values())) < 0.5 and max(means.values()) < 0.75, means
    assert means[2] < 0.3, "the core is as grey as the body"


def test_wrong_calls(tmp_path, phantoms):
    with pytest.raises(DataError, match="not empty"):
        make_phantoms(phantoms)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file"):
        make_phantoms(tmp_path / "file")
    for wrong in ({"cases": 0}, {"unseen": -1}, {"size": 5}):
        with pytest.raises(ValueError, match="at least"):
            make_phantoms(tmp_path / "new", **wrong)
