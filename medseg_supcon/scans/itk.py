"""Reading a scan from MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr) with SimpleITK."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt

from medseg_supcon.errors import DataError
from medseg_supcon.scans.nifti import GUESS, not_a_file
from medseg_supcon.scans.volume import Affine, Grid, Issue, Volume

# Named, as ITK itself does not know endings in capitals.
READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
ITK_ENDINGS = tuple(READERS)
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's and DICOM's world is LPS
HEADER_BYTES = 2**20
MOST_FILES = 100_000
SPACES = ("leftposteriorsuperior", "lps", "rightanteriorsuperior", "ras", "leftanteriorsuperior", "las")
MILLIMETRES = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "???", "none"}
MATRICES = ("TransformMatrix", "Rotation", "Orientation")
UNSCALED = {"ElementToIntensityFunctionSlope": 1.0, "ElementToIntensityFunctionOffset": 0.0}  # ITK ignores both
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


def ras_affine(lps: npt.NDArray[Any]) -> Affine:
    """A (4, 4) affine to LPS mm as one to RAS+ mm, in NIfTI's precision: a scan gives one mask in any format."""
    # MONAI's Spacing aligns its grid by corners or by centres, depending on the last digits of an oblique affine.
    return np.asarray(RAS @ lps, dtype=np.float32).astype(np.float64)


def read_itk(file: Path) -> Volume:
    """Voxels (X, Y, Z) or (X, Y, Z, C), the grid, and what its header does not say."""
    import SimpleITK as sitk

    issues, letters = _check_header(file)
    image = _itk(file, "Execute")
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3:
        raise DataError(f"{file}: expected a 3-D scan, found {image.GetDimension()} dimensions. Give one volume.")
    array: npt.NDArray[Any] = sitk.GetArrayFromImage(image)  # (z, y, x) or (z, y, x, c)
    data = array.transpose((2, 1, 0, 3)[: array.ndim])
    affine = _affine(image)
    axes = "".join(OPPOSITE.get(letter, "?") for letter in letters)
    if axes and "?" not in axes and axes != "".join(nibabel.aff2axcodes(affine)):
        sentence = f"its AnatomicalOrientation ({letters}) contradicts its TransformMatrix, which is used: {GUESS}"
        issues.append(Issue("forms_disagree", "warning", sentence))
    return Volume(data, Grid.at(data.shape[:3], affine), affine, tuple(issues))


def read_itk_header(file: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape (X, Y, Z) or (X, Y, Z, C), and affine to RAS+ mm, without the voxels; raises DataError if damaged."""
    _check_header(file)
    reader = _itk(file, "ReadImageInformation")
    channels, size = reader.GetNumberOfComponents(), (*reader.GetSize(), 1)[:3]
    return (*size, channels) if channels > 1 else size, _affine(reader)


def _itk(file: Path, method: Literal["Execute", "ReadImageInformation"]) -> Any:
    """The image, or the reader that has read its header."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(READERS[file.suffix.lower()])
    reader.SetFileName(str(file))
    try:
        image = getattr(reader, method)()
    except RuntimeError as error:
        if "allocat" in str(error).lower():  # ITK's own words for a full memory
            raise MemoryError(str(file)) from error
        reason = "It, or the file that holds its voxels, is damaged or not the format that its name says."
        raise DataError(f"{file}: cannot be read. {reason}") from error
    return reader if image is None else image


def _affine(image: Any) -> Affine:
    """Voxel indices to RAS+ mm of a SimpleITK image, or reader; of more than 3 dimensions the first three."""
    lps, n, m = np.eye(4), image.GetDimension(), min(image.GetDimension(), 3)
    lps[:m, :m] = (np.reshape(image.GetDirection(), (n, n)) * image.GetSpacing())[:m, :m]
    lps[:m, 3] = image.GetOrigin()[:m]
    return ras_affine(lps)


def _check_header(file: Path) -> tuple[list[Issue], str]:
    """What the text of a header does not say and ITK would guess, and MetaImage's second orientation in letters."""
    if (problem := not_a_file(file)) is not None:
        raise DataError(problem)
    with file.open("rb") as stream:
        lines = stream.read(HEADER_BYTES).decode("latin-1").splitlines()
    if not lines:
        raise DataError(f"{file}: the file is empty (0 bytes). Copy or export it again.")
    meta = READERS[file.suffix.lower()] == "MetaImageIO"
    fields, names = _fields(lines, meta)
    for name in names:
        if (problem := not_a_file(file.parent / name)) is not None:
            raise DataError(f"{file}: the file that holds its voxels cannot be read. {problem}")
    if fields.get("CompressedData", "").lower() == "true" and not _unpacks(file, names):
        raise DataError(f"{file}: its compressed voxels are damaged or cut short. Copy or export it again.")
    if not ("ElementDataFile" in fields if meta else lines[0].startswith("NRRD")):
        return [], ""  # not of this format: ITK says so
    doubt = _doubt(file, fields, meta)
    issues = [Issue("no_orientation", "warning", f"its header {doubt}: {GUESS}")] if doubt else []
    return issues, fields.get("AnatomicalOrientation", "")


def _fields(lines: Sequence[str], meta: bool) -> tuple[dict[str, str], list[str]]:
    """What a MetaImage or NRRD header says, and the files of voxels; NRRD's keys in small letters without spaces."""
    fields: dict[str, str] = {}
    for number, line in enumerate(lines):
        key, _, value = line.partition("=" if meta else ":")
        if not meta and not line.strip():  # the end
            break
        if value.startswith("="):  # NRRD's custom keys
            continue
        key = key.strip() if meta else key.lower().replace(" ", "")
        fields[key] = value.strip()
        if key in ("ElementDataFile", "datafile"):
            return fields, _data_files(fields[key], lines[number + 1 :])
    return fields, []


def _data_files(value: str, below: Sequence[str]) -> list[str]:
    """The files of voxels: a name, a list in the lines below, or a pattern with first, last and step."""
    if value.upper() == "LOCAL":
        return []
    if value.upper().split(" ")[0] == "LIST":
        return [line.strip() for line in below if line.strip()][:MOST_FILES]
    pattern = re.fullmatch(r"([^%]*)%(0?\d{0,2})d([^%]*?)\s+(\d+)\s+(\d+)\s+(\d+)(\s+\d+)?", value)
    if pattern is None:
        return [value]
    numbers = range(int(pattern[4]), int(pattern[5]) + 1, max(1, int(pattern[6])))[:MOST_FILES]
    return [f"{pattern[1]}{n:{pattern[2]}d}{pattern[3]}" for n in numbers]


def _unpacks(file: Path, names: Sequence[str]) -> bool:
    """Whether the compressed voxels of a MetaImage are whole: ITK takes what it cannot unpack for zeros."""
    unpack = zlib.decompressobj(zlib.MAX_WBITS + 32)
    with (file.parent / names[0] if names else file).open("rb") as stream, suppress(zlib.error):
        while not names and (line := stream.readline()) and b"ElementDataFile" not in line:
            pass
        while part := stream.read(2**16):
            unpack.decompress(part)
    return unpack.eof


def _doubt(file: Path, fields: dict[str, str], meta: bool) -> str:
    """What a header does not say about the orientation; DataError if it gives no voxel size, or not in mm."""
    units = fields.get("spaceunits", fields.get("units", f'"{fields.get("DistanceUnits", "")}"'))
    if odd := set(re.findall(r'"([^"]*)"', units)) - MILLIMETRES:
        raise DataError(f"{file}: its header gives lengths in {min(odd)}, expected mm. Convert it.")
    for key, plain in UNSCALED.items():
        if _numbers(fields.get(key, "")) not in ([], [plain]):
            raise DataError(f"{file}: its header scales the values ({key} {fields[key]}). Convert it to plain values.")
    matrix = _numbers(next((fields[key] for key in MATRICES if key in fields), ""))
    if len(matrix) == 9 and np.abs(np.linalg.norm(np.reshape(matrix, (3, 3)), axis=1) - 1).max() > 0.01:
        raise DataError(f"{file}: the axes of its TransformMatrix are not of length 1. Convert it from its source.")
    vectors = [_numbers(v) for v in re.findall(r"\(([^)]*)\)", fields.get("spacedirections", ""))]
    if meta:
        name, sizes = "ElementSpacing", _numbers(fields.get("ElementSpacing", fields.get("ElementSize", "")))
        doubt = "" if set(MATRICES) & set(fields) else "gives no TransformMatrix"
    elif vectors:
        name, sizes = "space directions", [math.hypot(*v) for v in vectors]
        space = fields.get("space", "").lower().replace("-", "").replace(" ", "")
        doubt = "" if space in SPACES else "does not name its space"
    else:
        name, sizes, doubt = "spacings", _numbers(fields.get("spacings", "")), "gives no space directions"
    # an axis of channels, or a further axis of one, may have no size; 2-D is refused as such
    flat = fields.get("NDims" if meta else "dimension") in ("1", "2")
    if not flat and sum(math.isfinite(size) and size > 0 for size in sizes) < 3:
        reason = f"its header does not say how large a voxel is ({name} missing, 0, negative or not a number)"
        raise DataError(f"{file}: {reason}. Add it, in mm per axis, or convert the scan again from its source.")
    return doubt


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return []
