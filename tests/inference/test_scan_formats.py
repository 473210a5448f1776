"""Formats that SimpleITK reads, folders of scans, names, and what is refused with which sentence."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from toy_runs import UNET, blobs, save_nifti

from medseg_supcon.errors import DataError
from medseg_supcon.inference import Predictor, find_scans
from medseg_supcon.scans import read_scan

DIRECTION = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix()


def sitk_scan(scan: np.ndarray, spacing: tuple[float, ...] = (0.8, 0.9, 2.4)) -> sitk.Image:
    """(X, Y, Z) as a SimpleITK image in an oblique place."""
    image = sitk.GetImageFromArray(scan.T)
    image.SetSpacing(spacing)
    image.SetOrigin((-12.0, 34.0, 56.0))
    image.SetDirection(DIRECTION.ravel())
    return image


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nii.gz"])
def test_formats_give_the_same_mask(threshold_run: Path, tmp_path: Path, ending: str) -> None:
    image = sitk_scan(blobs((15, 12, 8)))
    sitk.WriteImage(image, str(tmp_path / f"scan{ending}"))
    sitk.WriteImage(image, str(tmp_path / "same.nii"))
    predictor = Predictor(threshold_run, device="cpu")
    assert predictor.run([tmp_path / f"scan{ending}"], tmp_path / "out")["summary"]["done"] == 1
    mask = sitk.ReadImage(str(tmp_path / "out" / "scan.nii.gz"))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, what)(), getattr(image, what)(), atol=1e-5)
    expected = predictor.predict(tmp_path / "same.nii").mask
    assert (expected != sitk.GetArrayFromImage(mask).T).sum() <= 2


def _text(path: Path) -> None:
    path.write_text("this is no scan")


def _cut(path: Path) -> None:
    save_nifti(path.with_name("whole.nii.gz"), np.random.default_rng(0).normal(size=(30, 30, 30)))
    path.write_bytes(path.with_name("whole.nii.gz").read_bytes()[:20_000])
    path.with_name("whole.nii.gz").unlink()


def _cut_plain(path: Path) -> None:
    save_nifti(path, np.zeros((30, 30, 30)))
    path.write_bytes(path.read_bytes()[:5000])


def _with(array: np.ndarray, affine: np.ndarray | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = nib.Nifti1Image(array, np.eye(4), dtype=array.dtype)
        image.set_sform(np.eye(4) if affine is None else affine, 1)
        nib.save(image, path)

    return write


def _nan_affine(path: Path) -> None:
    save_nifti(path, np.zeros((4, 4, 4)))
    content = bytearray(path.read_bytes())
    content[280:284] = np.float32(np.nan).tobytes()  # srow_x[0]
    path.write_bytes(content)


def _itk(array: np.ndarray, vector: bool = False) -> Callable[[Path], None]:
    return lambda path: sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))


SHEARED = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
NAN = np.where(np.arange(27).reshape(3, 3, 3) == 5, np.nan, 1.0)
RGB = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "text": ("a.nii.gz", _text, "damaged or cut short"),
    "empty file": ("a.nii", lambda p: p.touch(), "the file is empty"),
    "truncated gzip": ("a.nii.gz", _cut, "damaged or cut short"),
    "truncated plain": ("a.nii", _cut_plain, "damaged or cut short"),
    "gzip of nothing": ("a.nii.gz", lambda p: p.write_bytes(gzip.compress(b"")), "damaged or cut short"),
    "2-D": ("a.nii", _with(np.zeros((8, 8))), "2-D images"),
    "4-D series": ("a.nii", _with(np.zeros((8, 8, 4, 10))), "time series"),
    "5-D": ("a.nii", _with(np.zeros((4, 4, 4, 2, 3))), "fourth axis"),
    "no voxels": ("a.nii", _with(np.zeros((4, 0, 4))), "3-D scan"),
    "sheared": ("a.nii", _with(np.zeros((4, 4, 4)), SHEARED), "sheared"),
    "singular": ("a.nii", _with(np.zeros((4, 4, 4)), np.diag([1.0, 1, 0, 1])), "position in space"),
    "parallel axes": (
        "a.nii",
        _with(np.zeros((4, 4, 4)), np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
        "parallel",
    ),
    "NaN affine": ("a.nii", _nan_affine, "position in space"),
    "NaN": ("a.nii", _with(NAN), "1 voxels are NaN or infinite"),
    "infinite": ("a.nii", _with(np.full((3, 3, 3), np.inf)), "27 voxels are NaN or infinite"),
    "too large for float32": (
        "a.nii",
        _with(np.full((3, 3, 3), 1e300)),
        "27 voxels do not fit into a 32-bit float",
    ),
    "complex": ("a.nii", _with(np.zeros((3, 3, 3), dtype=np.complex64)), "one real number each"),
    "colours": ("a.nii", _with(RGB), "one real number each"),
    "2-D mha": ("a.mha", _itk(np.zeros((8, 8))), "expected a 3-D scan"),
    "4-D mha": ("a.mha", _itk(np.zeros((5, 4, 4, 4)), False), "expected a 3-D scan, found 4 dimensions"),
    "4-D nrrd": ("a.nrrd", _itk(np.zeros((5, 4, 4, 4)), False), "3-D scan"),
    "text mha": ("a.mha", _text, "damaged or not the format"),
    "text nrrd": ("a.nrrd", _text, "damaged or not the format"),
    "vector mha": (
        "a.mha",
        lambda p: sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkVectorUInt8, 3), str(p)),
        "3 volumes",
    ),
    "text dcm": ("a.dcm", _text, "damaged, cut short, or holds no image"),
    "picture": ("a.png", _text, "not a scan"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    name, write, sentence = BAD[kind]
    write(tmp_path / name)
    with pytest.raises(DataError) as error:
        read_scan(find_scans([tmp_path / name])[0], 1)
    assert str(tmp_path / name) in str(error.value)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_paths_that_hold_no_scan(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    scans = find_scans([tmp_path / "missing.nii.gz", tmp_path / "empty"])
    assert "no such file" in str(scans[0].problem)
    assert "contains no scan" in str(scans[1].problem)


def test_folders_and_names(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.v1.nii", "C.NII.GZ", "._b.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [scan.name for scan in find_scans([tmp_path])] == ["C", "a.v1", "b"]
    # The same file twice is one scan.
    assert len(find_scans([tmp_path, tmp_path / "b.nii.gz"])) == 3


def test_endings_in_capitals_are_read(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", np.ones((4, 5, 6))).rename(tmp_path / "A.NII.GZ")
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkUInt8), str(tmp_path / "b.mha"))
    (tmp_path / "b.mha").rename(tmp_path / "B.MHA")
    for scan in find_scans([tmp_path]):
        assert read_scan(scan, 1).data.shape == (4, 5, 6)


def test_two_scans_of_one_name_are_both_refused(tmp_path: Path) -> None:
    for name in ("x/a.nii.gz", "y/a.nrrd", "y/b.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scans = {str(s.files[0].relative_to(tmp_path)): s for s in find_scans([tmp_path / "x", tmp_path / "y"])}
    assert "a.nrrd" in str(scans["x/a.nii.gz"].problem)
    assert "a.nii.gz" in str(scans["y/a.nrrd"].problem)
    assert scans["y/b.nii"].problem is None


def test_channel_files(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "plain"):
        save_nifti(tmp_path / f"{name}.nii.gz", blobs((8, 8, 8)))
    save_nifti(tmp_path / "four_0001.nii.gz", np.zeros((8, 8, 8, 2)))
    scans = {scan.name: scan for scan in find_scans([tmp_path], ["T1", "T2"])}
    assert set(scans) == {"a", "b", "plain", "four_0001"}
    assert [file.name for file in scans["a"].files] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert "2 channels" in str(scans["b"].problem)
    with pytest.raises(DataError, match="contains 1 channels, but the model takes 2"):
        read_scan(scans["plain"], 2)
    save_nifti(tmp_path / "a_0001.nii.gz", blobs((8, 8, 9)))
    with pytest.raises(DataError, match="Channels must share a grid"):
        read_scan(scans["a"], 2)
    run = make_run(network_def={**UNET, "in_channels": 2}, channels=["T1", "T2"])
    assert Predictor(run, device="cpu").predict(tmp_path / "four_0001.nii.gz").mask.shape == (8, 8, 8)
