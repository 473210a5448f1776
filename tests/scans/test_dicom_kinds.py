"""What DICOM headers say about values and places: used as defined, or refused with the file's name, or warned of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import AFFINE, SHAPE, STORED, group, position
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from medseg_supcon.errors import DataError
from medseg_supcon.inference import find_scans
from medseg_supcon.scans import Volume, read_scan

Write = Callable[..., Path]


def read(path: Path) -> Volume:
    (scan,) = find_scans([path])
    return read_scan(scan, 1)


def assert_truth(volume: Volume, values: np.ndarray) -> None:
    """Voxels and place are those that were written."""
    np.testing.assert_allclose(volume.data, values, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    sentence = str(error.value)
    assert str(path) in sentence and sentence.endswith(".") and "SECRET" not in sentence
    return sentence


def without(name: str) -> Callable[[Dataset, int], None]:
    return lambda image, k: delattr(image, name)


def in_slice(number: int, **header: Any) -> Callable[[Dataset, int], None]:
    """Changes one slice; None deletes an element."""

    def change(image: Dataset, k: int) -> None:
        for name, value in header.items() if k == number else ():
            if value is None:
                delattr(image, name)
            else:
                setattr(image, name, value)

    return change


# --- how large a pixel is, and where slices are


@pytest.mark.parametrize("spacing", [None, "", ["0", "0"], ["1.1", "0"], ["-1", "1"], ["1.1"]])
def test_a_pixel_spacing_that_is_none(series: Write, spacing: Any) -> None:
    path = series(
        without("PixelSpacing") if spacing is None else None,
        **({"PixelSpacing": spacing} if spacing is not None else {}),
    )
    assert "does not say how large a pixel is" in refused(path)


def test_an_imager_pixel_spacing_or_an_aspect_ratio_is_none(series: Write) -> None:
    path = series(without("PixelSpacing"), ImagerPixelSpacing=["1.1", "0.9"], PixelAspectRatio=["11", "9"])
    assert "does not say how large a pixel is" in refused(path)


@pytest.mark.parametrize("spacing", [["2.2", "1.8"], ["1.1", "1.1"], None])
def test_a_pixel_spacing_that_differs_in_one_slice(series: Write, spacing: Any) -> None:
    path = series(in_slice(2, PixelSpacing=spacing))
    sentence = refused(path)
    assert sentence.startswith(f"{path / 'i1.dcm'}: its PixelSpacing is") and "have another" in sentence


@pytest.mark.parametrize("where", ["shared", "frame"])
@pytest.mark.parametrize("spacing", [None, ["0", "0"]])
def test_multi_frame_pixel_spacing(enhanced: Write, where: str, spacing: Any) -> None:
    def change(image: Dataset, shared: Dataset, frames: list[Dataset]) -> None:
        if where == "shared":
            measures = shared.PixelMeasuresSequence[0]
        else:
            frames[3].PixelMeasuresSequence = [measures := group(SliceThickness="1.2")]
        if spacing is None and "PixelSpacing" in measures:
            del measures.PixelSpacing
        elif spacing is not None:
            measures.PixelSpacing = spacing

    says = "how large a pixel is" if where == "shared" else "frame 4: its PixelSpacing is not given"
    assert says in refused(enhanced(change))


def test_multi_frame_pixel_spacing_that_differs(enhanced: Write) -> None:
    def change(image: Dataset, shared: Dataset, frames: list[Dataset]) -> None:
        frames[1].PixelMeasuresSequence = [group(PixelSpacing=["2.2", "1.8"])]

    assert "frame 2: its PixelSpacing is 2.2 x 1.8, and" in refused(enhanced(change))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 3, 0, 2, 4]])
def test_frames_in_any_order(enhanced: Write, order: list[int]) -> None:
    assert_truth(read(enhanced(order=order)), STORED)


def test_a_spacing_per_frame(enhanced: Write) -> None:
    def change(image: Dataset, shared: Dataset, frames: list[Dataset]) -> None:
        measures = shared.PixelMeasuresSequence
        del shared.PixelMeasuresSequence
        for frame in frames:
            frame.PixelMeasuresSequence = measures

    assert_truth(read(enhanced(change)), STORED)


def test_fewer_groups_than_frames(enhanced: Write) -> None:
    path = enhanced(lambda image, shared, frames: frames.pop())
    assert "a slice of its series may be missing" in str(find_scans([path.parent])[0].problem)
    assert "announces 5 frames and describes 4" in refused(path)


@pytest.mark.parametrize(
    ("header", "thickness"),
    [
        ({"SliceThickness": "3", "SpacingBetweenSlices": "4"}, 4),
        ({"SliceThickness": "3"}, 3),
        ({"SliceThickness": "3", "SpacingBetweenSlices": "-20"}, 3),
        ({"SliceThickness": "0"}, None),
        ({"SliceThickness": ""}, None),
    ],
)
def test_a_single_slice(series: Write, header: dict[str, Any], thickness: float | None) -> None:
    folder = series(**header)
    for file in folder.iterdir():
        if file.name != "i0.dcm":
            file.unlink()
    if thickness is None:
        assert "how thick" in refused(folder / "i0.dcm")
    else:
        assert read(folder).grid.spacing == pytest.approx([0.9, 1.1, thickness])


@pytest.mark.parametrize("change", [{"SpacingBetweenSlices": "-20"}, {"SliceThickness": ""}, {"SliceThickness": "9"}])
def test_positions_count_before_thickness(series: Write, change: dict[str, Any]) -> None:
    assert_truth(read(series(**change)), STORED)


@pytest.mark.parametrize("turn", [[0] * 6, [-1, 0, 0, -1, 0, 0], [-1, 0, 0, 0.1, -1, 0]])
def test_directions_that_are_none(series: Write, turn: list[float]) -> None:
    assert "ImageOrientationPatient is not a pair" in refused(series(ImageOrientationPatient=turn))


@pytest.mark.parametrize("name", ["ImageOrientationPatient", "ImagePositionPatient"])
def test_a_place_that_is_missing(series: Write, name: str) -> None:
    assert "where it is in the body" in refused(series(without(name)))


@pytest.mark.parametrize("shift", [{3: 3.4}, {4: 5.0}, {2: 1.0}])
def test_gaps_and_copies(series: Write, shift: dict[int, float]) -> None:
    def change(image: Dataset, k: int) -> None:
        image.ImagePositionPatient = position(shift.get(k, k))

    says = refused(series(change))
    assert "evenly spaced" in says or "several volumes" in says


# --- what a value means


def test_a_slope_per_slice(series: Write) -> None:
    def pet(image: Dataset, k: int) -> None:
        image.Modality, image.RescaleSlope, image.RescaleIntercept = "PT", str(0.5 + k / 4), "-3"

    assert_truth(read(series(pet)), STORED * (0.5 + np.arange(5) / 4) - 3)


@pytest.mark.parametrize("where", ["frame", "shared", "root"])
def test_a_slope_per_frame(enhanced: Write, where: str) -> None:
    slopes = 0.1 * 1.5 ** np.arange(5) if where == "frame" else np.full(5, 0.25)

    def change(image: Dataset, shared: Dataset, frames: list[Dataset]) -> None:
        values = [group(RescaleSlope=f"{s:.8g}", RescaleIntercept="7", RescaleType="US") for s in slopes]
        if where == "root":
            image.RescaleSlope, image.RescaleIntercept = "0.25", "7"
        elif where == "shared":
            shared.PixelValueTransformationSequence = values[:1]
        else:
            for frame, value in zip(frames, values, strict=True):
                frame.PixelValueTransformationSequence = [value]

    assert_truth(read(enhanced(change)), STORED * slopes + 7)


@pytest.mark.parametrize(
    "odd", [{"RescaleSlope": None, "RescaleIntercept": None}, {"RescaleSlope": "", "RescaleIntercept": ""}]
)
def test_a_rescale_missing_in_one_slice(series: Write, odd: dict[str, Any]) -> None:
    path = series(in_slice(4, **odd), RescaleSlope="2", RescaleIntercept="-500")
    assert "must be on one scale" in refused(path) and "i2.dcm" in refused(path)


def test_a_rescale_missing_in_one_frame(enhanced: Write) -> None:
    def change(image: Dataset, shared: Dataset, frames: list[Dataset]) -> None:
        for frame in frames[1:]:
            frame.PixelValueTransformationSequence = [group(RescaleSlope="2", RescaleIntercept="1")]

    assert "must be on one scale" in refused(enhanced(change))


@pytest.mark.parametrize(
    "header",
    [{"RescaleSlope": "2"}, {"RescaleIntercept": "2"}, {"RescaleSlope": "0", "RescaleIntercept": "1"}],
)
def test_half_a_rescale(series: Write, header: dict[str, str]) -> None:
    assert "contradictory" in refused(series(**header))


def test_units_that_differ(series: Write) -> None:
    path = series(in_slice(1, RescaleType="US"), RescaleSlope="1", RescaleIntercept="0", RescaleType="HU")
    assert "must be on one scale" in refused(path)


def lut(first: int, table: np.ndarray) -> Dataset:
    return group(LUTDescriptor=[len(table), first, 16], ModalityLUTType="US", LUTData=table.astype("<u2").tobytes())


def test_a_modality_lut(series: Write) -> None:
    """Values below the table take its first, values above it its last entry."""
    table = np.random.default_rng(1).permutation(400) * 3

    def change(image: Dataset, k: int) -> None:
        image.PixelRepresentation = 0
        image.ModalityLUTSequence = [lut(200, table)]
        image.ModalityLUTSequence[0]["LUTData"].VR = "OW"
        image.ModalityLUTSequence[0]["LUTDescriptor"].VR = "US"

    assert_truth(read(series(change)), table[np.clip(STORED.astype(int) - 200, 0, 399)])


def test_a_modality_lut_and_a_slope(series: Write) -> None:
    def change(image: Dataset, k: int) -> None:
        image.ModalityLUTSequence = [lut(0, np.arange(1000))]
        image.ModalityLUTSequence[0]["LUTData"].VR = "OW"
        image.ModalityLUTSequence[0]["LUTDescriptor"].VR = "SS"

    assert "there is a Modality LUT besides" in refused(series(change, RescaleSlope="1", RescaleIntercept="0"))


@pytest.mark.parametrize("modality", ["CT", "MR", "NM"])
@pytest.mark.parametrize("compressed", [False, True])
def test_monochrome1_changes_no_value(series: Write, modality: str, compressed: bool) -> None:
    def change(image: Dataset, k: int) -> None:
        if compressed:
            image.compress(RLELossless, generate_instance_uid=False)

    volume = read(
        series(
            finish=change,
            Modality=modality,
            PhotometricInterpretation="MONOCHROME1",
            RescaleSlope="2",
            RescaleIntercept="-1024",
        )
    )
    assert_truth(volume, STORED * 2.0 - 1024)
    assert [issue.code for issue in volume.issues] == ([] if modality == "CT" else ["monochrome1"])


@pytest.mark.parametrize("header", [{}, {"RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "Z_EFF"}])
def test_ct_that_is_not_in_hounsfield_units(series: Write, header: dict[str, str]) -> None:
    assert [issue.code for issue in read(series(Modality="CT", **header)).issues] == ["not_hounsfield"]


@pytest.mark.parametrize("kind", ["RGB", "PALETTE COLOR", "YBR_FULL"])
def test_colours(series: Write, kind: str) -> None:
    def change(image: Dataset, k: int) -> None:
        image.PhotometricInterpretation = kind
        if kind != "PALETTE COLOR":
            image.SamplesPerPixel, image.PlanarConfiguration = 3, 0
            image.PixelData = image.PixelData * 3

    assert "in colour" in refused(series(change))


# --- how voxels are stored


def test_signed_and_unsigned_slices(series: Write) -> None:
    stored = STORED.copy()
    stored[:, :, 0] -= 700

    def change(image: Dataset, k: int) -> None:
        image.PixelRepresentation = int(k == 0)
        image.PixelData = np.ascontiguousarray(stored[:, :, k].T).astype("<i2").tobytes()

    assert_truth(read(series(change)), stored)


@pytest.mark.parametrize("signed", [0, 1])
def test_an_overlay_in_the_upper_bits(series: Write, signed: int) -> None:
    stored = STORED - 500 * signed

    def change(image: Dataset, k: int) -> None:
        pixels = np.ascontiguousarray(stored[:, :, k].T).astype("<i2").view("<u2") & 0x0FFF
        pixels[::2] |= 0x8000
        image.PixelData = pixels.tobytes()

    assert_truth(read(series(change, BitsStored=12, HighBit=11, PixelRepresentation=signed)), stored)


def test_bits_that_contradict_each_other(series: Write) -> None:
    assert "HighBit" in refused(series(BitsStored=12, HighBit=15))


@pytest.mark.parametrize("bits", [8, 32])
def test_other_sizes_of_integers(series: Write, bits: int) -> None:
    stored = STORED // (4 if bits == 8 else 1)

    def change(image: Dataset, k: int) -> None:
        image.BitsAllocated = image.BitsStored = bits
        image.HighBit, image.PixelRepresentation = bits - 1, 0
        pixels = np.ascontiguousarray(stored[:, :, k].T)
        image.PixelData = pixels.astype(f"<u{bits // 8}").tobytes()

    assert_truth(read(series(change)), stored)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_transfer_syntaxes(series: Write, syntax: Any) -> None:
    def change(image: Dataset, k: int) -> None:
        if syntax == RLELossless:
            image.compress(RLELossless, generate_instance_uid=False)
        else:
            image.file_meta.TransferSyntaxUID = syntax

    assert_truth(read(series(finish=change)), STORED)


def test_lossless_jpeg_of_several_slopes(series: Write, tmp_path: Path) -> None:
    """Compressed by ITK; ITK would also rescale and invert what it reads."""

    def change(image: Dataset, k: int) -> None:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "itk.dcm"))
        writer.SetUseCompression(True)
        writer.SetCompressor("JPEG")
        writer.Execute(sitk.GetImageFromArray(STORED[:, :, k : k + 1].T.astype(np.uint16)))
        packed = pydicom.dcmread(tmp_path / "itk.dcm")
        assert packed.file_meta.TransferSyntaxUID.is_encapsulated
        image.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        image["PixelData"] = packed["PixelData"]
        image.PixelRepresentation, image.PhotometricInterpretation = 0, "MONOCHROME1"
        image.RescaleSlope, image.RescaleIntercept = str(1 + k), "-1024"

    assert_truth(read(series(finish=change, Modality="CT")), STORED * (1.0 + np.arange(5)) - 1024)


def test_big_endian(series: Write) -> None:
    def change(image: Dataset, k: int) -> None:
        image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        image.PixelData = np.frombuffer(image.PixelData, "<i2").astype(">i2").tobytes()
        image.set_original_encoding(is_implicit_vr=False, is_little_endian=False)

    assert_truth(read(series(finish=change)), STORED)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("cut", [10, 60])
def test_a_slice_that_is_cut_short(series: Write, compressed: bool, cut: int) -> None:
    def change(image: Dataset, k: int) -> None:
        if compressed:
            image.compress(RLELossless, generate_instance_uid=False)

    folder = series(finish=change)
    file = folder / "i2.dcm"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match="damaged, cut short"):
        for scan in find_scans([folder]):
            read_scan(scan, 1)


def test_two_series_and_a_pipe_in_one_folder(series: Write) -> None:
    def change(image: Dataset, k: int) -> None:
        image.SeriesInstanceUID, image.SeriesNumber = ("1.2.9", 7) if k % 2 else ("1.2.8", 3)

    folder = series(change)
    os.mkfifo(folder / "pipe.dcm")
    (folder / "lost.dcm").symlink_to(folder / "not_there")
    (folder / "zero").symlink_to("/dev/zero")
    scans = find_scans([folder])
    assert [scan.name for scan in scans] == ["series_series3", "series_series7", "lost.dcm", "pipe.dcm"]
    assert [scan.problem is None for scan in scans] == [True, True, False, False]
    volume = read_scan(scans[0], 1)
    np.testing.assert_array_equal(volume.data, STORED[:, :, ::2])
    assert volume.grid.spacing[2] == pytest.approx(2.4) and volume.data.shape == (*SHAPE[:2], 3)


@pytest.mark.parametrize(("spaces", "codes"), [(1, []), (2, ["frame_of_reference"]), (5, ["frame_of_reference"])])
def test_frames_of_reference(series: Write, spaces: int, codes: list[str]) -> None:
    """Places in two of them cannot be compared, but some programs write a new one per file when they anonymise."""

    def change(image: Dataset, k: int) -> None:
        image.FrameOfReferenceUID = f"1.2.77.{k % spaces}"

    volume = read(series(change))
    assert_truth(volume, STORED)
    assert [issue.code for issue in volume.issues] == codes and "1.2.77" not in str(volume.issues)


def test_a_modality_lut_of_signed_values(series: Write) -> None:
    table = np.arange(1000)[::-1] * 5

    def change(image: Dataset, k: int) -> None:
        image.PixelData = np.ascontiguousarray(STORED[:, :, k].T - 500).astype("<i2").tobytes()
        image.ModalityLUTSequence = [lut(-500, table)]
        image.ModalityLUTSequence[0]["LUTData"].VR = "OW"
        image.ModalityLUTSequence[0]["LUTDescriptor"].VR = "SS"

    assert_truth(read(series(change)), table[STORED])


def test_slices_of_different_bits_are_warned_of(series: Write) -> None:
    volume = read(series(in_slice(2, BitsStored=15, HighBit=14)))
    assert [issue.code for issue in volume.issues] == ["bits"]


def test_a_slice_out_of_line_is_not_zero_millimetres_off(series: Write) -> None:
    x, *rest = position(2)
    sentence = refused(series(in_slice(2, ImagePositionPatient=[f"{float(x) + 0.5:.4f}", *rest])))
    assert re.search(r"sideways by up to 0\.[1-5]\d* mm .*a slice out of line", sentence)
