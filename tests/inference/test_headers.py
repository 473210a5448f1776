"""What a NIfTI header says about place comes back in the mask to the last bit, however odd it is."""

from __future__ import annotations

import gzip
import itertools
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from toy_runs import blobs, save_nifti

from medseg_supcon.errors import DataError
from medseg_supcon.inference import Predictor, find_scans
from medseg_supcon.scans import read_scan

QFORM = slice(252, 280)  # bytes of a NIfTI-1 header: codes, quaternion, offset, srow
SROW = slice(280, 328)
PIXDIM = slice(76, 92)
UNITS = 123


def oblique(spacing: tuple[float, float, float] = (0.9, 1.1, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [11, -23, 37], degrees=True).as_matrix()
    affine[:3, :3] = turn * np.array(spacing) * [-1, 1, 1]  # left-handed, as most scans are
    affine[:3, 3] = (-31.7, 12.1, 77.3)
    return affine


def header_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content)[:348]


def edited(path: Path, changes: dict[int, bytes]) -> Path:
    content = bytearray(path.read_bytes())
    for offset, new in changes.items():
        content[offset : offset + len(new)] = new
    path.write_bytes(content)
    return path


def corners(file: Path) -> np.ndarray:
    """Corners in SimpleITK's world."""
    image = sitk.ReadImage(str(file))
    ends = itertools.product(*((0, n - 1) for n in image.GetSize()))
    return np.array([image.TransformIndexToPhysicalPoint(corner) for corner in ends])


def predict(run: Path, scan: Path, out: Path) -> tuple[Path, list[str]]:
    entry = Predictor(run, device="cpu").run([scan], out)["scans"][0]
    assert entry["status"] == "done", entry
    return out / f"{entry['name']}.nii.gz", entry["warnings"]


@pytest.mark.parametrize("codes", list(itertools.product(range(5), range(5))))
def test_every_pair_of_codes(threshold_run: Path, tmp_path: Path, codes: tuple[int, int]) -> None:
    """qform alone, sform alone, both, none: the bytes are the scan's, and both libraries see one place."""
    scan = save_nifti(tmp_path / "a.nii", blobs((7, 6, 5)), oblique(), codes)
    mask, _ = predict(threshold_run, scan, tmp_path / "out")
    ours, theirs = header_bytes(mask), header_bytes(scan)
    for part in (QFORM, SROW, PIXDIM):
        assert ours[part] == theirs[part]
    np.testing.assert_array_equal(nib.load(mask).affine, nib.load(scan).affine)
    np.testing.assert_array_equal(corners(mask), corners(scan))


def test_forms_that_disagree_are_kept_and_said(threshold_run: Path, tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "a.nii", blobs((7, 6, 5)), oblique())
    image = nib.load(scan)
    image.set_qform(np.diag([0.9, 1.1, 2.5, 1.0]), 1)
    nib.save(image, tmp_path / "b.nii")
    mask, warnings = predict(threshold_run, tmp_path / "b.nii", tmp_path / "out")
    assert "its qform and sform disagree" in warnings[0] and "the sform is used" in warnings[0]
    assert header_bytes(mask)[QFORM] == header_bytes(tmp_path / "b.nii")[QFORM]
    np.testing.assert_array_equal(corners(mask), corners(tmp_path / "b.nii"))


def test_two_voxel_sizes_are_refused(tmp_path: Path) -> None:
    """An sform of 2 mm beside a qform and pixdim of 1 mm: MONAI takes the one, volumes would come of the other."""
    save_nifti(tmp_path / "a.nii", blobs((7, 6, 5)), np.diag([2.0, 2.0, 2.0, 1.0]))
    scan = edited(tmp_path / "a.nii", {80: struct.pack("<3f", 1, 1, 1)})
    assert sitk.ReadImage(str(scan)).GetSpacing() != tuple(nib.load(scan).affine.diagonal()[:3])
    with pytest.raises(DataError, match="2 x 2 x 2 by its sform and 1 x 1 x 1 by its pixdim"):
        read_scan(find_scans([scan])[0], 1)


@pytest.mark.parametrize("codes", [(1, 1), (0, 1)])
def test_one_affine_places_model_and_mask(tmp_path: Path, codes: tuple[int, int]) -> None:
    """pixdim a little off makes MONAI take the qform, even one of code 0, that turns otherwise: not here."""
    scan = save_nifti(tmp_path / "a.nii", blobs((7, 6, 5)), oblique(), codes)
    edited(scan, {80: struct.pack("<3f", 0.9003, 1.1, 2.5), 256: struct.pack("<3f", 0, 0, 0)})
    volume = read_scan(find_scans([scan])[0], 1)
    rows = np.frombuffer(header_bytes(scan)[SROW], "<f4").reshape(3, 4)
    np.testing.assert_array_equal(volume.affine[:3], rows)
    np.testing.assert_array_equal(volume.grid.affine[:3], rows)
    assert any("disagree" in issue.sentence for issue in volume.issues)


def test_a_small_turn_over_many_voxels_is_a_disagreement(tmp_path: Path) -> None:
    """3 degrees are 5 % of a voxel in the affine's entries, and 10 voxels at the end of 200."""
    save_nifti(tmp_path / "a.nii", np.zeros((200, 3, 3), dtype=np.uint8))
    half = np.radians(3) / 2
    scan = edited(tmp_path / "a.nii", {264: struct.pack("<f", np.sin(half))})
    assert "disagree" in read_scan(find_scans([scan])[0], 1).issues[0].sentence


def test_a_quaternion_that_is_none(threshold_run: Path, tmp_path: Path) -> None:
    """Longer than one: with an sform the scan has a place all the same, without it has none."""
    long = {256: struct.pack("<3f", 0.9, 0.9, 0.9)}
    good = edited(save_nifti(tmp_path / "a.nii", blobs((7, 6, 5)), oblique()), long)
    _, warnings = predict(threshold_run, good, tmp_path / "out")
    assert "disagree" in warnings[0]
    bad = edited(save_nifti(tmp_path / "b.nii", blobs((7, 6, 5)), oblique(), (1, 0)), long)
    with pytest.raises(DataError, match=r"b\.nii: cannot be read as NIfTI"):
        read_scan(find_scans([bad])[0], 1)


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 1e-3), (7, 1)])
def test_units_of_length(threshold_run: Path, tmp_path: Path, code: int, factor: float) -> None:
    """Metres and microns: the model sees mm, the mask keeps the scan's unit (SimpleITK converts, nibabel does not)."""
    array = blobs((9, 8, 7))
    affine = np.diag([0.9 / factor, 1.1 / factor, 1.5 / factor, 1.0])
    scan = edited(save_nifti(tmp_path / "a.nii", array, affine), {UNITS: bytes([code | 8])})
    mask, warnings = predict(threshold_run, scan, tmp_path / "out")
    assert header_bytes(mask)[UNITS] == code
    np.testing.assert_allclose(corners(mask), corners(scan), rtol=1e-6)
    assert any("lengths in" in w for w in warnings) == (code in (1, 3))
    in_mm = save_nifti(tmp_path / "mm.nii", array, np.diag([0.9, 1.1, 1.5, 1.0]))
    predictor = Predictor(threshold_run, device="cpu")
    converted = predictor.predict(scan)
    assert converted.grid.voxel_ml == pytest.approx(0.9 * 1.1 * 1.5 / 1000)
    assert (converted.mask != predictor.predict(in_mm).mask).sum() <= 1


def test_one_bit_flipped_in_a_packed_scan(tmp_path: Path) -> None:
    """nibabel stops reading before gzip's checksum; a voxel of another value is no scan to segment."""
    plain = save_nifti(tmp_path / "whole.nii", blobs((7, 6, 5))).read_bytes()
    packed = bytearray(gzip.compress(plain, compresslevel=0))
    packed[-20] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.nii\.gz: cannot be read as NIfTI \(CRC check failed"):
        read_scan(find_scans([tmp_path / "a.nii.gz"])[0], 1)


@pytest.mark.parametrize(
    ("name", "pack", "cure"),
    [("a.nii.gz", bytes, "Rename it to .nii."), ("a.nii", gzip.compress, "to .nii.gz.")],
)
def test_a_wrong_ending_is_named(tmp_path: Path, name: str, pack: type, cure: str) -> None:
    content = save_nifti(tmp_path / "b.nii", blobs((7, 6, 5))).read_bytes()
    (tmp_path / name).write_bytes(pack(content))
    with pytest.raises(DataError) as error:
        read_scan(find_scans([tmp_path / name])[0], 1)
    assert str(error.value).endswith(cure)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf, 2.0])
def test_scalings(tmp_path: Path, slope: float) -> None:
    """A slope that is 0 or no number means: none (the standard's rule)."""
    values = np.arange(210, dtype=np.int16).reshape(7, 6, 5)
    scan = edited(save_nifti(tmp_path / "a.nii", values), {112: struct.pack("<2f", slope, 3.0)})
    data = read_scan(find_scans([scan])[0], 1).data
    np.testing.assert_array_equal(data, 2.0 * values + 3 if slope == 2 else values)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_scaled_scan_is_never_float64_as_a_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled a few voxels at a time, to the very values that scaling all of them in float64 gives."""
    monkeypatch.setattr("medseg_supcon.scans.volume.SLAB", 1000)
    stored = np.random.default_rng(0).integers(-3000, 3000, (40, 50, 60)).astype(np.int16)
    plain = edited(save_nifti(tmp_path / "plain.nii", stored), {112: struct.pack("<2f", 0.37, -11.3)})
    scan = tmp_path / name
    scan.write_bytes(gzip.compress(plain.read_bytes()) if scan.suffix == ".gz" else plain.read_bytes())
    found = find_scans([scan])[0]
    read_scan(found, 1)
    tracemalloc.start()
    data = read_scan(found, 1).data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slope, intercept = np.float64(np.float32(0.37)), np.float64(np.float32(-11.3))
    np.testing.assert_array_equal(data, (stored * slope + intercept).astype(np.float32))
    assert peak < stored.size * 8  # the stored voxels and their float32 are 6 bytes a voxel


def test_an_intercept_that_is_no_number(tmp_path: Path) -> None:
    values = np.arange(210, dtype=np.int16).reshape(7, 6, 5)
    scan = edited(save_nifti(tmp_path / "a.nii", values), {112: struct.pack("<2f", 2.0, np.nan)})
    with pytest.raises(DataError, match=r"a\.nii: cannot be read as NIfTI .*intercept"):
        read_scan(find_scans([scan])[0], 1)


@pytest.mark.parametrize("kind", ["int8", ">f8", "uint64", ">u2"])
def test_data_types_that_are_rare(tmp_path: Path, kind: str) -> None:
    values = np.arange(-3 if kind == "int8" else 0, 100).astype(kind)[:90].reshape(6, 5, 3)
    header = nib.Nifti1Header(endianness=">" if kind.startswith(">") else "<")
    header.set_data_dtype(values.dtype)
    image = nib.Nifti1Image(values, np.eye(4), header)
    nib.save(image, tmp_path / "a.nii")
    data = read_scan(find_scans([tmp_path / "a.nii"])[0], 1).data
    np.testing.assert_array_equal(data, values.astype(np.float32))


def test_a_single_slice_is_warned_of(threshold_run, tmp_path):
    scan = save_nifti(tmp_path / "a.nii", blobs((16, 16, 1)))
    assert "the scan is a single slice, but the model works in 3-D" in predict(threshold_run, scan, tmp_path / "out")[1]
