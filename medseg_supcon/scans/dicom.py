"""DICOM: the series in a folder, what the headers of its files say, and the volume that the slices of one make."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError
from medseg_supcon.scans.itk import ras_affine
from medseg_supcon.scans.volume import NEAR, Affine, Grid, Issue, Numbers, Volume

DICOM_ENDINGS = (".dcm", ".ima")
INDEX = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, whatever it is called
# Files of a study that hold no scan: documents, drawings, plans, and pictures made of a scan.
NOT_SCANS = (
    "SR", "PR", "KO", "DOC", "REG", "FID", "AU", "ECG", "HD", "SEG", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "RTIMAGE",
)  # fmt: skip
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEADER_BYTES = 2**24  # before the voxels, of a deflated file
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SAME = 1e-3  # mm of a place, of a unit vector, or of a pixel's edge
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
SEQUENCES = ("PixelMeasures", "PixelValueTransformation", "PlanePosition", "PlaneOrientation")  # in each group
IMAGE_TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "ModalityLUTSequence",
)  # fmt: skip
PIXEL_TAGS = [*IMAGE_TAGS, "PixelData", "FloatPixelData", "DoubleFloatPixelData"]
TEXT_TAGS = (
    "SeriesInstanceUID", "SeriesNumber", "FrameOfReferenceUID", "Modality", "ImageType", "PhotometricInterpretation",
    "BitsStored",
)  # fmt: skip
HEADER_TAGS = [
    *IMAGE_TAGS, *GROUPS, *TEXT_TAGS, "SOPClassUID", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType",
]  # fmt: skip
Series = list[tuple[str, list[Path], str]]


@dataclass(frozen=True)
class Frame:
    """A file's only slice, or one of a multi-frame file. Identifiers, which lead to a patient, are never shown."""

    file: Path
    text: dict[str, str]  # TEXT_TAGS; "" if the file does not say
    size: tuple[int, int, int]  # columns, rows and frames of the file; a zero if it holds no image
    lut: bool  # whether a Modality LUT replaces the scaling
    number: int  # in its file, from 1
    # None: the file does not say, or nothing valid
    position: Numbers | None  # (3,) of the first voxel, LPS mm
    orientation: Numbers | None  # (6,) directions of a row and of a column
    spacing: Numbers | None  # (2,) mm between rows and between columns
    thickness: float | None  # mm from this slice to the next, as far as the header says
    scaling: tuple[float, float] | None  # slope and intercept; one is NaN if it is not valid
    unit: str  # of the values after scaling, such as "HU"; "" if it is not given


def series_in(folder: Path, name: str = "") -> tuple[Series, list[Path]]:
    """The DICOM series directly in a folder, (name, slices in order, digest) each, and the damaged files.

    Series are told apart by a digest: their identifiers identify a patient's examination. Documents are skipped.
    """
    by_series, damaged = dict[str, list[Frame]](), []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.is_dir() or not looks_like_dicom(file):
            continue
        try:
            first = read_frames(file)[0]
            if 0 not in first.size and first.text["Modality"] not in NOT_SCANS:
                by_series.setdefault(first.text["SeriesInstanceUID"], []).append(first)
        except DataError:
            damaged.append(file)
    name = name or folder.resolve().name or "scan"
    texts = [frames[0].text["SeriesNumber"] for frames in by_series.values()]
    numbers = [int(text) for text in texts if re.fullmatch(r"-?\d+", text)]
    if len(set(numbers)) < len(texts):
        numbers = list(range(1, len(texts) + 1))
    series = []
    for number, (uid, frames) in sorted(zip(numbers, by_series.items(), strict=True), key=lambda pair: pair[0]):
        digest = hashlib.sha256(f"{name}\0{uid}".encode()).hexdigest()[:16]
        called = name if len(numbers) == 1 else f"{name}_series{number}"
        series.append((called, [frame.file for frame in _in_order(frames)], digest))
    return series, damaged


def _in_order(frames: Sequence[Frame]) -> list[Frame]:
    """Along the normal of the slices; as they come if one does not say where it is."""
    first = frames[0].orientation
    if first is None or any(frame.position is None for frame in frames):
        return list(frames)
    normal = np.cross(first[:3], first[3:])
    return sorted(frames, key=lambda frame: float(frame.position @ normal))  # type: ignore[operator]


def is_one_of_many(file: Path, series: Series) -> int:
    """Number of slices of the series that a slice belongs to; 0 for a file that is a volume of its own."""
    own = next((files for _, files, _ in series if file in files), [])
    return len(own) if len(own) > 1 and read_frames(file)[0].size[2] == 1 else 0


def read_dicom(files: Sequence[Path]) -> Volume:
    """The volume (X, Y, Z) that the slices of a series, or the frames of a file, make; DataError if they make none."""
    frames, affine = check_series(files)
    columns, rows, _ = frames[0].size
    data = np.empty((len(frames), rows, columns), dtype=np.float32)
    pixels = _read_stored(frames[0])
    for place, frame in enumerate(frames):
        if frame.file != frames[0].file:  # one slice per file, else all in one
            pixels = _read_stored(frame)
        stored, scaling = pixels[frame.number - 1], frame.scaling
        data[place] = stored if scaling in (None, (1.0, 0.0)) else stored * np.float64(scaling[0]) + scaling[1]
    grid = Grid.at((columns, rows, len(frames)), affine)
    return Volume(data.transpose(2, 1, 0), grid, affine, _doubts(frames))


def check_series(files: Sequence[Path]) -> tuple[list[Frame], Affine]:
    """The slices in the order of their places, and the affine to RAS+ mm; raises as `read_dicom`."""
    source = files[0].parent if len(files) > 1 else files[0]
    frames = [frame for file in files for frame in read_frames(file)]
    for frame in frames:
        modality, colours = frame.text["Modality"], frame.text["PhotometricInterpretation"]
        if 0 in frame.size or modality in NOT_SCANS:
            found = f"is not a scan, or holds no image (its DICOM modality is {modality or 'not given'})"
            raise DataError(f"{source}: {found}. Pass the scan itself.")
        if "MOSAIC" in frame.text["ImageType"].upper():
            raise DataError(f"{source}: is a mosaic, all slices tiled in one picture. Convert it with dcm2niix.")
        if colours not in ("MONOCHROME1", "MONOCHROME2"):
            found = f"is in colour ({colours or 'no PhotometricInterpretation'}), expected grey values"
            raise DataError(f"{frame.file}: {found}. Pass the scan it was made of.")
    if frames[0].size[2] > 1 and len(files) > 1:
        raise DataError(f"{source}: the series has {len(files)} volumes, one per file. Pass the file to be segmented.")
    _check_alike(frames)
    _check_scales(frames)
    frames = _in_order(frames)
    first, positions = frames[0], np.array([frame.position for frame in frames if frame.position is not None])
    if first.orientation is None or len(positions) < len(frames):
        what = "not every slice says" if len(frames) > 1 else "does not say"
        raise DataError(f"{source}: {what} where it is in the body (ImagePositionPatient). Convert it with dcm2niix.")
    if first.spacing is None:
        raise DataError(f"{first.file}: does not say how large a pixel is (no valid PixelSpacing). Export it again.")
    row, column = first.orientation[:3], first.orientation[3:]
    axes = np.array([row, column, np.cross(row, column)])
    if np.abs(axes @ axes.T - np.eye(3)).max() > 10 * SAME:
        raise DataError(f"{first.file}: ImageOrientationPatient is not a pair of perpendicular axes. Export it again.")
    if len(frames) > 1:
        _check_even(positions, axes[2], float(first.spacing.min()), source)
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
    elif first.thickness is not None:
        step = axes[2] * first.thickness
    else:
        raise DataError(f"{source}: is a single slice, and does not say how thick it is. Pass the whole series.")
    lps = np.eye(4)
    lps[:3] = np.stack([row * first.spacing[1], column * first.spacing[0], step, positions[0]], axis=1)
    return frames, ras_affine(lps)


def _check_alike(frames: Sequence[Frame]) -> None:
    """Whether all slices have one size, one direction and one pixel spacing; one that no slice gives is not missing."""
    for what, key in (("size", "size"), ("direction", "orientation"), ("PixelSpacing", "spacing")):
        values = [getattr(frame, key) for frame in frames]
        given = [value for value in values if value is not None]
        usual = np.percentile(given, 50, axis=0, method="lower") if given else None
        for frame, value in zip(frames, values, strict=True):
            if usual is not None and (value is None or np.abs(value - usual).max() > SAME):
                where = f"{frame.file}: frame {frame.number}" if frame.size[2] > 1 else frame.file
                own = "not given" if value is None else " x ".join(f"{part:g}" for part in value)
                cure = "Move it out of the folder, or export it again."
                raise DataError(f"{where}: its {what} is {own}, and other slices have another. {cure}")


def _check_scales(frames: Sequence[Frame]) -> None:
    """Whether the values of all slices are on one scale: slopes may differ, as PET's do, but none may be missing."""
    rules, units = dict[str, Path](), dict[str, Path]()  # to the first file of each
    for frame in frames:
        rule = "a Modality LUT" if frame.lut else "no rescale slope and intercept"
        if frame.scaling is not None:
            rule = "a rescale slope and intercept"
            if frame.lut or not np.isfinite(frame.scaling).all():
                besides = "there is a Modality LUT besides" if frame.lut else "one is missing or not valid"
                raise DataError(f"{frame.file}: its rescale slope is contradictory ({besides}). Export it again.")
        rules.setdefault(rule, frame.file)
        if frame.unit:
            units.setdefault(f"values in {frame.unit}", frame.file)
    for seen in (rules, units):
        if len(seen) > 1:
            (one, first), (other, second), *_ = seen.items()
            raise DataError(f"{second}: has {other}, {first} {one}: values must be on one scale. Export it again.")


def _check_even(positions: Numbers, normal: Numbers, edge: float, source: Path) -> None:
    """Whether positions in order make one volume with even gaps."""
    count, way = len(positions), positions - positions[0]
    if (places := len(np.unique(np.round(positions / SAME), axis=0))) < count:
        found = f"{count} slices at {places} places (a time series, echoes, or copies)"
        raise DataError(f"{source}: contains several volumes: {found}. Export one volume.")
    step = way[-1] / (count - 1)
    limit = NEAR * min(edge, float(np.linalg.norm(step)))
    sideways = np.linalg.norm(way - np.outer(way @ normal, normal), axis=1)
    if sideways.max() > limit:
        found = f"its slices are shifted sideways by up to {sideways.max():.2g} mm (a tilted gantry, or a slice out of line)"
        raise DataError(f"{source}: {found}. Resample it onto a straight grid first, for example with dcm2niix.")
    if np.linalg.norm(way - np.outer(np.arange(count), step), axis=1).max() > limit:
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        usual, worst = float(np.median(gaps)), int(np.abs(gaps - np.median(gaps)).argmax())
        found = f"number {worst + 1} and {worst + 2} of {count} are {gaps[worst]:.2f} mm apart, others {usual:.2f} mm"
        raise DataError(f"{source}: slices are not evenly spaced: {found}. Export the whole series.")


def _doubts(frames: Sequence[Frame]) -> tuple[Issue, ...]:
    first, doubts = frames[0], dict[str, str]()
    modality, scaled = first.text["Modality"], first.scaling is not None or first.lut
    if modality == "CT" and (not scaled or first.unit not in ("", "HU", "US")):
        what = f"gives values in {first.unit}" if scaled else "gives no rescale slope and intercept"
        doubts["not_hounsfield"] = f"is CT and {what}: they may not be Hounsfield units"
    if first.text["PhotometricInterpretation"] == "MONOCHROME1" and modality != "CT":
        doubts["monochrome1"] = "is MONOCHROME1 (shows small values bright): the stored values are used, not inverted"
    bits, spaces = ({frame.text[tag] for frame in frames} - {""} for tag in ("BitsStored", "FrameOfReferenceUID"))
    if len(bits) > 1:
        doubts["bits"] = "its slices have different BitsStored: values of some may be cut. Check them"
    if len(spaces) > 1:
        doubts["frame_of_reference"] = f"its slices have {len(spaces)} FrameOfReferenceUIDs. Check that they fit"
    return tuple(Issue(code, "warning", sentence) for code, sentence in doubts.items())


def _pydicom() -> Any:
    """The library, silenced: its warnings quote values."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def looks_like_dicom(file: Path) -> bool:
    """By its ending, or by its first bytes: DICOM files often have no ending."""
    if file.name.lower().endswith(DICOM_ENDINGS):
        return True
    start = b""
    if file.is_file():  # opening a pipe would never end
        with suppress(OSError), file.open("rb") as stream:
            start = stream.read(132)
    return start[128:] == b"DICM" or (file.suffix == "" and start[:4] in (b"\x08\0\x05\0", b"\x08\0\x08\0"))


def _open(file: Path, most: int) -> IO[bytes]:
    """The file; a deflated one inflated, but to no more than `most` bytes: pydicom has no limit."""
    stream = file.open("rb")
    start = stream.read(1024)
    stream.seek(0)
    if start[128:132] != b"DICM" or DEFLATED not in start:
        return stream
    with stream:
        meta = stream.read(144 + int.from_bytes(start[140:144], "little"))  # the file's meta information
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), most)
    return io.BytesIO(meta.replace(DEFLATED, DEFLATED[:-3] + b"\0\0\0") + plain)


def read_whole_header(file: Path) -> Any:
    """All of a readable DICOM file but its voxels, as pydicom's Dataset. It identifies the patient: show nothing of it."""
    with _open(file, HEADER_BYTES) as stream:
        return _pydicom().dcmread(stream, force=True, stop_before_pixels=True)


def read_frames(file: Path) -> list[Frame]:
    """The slices of a DICOM file by its header, one or more; DataError if it is damaged, or no image nor document."""
    try:
        if not file.is_file():
            raise ValueError("not a file")
        with _open(file, HEADER_BYTES) as stream:
            data = _pydicom().dcmread(stream, force=True, stop_before_pixels=True, specific_tags=HEADER_TAGS)
            # of what was deflated only a part is here
            start = -math.inf if isinstance(stream, io.BytesIO) else stream.tell()
            pixels = stream.seek(0, os.SEEK_END) - start
        syntax = data.file_meta.get("TransferSyntaxUID")
        index = INDEX in (data.get("SOPClassUID"), data.file_meta.get("MediaStorageSOPClassUID"))
        size = (int(data.get("Columns") or 0), int(data.get("Rows") or 0), int(data.get("NumberOfFrames") or 1))
        voxels = math.prod(size) * int(data.get("SamplesPerPixel") or 1)
        packed = syntax is not None and syntax.is_encapsulated  # how many bytes there must be shows later
        least = 0 if packed else voxels * int(data.get("BitsAllocated") or 0) // 8
        if not (index or data.get("Modality") in NOT_SCANS) and (voxels == 0 or pixels <= least):
            raise ValueError("no image")
        return list(_frames(file, data, size))
    except DataError:
        raise
    except Exception as error:  # pydicom raises a dozen kinds for damaged files
        found = "It is damaged, cut short, or holds no image"
        raise DataError(f"{file}: cannot be read as a DICOM image. {found}. Export it again.") from error


def _frames(file: Path, data: Any, size: tuple[int, int, int]) -> Iterator[Frame]:
    """The frames; what a functional group says counts before the file's own, and a frame's before the shared."""
    shared, each = (list(data.get(name) or ()) for name in GROUPS)
    count, text = 1 if 0 in size else size[2], {tag: str(data.get(tag) or "") for tag in TEXT_TAGS}
    of_all = file, text, size, bool(data.get("ModalityLUTSequence"))
    if 0 not in size and each and len(each) != count:
        raise DataError(f"{file}: announces {count} frames and describes {len(each)}. It is damaged: export it again.")
    for index in range(count):
        groups = [*each[index : index + 1], *shared[:1]]
        measures, values, position, orientation = (
            next((group[key].value[0] for group in groups if group.get(key)), data)
            for key in (f"{name}Sequence" for name in SEQUENCES)
        )
        spacing = _numbers(measures.get("PixelSpacing"), 2)
        scaling = [values.get(name) for name in ("RescaleSlope", "RescaleIntercept")]
        slope, intercept, *gaps = (
            math.nan if (number := _numbers([value], 1)) is None else float(number[0])
            for value in (*scaling, measures.get("SpacingBetweenSlices"), measures.get("SliceThickness"))
        )
        yield Frame(
            *of_all,
            number=index + 1,
            # a position of the whole file is not one of its frames'
            position=_numbers(position.get("ImagePositionPatient"), 3) if count == 1 or each else None,
            orientation=_numbers(orientation.get("ImageOrientationPatient"), 6),
            spacing=spacing if spacing is not None and spacing.min() > 0 else None,
            thickness=next((gap for gap in gaps if gap > 0), None),
            scaling=None if all(value in (None, "") for value in scaling) else (slope or math.nan, intercept),
            unit=str(values.get("RescaleType") or ""),
        )


def _numbers(value: Any, count: int) -> Numbers | None:
    try:
        numbers = np.array([float(part) for part in value])
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _read_stored(frame: Frame) -> npt.NDArray[Any]:
    """The values (frames, rows, columns) of a file, through its Modality LUT, but not scaled or inverted."""
    library = _pydicom()
    columns, rows, frames = frame.size
    try:
        with _open(frame.file, HEADER_BYTES + 8 * math.prod(frame.size)) as stream:
            data = library.dcmread(stream, force=True, specific_tags=PIXEL_TAGS)
        table = data.pop("ModalityLUTSequence", None)
        if int(data.get("HighBit", 0)) != int(data.get("BitsStored", 1)) - 1:
            raise DataError(f"{frame.file}: its HighBit and BitsStored disagree. Export the series again.")
        if data.file_meta.get("TransferSyntaxUID") is None:
            implicit, little = data.original_encoding
            native = library.uid.ImplicitVRLittleEndian if implicit else library.uid.ExplicitVRLittleEndian
            data.file_meta.TransferSyntaxUID = native if little else library.uid.ExplicitVRBigEndian
        pixels = _decompressed(data) if data.file_meta.TransferSyntaxUID.is_encapsulated else None
        if pixels is None:
            pixels = library.pixels.pixel_array(data, raw=True)
        if table is not None:
            data[table.tag] = table
            pixels = library.pixels.apply_modality_lut(pixels, data)
        return np.asarray(pixels).reshape(frames, rows, columns)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pydicom raises a dozen kinds for damaged files
        reason = "It is damaged, cut short, or compressed in an unknown way. Convert the series with dcm2niix."
        raise DataError(f"{frame.file}: its voxels cannot be read. {reason}") from error


def _decompressed(data: Any) -> npt.NDArray[Any] | None:
    """By ITK's decoders, of a copy without scaling, so that ITK neither rescales nor inverts; None if it has none."""
    import SimpleITK as sitk

    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PhotometricInterpretation = "MONOCHROME2"
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder, suppress(RuntimeError):
        copy = Path(folder, "pixels.dcm")
        data.save_as(copy, enforce_file_format=True)
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(copy), imageIO="GDCMImageIO")))
    return None
