"""What a data set is: cases, channels and labels, whatever layout it came in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg_supcon.errors import DataError, nearest

CT_WORDS = {"ct", "cta", "cect", "ncct", "ldct", "hrct"}
BY_NAME = ("nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")  # nnU-Net's channel names for a normalisation


@dataclass(frozen=True)
class Case:
    """One scan and, if somebody drew one, its label map.

    Attributes:
        name: unique in the data set; the file name without extension and channel suffix.
        images: one NIfTI file (3-D, or 4-D with the channels last), or one 3-D file per channel.
        label: 3-D label map on the grid of the scan; None for an unlabelled scan.
        patient: the same for all scans of a patient, which a split never separates; None: a patient of its own.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Dataset:
    """The cases of a data set and what their files mean.

    Attributes:
        root: folder that relative paths of the data set start from.
        name: the data set's name, for reports and the model card.
        cases: in the order of the data list (or by name if there is no list).
        channels: channel names in file order, e.g. ``("T1", "FLAIR")``.
        labels: class name -> value in the label files, in class order, background first.
        ignore_label: value in the label files that means "not annotated", or None.
        validation: names of the cases that validate and do not train, if that is known.
        warnings: sentences on what its files say and reading did not use.

    Example:
        >>> from pathlib import Path
        >>> from medseg_supcon.datasets import Case, Dataset
        >>> cases = (Case("a", (Path("a.nii.gz"),), Path("a_label.nii.gz")), Case("b", (Path("b.nii.gz"),)))
        >>> dataset = Dataset(Path("."), "toy", cases, ("MRI",), {"background": 0, "tumour": 1})
        >>> [case.name for case in dataset.labelled]
        ['a']
    """

    root: Path
    name: str
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    labels: dict[str, int | float] = field(hash=False)
    ignore_label: int | float | None = None
    validation: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label map."""
        return tuple(case for case in self.cases if case.label is not None)

    def select(self, names: Iterable[str]) -> Dataset:
        """The same data set with the named cases only, in the data set's own order.

        Raises:
            DataError: a name is not a case of the data set, or no name was given.
        """
        chosen = dict.fromkeys(names)
        known = {case.name for case in self.cases}
        unknown = [name for name in chosen if name not in known]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise DataError(
                f"{self.root}: no case is called {unknown[0]!r}{more}. Names of cases are file names without "
                f"extension, such as {nearest(unknown[0], known) or min(known)!r}."
            )
        if not chosen:
            raise DataError(f"{self.root}: the list of cases to use is empty. Name at least one case.")
        cases = tuple(case for case in self.cases if case.name in chosen)
        return replace(self, cases=cases, validation=self.validation & set(chosen))


def normalisation(channel: str) -> str:
    """How a channel of this name is normalised: "ct", or one of nnU-Net's "nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1".

    Example:
        >>> from medseg_supcon.datasets import normalisation
        >>> [normalisation(name) for name in ("CT", "CT arterial", "T1", "PET/CT", "noNorm")]
        ['ct', 'ct', 'zscore', 'zscore', 'nonorm']
    """
    name = channel.strip().lower()
    words = set(re.split(r"[^a-z]+", name))
    if (words & CT_WORDS or "computed tomography" in name) and not words & {"pet", "mr", "mri"}:
        return "ct"
    return next((known for known in BY_NAME if _letters(known) == _letters(name)), "zscore")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_case_names(file: str | Path) -> list[str]:
    """Case names from a text file, one per line. Blank lines and comments (``#`` at the start or after a blank) are left out.

    Raises:
        DataError: the file is missing, not text, or names no case.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as text in UTF-8 ({error}). Give a file with one case name per line."
        ) from None
    names = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in text.splitlines()]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise DataError(f"{path}: names no case. Write one case name per line.")
    return names
