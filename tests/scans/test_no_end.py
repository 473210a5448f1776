"""Files that would take for ever, and values that spoil all others: each ends at once, with a sentence."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import SHAPE, STORED
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medseg_supcon.datasets import check_dataset, read_dataset
from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import Grid, is_whole, outliers, read_header, read_nifti, read_scan, write_nifti

VOXELS = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def seconds() -> Iterator[None]:
    """A test that hangs fails."""

    def stop(*_: object) -> None:
        pytest.fail("took longer than 20 s")  # no Exception, which a reader would catch

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(path: Path, channels: int = 1) -> str:
    with pytest.raises(DataError) as error:
        for scan in find_scans([path], channels):
            read_scan(scan, channels)
    assert str(path) in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd", "a.dcm", "a_0000.nii", "a_0000.mhd"])
def test_a_scan_that_is_not_a_file(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    make(tmp_path / name)
    assert "pipe or device" in refused(tmp_path / name)
    # as one of two channels, and as a mask that is there already
    for scan in find_scans([tmp_path], 2):
        with pytest.raises(DataError):
            read_scan(scan, 2)
    assert not is_whole(tmp_path / name)


@pytest.mark.parametrize("make", [pipe, device, folder, nothing])
@pytest.mark.parametrize("value", ["other", "LIST\nother", "./../{}/other", "oth%01der 1 1 1"])
@pytest.mark.parametrize("kind", ["mhd", "nhdr", "mha"])
def test_voxels_in_what_is_not_a_file(tmp_path: Path, make: Callable[[Path], None], value: str, kind: str) -> None:
    image = sitk.GetImageFromArray(VOXELS.T)
    path = tmp_path / f"a.{kind}"
    sitk.WriteImage(image, str(path))
    key = b"data file: " if kind == "nhdr" else b"ElementDataFile = "
    head = path.read_bytes().split(key)[0]
    path.write_bytes(head + key + value.format(tmp_path.name).encode() + b"\n")
    make(tmp_path / ("oth1er" if "%" in value else "other"))
    assert "the file with its voxels cannot be read" in refused(path)


def test_voxels_in_a_list_of_files(tmp_path: Path) -> None:
    """What is sound is read as before."""
    path = tmp_path / "a.mhd"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS.T), str(path))
    for k in range(4):
        (tmp_path / f"s{k}.raw").write_bytes(VOXELS[:, :, k].tobytes(order="F"))
    head = path.read_bytes().split(b"ElementDataFile")[0]
    for value in ("LIST\ns0.raw\ns1.raw\ns2.raw\ns3.raw", "s%d.raw 0 3 1"):
        path.write_bytes(head + f"ElementDataFile = {value}\n".encode())
        np.testing.assert_array_equal(read_scan(find_scans([path])[0], 1).data, VOXELS)


# --- data behind the voxels


def nifti(path: Path, voxels: np.ndarray = VOXELS) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def zeros(path: Path, count: int) -> None:
    """Appends a gzip member of zeros."""
    packer, block = zlib.compressobj(9, zlib.DEFLATED, 31), b"\0" * 2**22
    with path.open("ab") as file:
        for _ in range(count // len(block)):
            file.write(packer.compress(block))
        file.write(packer.flush())


def test_zeros_behind_a_member(tmp_path: Path) -> None:
    """No more is unpacked than the header announces, and a little: seconds per GiB."""
    path = nifti(tmp_path / "a.nii.gz")
    zeros(path, 2**27)
    reads: list[int] = []
    original = gzip.GzipFile.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", lambda self, n=-1: reads.append(n) or original(self, n))
        assert "has more than" in refused(path)
        assert not is_whole(path)
    assert min(reads) >= 0 and sum(reads) < 2**24
    with pytest.raises(DataError, match="has more than"):
        read_nifti(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_hole_behind_the_voxels(tmp_path: Path, name: str) -> None:
    path = nifti(tmp_path / name)
    with path.open("ab") as file:
        file.truncate(2**33)  # sparse: takes no room
    assert "has more than" in refused(path)


def test_a_little_behind_the_voxels_is_padding(tmp_path: Path) -> None:
    plain = nifti(tmp_path / "a.nii")
    plain.write_bytes(plain.read_bytes() + b"\0" * 5000)
    packed = nifti(tmp_path / "b.nii.gz")
    packed.write_bytes(packed.read_bytes() + b"\0" * 5000)
    for path in (plain, packed):
        np.testing.assert_array_equal(read_scan(find_scans([path])[0], 1).data, VOXELS)


def test_voxels_that_begin_far_away(tmp_path: Path) -> None:
    content = bytearray(nifti(tmp_path / "b.nii").read_bytes())
    content[108:112] = struct.pack("<f", 1e9)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(content)))
    assert "after byte 1,000,000,000" in refused(tmp_path / "a.nii.gz")


def test_a_data_set_with_a_pipe_and_a_bomb(tmp_path: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    for number, case in enumerate(("a", "b", "c")):
        nifti(tmp_path / "imagesTr" / f"{case}_0000.nii.gz", VOXELS + number)
        nifti(tmp_path / "labelsTr" / f"{case}.nii.gz", (VOXELS > 0).astype(np.uint8))
    zeros(tmp_path / "imagesTr" / "a_0000.nii.gz", 2**25)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    pipe(tmp_path / "labelsTr" / "b.nii.gz")
    (tmp_path / "dataset.json").write_text(
        '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}'
    )
    findings = check_dataset(read_dataset(tmp_path)).findings
    assert {(f.case, f.code) for f in findings if f.severity == "error"} == {
        ("a", "unreadable"),
        ("b", "unreadable"),
    }


def test_zeros_in_a_deflated_dicom_file(series: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is inflated than an image of this size takes, and what may stand before it."""

    def change(image: Dataset, k: int) -> None:
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    folder = series(finish=change)
    for file in folder.iterdir():
        content = file.read_bytes()
        end = 144 + int.from_bytes(content[140:144], "little")
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(zlib.decompress(content[end:], -15))
        packed += b"".join(packer.compress(b"\0" * 2**24) for _ in range(4 if file.name == "i0.dcm" else 0))
        assert file.name != "i0.dcm" or len(packed) < 2**17
        file.write_bytes(content[:end] + packed + packer.flush())
    limits: list[int] = []
    original = zlib.decompressobj

    class Bounded:
        def __init__(self, bits: int) -> None:
            self.inner = original(bits)

        def decompress(self, packed: bytes, most: int) -> bytes:
            limits.append(most)
            return self.inner.decompress(packed, most)

    monkeypatch.setattr(zlib, "decompressobj", Bounded)
    monkeypatch.delattr(zlib, "decompress")  # what pydicom would call
    np.testing.assert_array_equal(read_scan(find_scans([folder])[0], 1).data, STORED)
    assert len(limits) == 3 * SHAPE[2] and min(limits) > 0 and max(limits) < 2**25


# --- values


@pytest.mark.parametrize("value", [1e20, -1e20, 3e38])
def test_one_voxel_far_outside(value: float) -> None:
    scan = np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32)
    scan[2, 3, 1] = value
    assert outliers(scan) == (pytest.approx(value), 1)
    scan[2, 3, 2] = value
    assert outliers(scan) == (pytest.approx(value), 2)


@pytest.mark.parametrize(
    "scan",
    [
        np.zeros((5, 5, 5)),
        np.random.default_rng(0).exponential(size=(30, 30, 30)) ** 2,  # a long tail, as vessels have
        np.pad(np.random.default_rng(0).normal(100, 10, (20, 20, 20)), 8),
        np.where(np.indices((30, 30, 30)).sum(0) < 9, 3071.0, np.random.default_rng(0).normal(0, 400, (30, 30, 30))),
        np.random.default_rng(0).integers(-1024, 3071, (20, 20, 20)).astype(np.int16),
    ],
    ids=["zeros", "long tail", "padded", "metal", "noise"],
)
def test_scans_as_they_are_have_no_outliers(scan: np.ndarray) -> None:
    assert outliers(scan) is None


@pytest.mark.parametrize("peak", [50, 500, 5000])
def test_a_hot_spot_is_no_outlier_and_a_wrong_voxel_beside_it_is(peak: float) -> None:
    """As in PET: a lesion of a few voxels, blurred by the scanner, decides the standard deviation of all."""
    rng, away = np.random.default_rng(0), np.indices((40, 40, 40)) - 20.0
    spot = peak * np.exp(-((away - 3) ** 2).sum(axis=0) / (2 * 1.5**2))
    scan = (rng.exponential(0.01, spot.shape) + ((away**2).sum(axis=0) < 100) + spot).astype(np.float32)
    assert scan.std() > 2 * scan[spot < 0.01].std()
    assert outliers(scan) is None
    scan[1, 2, 3] = -1e20
    assert outliers(scan) == (pytest.approx(-1e20), 1)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nii"])
@pytest.mark.parametrize("value", [1e300, -1e300])
def test_a_value_that_float32_cannot_hold(tmp_path: Path, name: str, value: float) -> None:
    scan = VOXELS.astype(np.float64)
    scan[2, 3, 1] = value
    sitk.WriteImage(sitk.GetImageFromArray(scan.T), str(tmp_path / name))
    sentence = refused(tmp_path / name)
    assert "1 voxels do not fit into a 32-bit float" in sentence and f"{value:.3g}" in sentence
    scan[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(scan.T), str(tmp_path / name))
    assert "1 voxels are NaN or infinite" in refused(tmp_path / name)


def test_integers_whose_scaling_float32_cannot_hold(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.arange(120, dtype=np.int16).reshape(6, 5, 4))
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<2f", 1e37, 0)
    path.write_bytes(content)
    assert "85 voxels do not fit into a 32-bit float (the largest is 1.19e+39" in refused(path)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    affine = np.array([[0, -0.9, 0, 3], [0.8, 0, 0, -4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
    grid = Grid.at((6, 5, 4), affine)
    write_nifti(tmp_path / "m.nii.gz", (VOXELS > 0).astype(np.uint8), grid)
    image = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(image.dataobj, VOXELS > 0)
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    assert read_header(tmp_path / "m.nii.gz")[0] == (6, 5, 4) and is_whole(tmp_path / "m.nii.gz")
    (tmp_path / "m.nii.gz").write_bytes((tmp_path / "m.nii.gz").read_bytes()[:-4])
    assert not is_whole(tmp_path / "m.nii.gz")
