"""A mask as a standard DICOM segmentation object (SEG) of the series that it was made from, by highdicom."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg_supcon import __version__
from medseg_supcon.bundle import Model
from medseg_supcon.datasets import Regions, target_names
from medseg_supcon.errors import ConfigError, DataError
from medseg_supcon.files import write_whole
from medseg_supcon.plan import code_parts, segment_codes
from medseg_supcon.scans import Scan, check_series, read_whole_header

SEG_ENDING = ".seg.dcm"
# What a SEG must repeat of each file, and what it must hold of the first one, even empty (type 2 of the standard).
REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


@dataclass(frozen=True)
class DicomSegWriter:
    """Writes masks of DICOM series as SEG objects: binary segments, one per foreground class or region (which may overlap).

    BINARY is the type that viewers know; LABELMAP, of 2024, is read by few. Frame positions, orientation and spacing
    are those of the source's headers. Patient and study are copied from them as the standard asks. ConfigError without
    highdicom.

    Args:
        models: that made the masks; the object names them and the SHA-256 of their weights.
    """

    models: Sequence[Model]

    def __post_init__(self) -> None:
        if importlib.util.find_spec("highdicom") is None:
            cure = "Run: pip install 'medseg-supcon[dicom-seg]'"
            raise ConfigError(f"A DICOM segmentation needs highdicom, which is not installed. {cure}")

    def write(self, mask: npt.NDArray[Any], scan: Scan, out: Path) -> None:
        """Write ``out/<name>.seg.dcm``.

        Args:
            mask: (X, Y, Z) label values, in the grid in which `scans` reads the series.

        Raises:
            DataError: the scan is not DICOM, its headers lack what the object must repeat, or the file cannot be written.
        """
        file = out / f"{scan.name}{SEG_ENDING}"
        what = f"{scan.source}: the mask {scan.name}.nii.gz is finished, but {file.name} was not written"
        if scan.kind != "dicom":
            raise DataError(f"{what}: the scan is not DICOM. Give the DICOM series, or leave out --dicom-seg.")
        try:
            segmentation = self._segmentation(mask, scan)
            write_whole(file, lambda stream: segmentation.save_as(stream, enforce_file_format=True))
        except MemoryError:
            raise
        except DataError as error:
            raise DataError(f"{what}: {error}") from error
        except OSError as error:
            raise DataError(f"{what} ({error.strerror}). Free disk space, or choose another --out.") from error
        except Exception as error:  # highdicom's and pydicom's, whose messages may quote the patient's attributes
            reason = f"highdicom does not accept its headers ({type(error).__name__})"
            raise DataError(f"{what}: {reason}. They are damaged or not standard: export the series again.") from error

    def _segmentation(self, mask: npt.NDArray[Any], scan: Scan) -> Any:
        hd = _highdicom()
        frames, _ = check_series(scan.files)
        planes = _segments(mask, self.models[0].plan)
        # The frames of one file are referred to by their numbers, so they must be in its order.
        order = sorted(range(len(frames)), key=lambda k: frames[k].number)
        frames, planes = [frames[k] for k in order], planes[order]
        sources = [read_whole_header(file) for file in dict.fromkeys(frame.file for frame in frames)]
        _check_required(sources)
        orientation = hd.PlaneOrientationSequence("PATIENT", frames[0].orientation)
        positions = [hd.PlanePositionSequence("PATIENT", frame.position) for frame in frames]
        measures = _pixel_measures(sources[0], frames)
        for number, source in enumerate(sources):
            own = positions if len(sources) == 1 else [positions[number]]
            _settle_geometry(source, orientation, measures, own)
        patient = _take_patient(sources[0])
        names = target_names(self.models[0].plan)
        # Enhanced files with one frame each: highdicom takes one such file as the source, and the others besides.
        enhanced = len(sources) > 1 and "PerFrameFunctionalGroupsSequence" in sources[0]
        result = hd.seg.Segmentation(
            source_images=sources[:1] if enhanced else sources,
            further_source_images=sources[1:] if enhanced else None,
            pixel_array=planes,
            plane_positions=positions if enhanced else None,
            segmentation_type="BINARY",
            segment_descriptions=self._descriptions(names),
            # Readers that only stack frames find one segment in its place if no frame is left out.
            omit_empty_frames=len(names) > 1,
            series_instance_uid=hd.UID(),
            series_number=1000,  # behind those of the scanner
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medseg_supcon",
            manufacturer_model_name=_text(", ".join(model.name for model in self.models)),
            software_versions=__version__,
            device_serial_number=_text("+".join(model.sha256[:16] for model in self.models)),
            content_label="MEDSEG",
            series_description=_text(f"Segmentation: {', '.join(names)}"),
            specific_character_set="ISO_IR 192",  # UTF-8, for any class name
        )
        for element in patient:
            result.add(element)
        return result

    def _descriptions(self, names: Sequence[str]) -> list[Any]:
        hd = _highdicom()
        table = segment_codes(names) | self.models[0].plan.get("segments", {})
        algorithm = hd.AlgorithmIdentificationSequence(
            "medseg_supcon",
            hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"),
            __version__,
            parameters={f"SHA-256 of {model.name}": model.sha256 for model in self.models},
        )
        descriptions = []
        for number, name in enumerate(names, 1):
            codes = {key: hd.sr.CodedConcept(*code_parts(code)) for key, code in table[name].items()}
            item = hd.seg.SegmentDescription(
                number,
                _text(name) or f"segment {number}",
                codes["category"],
                codes["type"],
                "AUTOMATIC",
                algorithm,
                anatomic_regions=[codes["region"]] if "region" in codes else None,
            )
            if "laterality" in codes:
                kind = item.SegmentedPropertyTypeCodeSequence[0]
                kind.SegmentedPropertyTypeModifierCodeSequence = [codes["laterality"]]
            descriptions.append(item)
        return descriptions


def _highdicom() -> Any:
    """The library, told to be silent: its log quotes attributes."""
    import highdicom

    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="highdicom")
    return highdicom


def _segments(mask: npt.NDArray[Any], plan: Mapping[str, Any]) -> npt.NDArray[Any]:
    """(frames, rows, columns): 1, 2, ... for the foreground classes in their order, 0 for background.

    Of regions, which may overlap, (frames, rows, columns, R) masks.
    """
    background, *values = plan["labels"].values()
    numbers = np.zeros(mask.shape, dtype=np.uint8 if len(values) < 256 else np.uint16)
    for number, value in enumerate(values, 1):
        numbers[mask == value] = number
    strange = mask[(numbers == 0) & (mask != background)]
    if strange.size:
        raise DataError(f"the mask holds {strange[0]:g}, which is no label of the model. Replace it with --overwrite.")
    regions = Regions.of(plan)
    if regions is not None:
        return np.ascontiguousarray(regions.masks(numbers).transpose(3, 2, 1, 0), dtype=np.uint8)
    return np.ascontiguousarray(numbers.transpose(2, 1, 0))


def _check_required(sources: Sequence[Any]) -> None:
    for keyword in REQUIRED:
        if not all(source.get(keyword) for source in sources):
            raise DataError(f"its headers lack {keyword}, which a SEG must repeat. Export the series again with it.")
        if keyword in REQUIRED[2:] and len({source.get(keyword) for source in sources}) > 1:
            raise DataError(f"its slices differ in {keyword}. Export them again as one series.")


def _pixel_measures(source: Any, frames: Sequence[Any]) -> Any:
    """Pixel spacing, the gap from slice to slice by the positions, and the thickness that the source gives (else the gap)."""
    gap = frames[0].thickness
    if len(frames) > 1:
        places = np.array([frame.position for frame in frames])
        gap = float(np.linalg.norm(np.ptp(places, axis=0))) / (len(frames) - 1)
    groups = [item for keyword in GROUPS for item in source.get(keyword, [])[:1]]
    measures = [item for group in groups for item in group.get("PixelMeasuresSequence", [])]
    given = [item.get("SliceThickness") for item in (*measures, source)]
    thickness = next((float(value) for value in given if value and float(value) > 0), gap)
    return _highdicom().PixelMeasuresSequence(frames[0].spacing, thickness, gap)


def _settle_geometry(source: Any, orientation: Any, measures: Any, positions: Sequence[Any]) -> None:
    """Give a source's header the geometry that was read of it, in the one place where highdicom looks for it."""
    if "PerFrameFunctionalGroupsSequence" not in source:
        for item in (orientation[0], measures[0], positions[0][0]):
            source.update(item)
        return
    from pydicom import Dataset

    shared, frames = Dataset(), [Dataset() for _ in positions]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = orientation, measures
    source.SharedFunctionalGroupsSequence = [shared]
    for frame, position in zip(frames, positions, strict=True):
        frame.PlanePositionSequence = position
    source.PerFrameFunctionalGroupsSequence = frames


def _take_patient(source: Any) -> list[Any]:
    """The elements that a header may leave empty, in Unicode, to be copied as they are: highdicom refuses odd values."""
    source.decode()
    elements = [source[keyword] for keyword in MAY_BE_EMPTY if keyword in source]
    for keyword in MAY_BE_EMPTY:
        source.pop(keyword, None)
        setattr(source, keyword, None)
    return elements


def _text(text: str) -> str:
    """A text as a DICOM long string (LO): 64 characters on one line, without a backslash."""
    return " ".join("".join(c if c.isprintable() else " " for c in text.replace("\\", "/")).split())[:64]
