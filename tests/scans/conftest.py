"""Series of slices and multi-frame files, as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dicom_series import ENHANCED_MR, SHAPE, STORED, Change, base, group, position
from pydicom.dataset import Dataset


@pytest.fixture
def series(tmp_path: Path) -> Callable[..., Path]:
    """series(change=None, finish=None, **header): a folder with a file per slice; `change` gets (dataset, k)."""

    def write(change: Change | None = None, finish: Change | None = None, **header: Any) -> Path:
        folder = tmp_path / "series"
        folder.mkdir()
        for k in range(SHAPE[2]):
            image = base(STORED[:, :, k].T, f"1.2.3.4.5.{k + 1}")
            image.ImagePositionPatient, image.ImageOrientationPatient = position(k), [-1, 0, 0, 0, -1, 0]
            image.PixelSpacing, image.SliceThickness = ["1.1", "0.9"], "1.2"
            for name, value in header.items():
                setattr(image, name, value)
            for edit in (change, finish):
                if edit is not None:
                    edit(image, k)
            image.save_as(folder / f"i{(3 * k) % SHAPE[2]}.dcm", enforce_file_format=True)
        return folder

    return write


@pytest.fixture
def enhanced(tmp_path: Path) -> Callable[..., Path]:
    """enhanced(change=None, order=None): a multi-frame file; `change` gets (dataset, shared, frames)."""

    def write(
        change: Callable[[Dataset, Dataset, list[Dataset]], Any] | None = None,
        order: Sequence[int] = range(SHAPE[2]),
    ) -> Path:
        image = base(STORED.T[list(order)], "1.2.3.4.5.99", ENHANCED_MR)
        image.NumberOfFrames = len(order)
        shared = group(
            PlaneOrientationSequence=[group(ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])],
            PixelMeasuresSequence=[group(PixelSpacing=["1.1", "0.9"], SliceThickness="1.2")],
        )
        frames = [group(PlanePositionSequence=[group(ImagePositionPatient=position(k))]) for k in order]
        if change is not None:
            change(image, shared, frames)
        image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = [shared], frames
        image.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
        return tmp_path / "enhanced.dcm"

    return write


@pytest.fixture(autouse=True)
def no_patient_is_named(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "SECRET" not in "".join(capfd.readouterr())
