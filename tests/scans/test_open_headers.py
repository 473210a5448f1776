"""MetaImage and NRRD headers that leave something open: ITK fills it in without a word, here it is a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import Volume, read_scan

VOXELS = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
SPACING = (0.8, 0.9, 2.4)
LPS = np.diag([-0.8, -0.9, 2.4])  # axes in RAS+ of an image whose directions are ITK's own
GUESS = "left and right are a guess"
UNKNOWN = "does not say how large a voxel is"


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    """A file that SimpleITK wrote, with its header edited by regular expressions; "" deletes a line."""
    image = sitk.GetImageFromArray(VOXELS.T)
    image.SetSpacing(SPACING)
    image.SetOrigin((1, 2, 3))
    sitk.WriteImage(image, str(path))
    content = path.read_bytes()
    for pattern, new in changes:
        replaced = re.sub(rb"(?m)^" + pattern.encode() + rb"[^\n]*\n", new.encode(), content, count=1)
        assert replaced != content, pattern
        content = replaced
    path.write_bytes(content)
    return path


def read(path: Path) -> Volume:
    return read_scan(find_scans([path])[0], 1)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith(".")
    return str(error.value)


def told(path: Path) -> str:
    volume = read(path)
    np.testing.assert_array_equal(volume.data, VOXELS)
    np.testing.assert_allclose(volume.affine[:3, :3], LPS, atol=1e-6)
    return " ".join(issue.sentence for issue in volume.issues)


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_a_whole_header_says_all(tmp_path: Path, ending: str) -> None:
    assert told(edited(tmp_path / f"a{ending}")) == ""


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
def test_metaimage_without_axes(tmp_path: Path, ending: str) -> None:
    assert GUESS in told(edited(tmp_path / f"a{ending}", ("TransformMatrix", "")))
    both = edited(tmp_path / f"b{ending}", ("TransformMatrix", ""), ("AnatomicalOrientation", ""))
    assert GUESS in told(both)
    assert told(edited(tmp_path / f"c{ending}", ("AnatomicalOrientation", ""))) == ""
    assert told(edited(tmp_path / f"d{ending}", ("Anat", "AnatomicalOrientation = ???\n"))) == ""


def test_metaimage_that_says_two_orientations(tmp_path: Path) -> None:
    assert "contradicts" in told(edited(tmp_path / "a.mha", ("Anat", "AnatomicalOrientation = LPI\n")))


@pytest.mark.parametrize("sizes", ["", "0 1 1", "1 1", "nan 1 1", "1 -1 1", "inf 1 1", "one 1 1"])
def test_metaimage_without_voxel_size(tmp_path: Path, sizes: str) -> None:
    line = f"ElementSpacing = {sizes}\n" if sizes else ""
    assert UNKNOWN in refused(edited(tmp_path / "a.mha", ("ElementSpacing", line)))


def test_metaimage_may_call_it_element_size(tmp_path: Path) -> None:
    assert told(edited(tmp_path / "a.mha", ("ElementSpacing", "ElementSize = 0.8 0.9 2.4\n"))) == ""


DIRECTIONS = r"space directions:"
SPACINGS = (("space:", ""), ("space origin:", ""))


@pytest.mark.parametrize("space", ["space dimension: 3\n", "space: scanner-xyz\n", "space: 3D-right-handed\n"])
def test_nrrd_without_a_space_of_the_body(tmp_path: Path, space: str) -> None:
    assert GUESS in told(edited(tmp_path / "a.nrrd", ("space:", space)))


def test_nrrd_of_spacings_alone(tmp_path: Path) -> None:
    path = edited(tmp_path / "a.nrrd", (DIRECTIONS, "spacings: 0.8 0.9 2.4\n"), *SPACINGS)
    assert GUESS in told(path)


@pytest.mark.parametrize("line", ["", "spacings: nan 0.9 2.4\n", "spacings: 0 1 1\n", "spacings: 1 1\n"])
def test_nrrd_without_voxel_size(tmp_path: Path, line: str) -> None:
    assert UNKNOWN in refused(edited(tmp_path / "a.nrrd", (DIRECTIONS, line), *SPACINGS))


@pytest.mark.parametrize("vectors", ["none none none", "(nan,0,0) (0,1,0) (0,0,1)", "(0,0,0) (0,1,0) (0,0,1)"])
def test_nrrd_directions_that_are_none(tmp_path: Path, vectors: str) -> None:
    assert UNKNOWN in refused(edited(tmp_path / "a.nrrd", (DIRECTIONS, f"space directions: {vectors}\n")))


@pytest.mark.parametrize(("unit", "taken"), [("mm", True), ("cm", False), ("um", False)])
def test_nrrd_units(tmp_path: Path, unit: str, taken: bool) -> None:
    units = f'space units: "{unit}" "{unit}" "{unit}"\nspace directions: (0.8,0,0) (0,0.9,0) (0,0,2.4)\n'
    path = edited(tmp_path / "a.nrrd", (DIRECTIONS, units))
    if taken:
        assert told(path) == ""
    else:
        assert f"lengths in {unit}" in refused(path)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS"])
def test_nrrd_in_ras(tmp_path: Path, space: str) -> None:
    volume = read(edited(tmp_path / "a.nrrd", ("space:", f"space: {space}\n")))
    np.testing.assert_allclose(volume.affine, [[0.8, 0, 0, 1], [0, 0.9, 0, 2], [0, 0, 2.4, 3], [0, 0, 0, 1]], atol=1e-6)
    assert volume.issues == ()
