"""A mask is in the place of its scan: orientations, oblique and anisotropic grids, single slices, data types."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from toy_runs import blobs, save_nifti, threshold_weights, write_run

from medseg_supcon.inference import Predictor


def known_mask(scan: np.ndarray) -> np.ndarray:
    """What `threshold_run` must say of a scan at the plan's own spacing."""
    return np.where(scan > 2, 255, np.where(scan > 1, 4, 0)).astype(np.uint8)


def test_all_48_orientations_and_an_oblique_one(threshold_run: Path, tmp_path: Path) -> None:
    scan = blobs((14, 11, 9))
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", [8, -12, 20], degrees=True).as_matrix()
    turn[:3, 3] = (10, -20, 30)
    names = []
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            for kind, affine in (("straight", np.eye(4)), ("oblique", turn)):
                orientation = np.array([[a, f] for a, f in zip(axes, flips, strict=True)])
                image = nib.Nifti1Image(scan, affine).as_reoriented(orientation)
                name = f"{kind}{''.join(map(str, axes))}{''.join('+-'[f < 0] for f in flips)}"
                save_nifti(tmp_path / "scans" / f"{name}.nii", np.asarray(image.dataobj), image.affine)
                names.append((name, orientation))
    assert len(names) == 96
    manifest = Predictor(threshold_run, device="cpu").run([tmp_path / "scans"], tmp_path / "out")
    assert manifest["summary"]["done"] == 96
    for name, orientation in names:
        mask, source = (
            nib.load(tmp_path / "out" / f"{name}.nii.gz"),
            nib.load(tmp_path / "scans" / f"{name}.nii"),
        )
        assert mask.shape == source.shape
        np.testing.assert_array_equal(mask.affine, source.affine)
        back = np.asarray(mask.as_reoriented(_inverse(orientation)).dataobj)
        np.testing.assert_array_equal(back, known_mask(scan), err_msg=name)
        ours, theirs = (sitk.ReadImage(str(i.get_filename())) for i in (mask, source))
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(ours, what)(), getattr(theirs, what)(), atol=1e-5)


def _inverse(orientation: np.ndarray) -> np.ndarray:
    inverse = np.empty((3, 2))
    for source, (target, flip) in enumerate(orientation):
        inverse[int(target)] = source, flip
    return inverse


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (2, 0), (3, 4), (0, 0)])
def test_affines_and_their_codes_are_kept(threshold_run: Path, tmp_path: Path, codes: tuple[int, int]) -> None:
    affine = np.diag([-0.7, 0.8, 5.0, 1.0])
    affine[:3, 3] = (3, -4, 5)
    scan = save_nifti(tmp_path / "a.nii", blobs((16, 12, 5)), affine, codes)
    Predictor(threshold_run, device="cpu").run([scan], tmp_path / "out")
    source, mask = nib.load(scan), nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-6)
    assert int(mask.header["qform_code"]) == codes[0]
    assert int(mask.header["sform_code"]) == codes[1]
    np.testing.assert_allclose(mask.header.get_zooms(), source.header.get_zooms(), rtol=1e-6)
    for form in ("get_qform", "get_sform"):
        ours, theirs = getattr(mask, form)(coded=True), getattr(source, form)(coded=True)
        if theirs[1]:
            np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    target=st.sampled_from([(1.5, 1.5, 1.5), (0.7, 2.0, 4.0), (6.0, 1.0, 1.0)]),
    seed=st.integers(0, 99),
)
def test_any_grid_in_is_the_grid_out(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    angles: tuple[float, float, float],
    order: list[int],
    signs: tuple[int, int, int],
    target: tuple[float, float, float],
    seed: int,
) -> None:
    """Any orientation, oblique, anisotropic, single slices, smaller than the patch: shape and affine are kept."""
    folder = tmp_path_factory.mktemp("grid")
    run = write_run(folder / "run", threshold_weights(), spacing=list(target))
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:, order] * signs
    affine[:3, :3] = turn * spacing
    scan = np.full(shape, 1.5 if seed % 2 else 0.5, dtype=np.float32)
    path = save_nifti(folder / "scan.nii", scan, affine)
    assert Predictor(run, device="cpu").run([path], folder / "out")["summary"]["done"] == 1
    mask, source = nib.load(folder / "out" / "scan.nii.gz"), nib.load(path)
    assert mask.shape == shape
    np.testing.assert_array_equal(mask.affine, source.affine)
    assert nib.aff2axcodes(mask.affine) == nib.aff2axcodes(source.affine)
    assert (np.asarray(mask.dataobj) == (4 if seed % 2 else 0)).all()


def test_resampling_puts_the_mask_where_the_structure_is(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """A ramp along the world's z: the mask's edge lies where the ramp passes the threshold, in any grid."""
    run = make_run(weights=threshold_weights(), spacing=[1.0, 1.0, 1.0])
    affine = np.array([[0, 0.9, 0, 3], [-0.8, 0, 0, 7], [0, 0, 2.5, -20], [0, 0, 0, 1]])
    z = (affine @ np.stack([*np.indices((12, 10, 16)).reshape(3, -1), np.ones(12 * 10 * 16)]))[2].reshape(12, 10, 16)
    scan = (0.5 + (z + 20) / 20).astype(np.float32)  # passes 1 at z = -10 and 2 at z = 10
    mask = Predictor(run, device="cpu").predict(save_nifti(tmp_path / "a.nii", scan, affine)).mask
    sure = np.abs(z + 10) > 0.51  # half a voxel of the model's grid
    assert ((mask > 0) == (z > -10))[sure].all()
    assert ((mask == 255) == (z > 10))[np.abs(z - 10) > 0.51].all()


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "float32", "float64", ">i2", ">f4", "int64"])
def test_data_types(threshold_run: Path, tmp_path: Path, kind: str) -> None:
    scan = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(kind)
    image = nib.Nifti1Image(scan, np.eye(4), dtype=scan.dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    mask = Predictor(threshold_run, device="cpu").predict(tmp_path / "a.nii.gz").mask
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, known_mask(scan.astype(np.float64)))


def test_scaled_integers_and_large_intensities(make_run: Callable[..., Path], tmp_path: Path) -> None:
    divide = [{"_target_": "NormalizeIntensityd", "keys": "image", "subtrahend": 0.0, "divisor": 1e6}]
    run = make_run(weights=threshold_weights(), intensity=divide)
    values = np.random.default_rng(1).integers(0, 1000, (8, 9, 6))
    image = nib.Nifti1Image(values.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1e4, 5.0)
    nib.save(image, tmp_path / "a.nii.gz")
    mask = Predictor(run, device="cpu").predict(tmp_path / "a.nii.gz").mask
    stored = (values * 1e4 + 5) / 1e6
    clear = (np.abs(stored - 1) > 1e-4) & (np.abs(stored - 2) > 1e-4)
    np.testing.assert_array_equal(mask[clear], known_mask(stored)[clear])


@pytest.mark.parametrize(
    "shape", [(9, 8, 7, 1), (9, 8, 7, 1, 1), (9, 8, 1), (1, 8, 7), (3, 2, 2), (1, 1, 1), (40, 5, 33)]
)
def test_shapes(threshold_run: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    scan = np.random.default_rng(2).uniform(0, 3, shape).astype(np.float32)
    Predictor(threshold_run, device="cpu").run([save_nifti(tmp_path / "a.nii", scan)], tmp_path / "out")
    mask = nib.load(tmp_path / "out" / "a.nii.gz")
    assert mask.shape == shape
    np.testing.assert_array_equal(np.asarray(mask.dataobj), known_mask(scan))


def test_nifti_2_gives_a_mask_that_every_reader_knows(threshold_run: Path, tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = (1 / 3, 2 / 3, 100)
    scan = blobs((9, 8, 7))
    nib.save(nib.Nifti2Image(scan, affine), tmp_path / "a.nii.gz")
    Predictor(threshold_run, device="cpu").run([tmp_path / "a.nii.gz"], tmp_path / "out")
    mask = sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))
    np.testing.assert_allclose(mask.GetOrigin(), (-1 / 3, -2 / 3, 100), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, known_mask(scan))
