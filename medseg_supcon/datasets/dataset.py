"""What a data set is: cases, channels and labels, whatever layout it came in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg_supcon.errors import DataError


@dataclass(frozen=True)
class Case:
    """One scan and, where somebody drew one, its label map.

    Attributes:
        name: unique in the data set; the file name without extension and channel suffix.
        images: one NIfTI file (3-D, or 4-D with the channels last), or one 3-D file per channel.
        label: 3-D label map on the grid of the scan; None for an unlabelled scan.
        patient: scans of one patient share it and are never parted by a split; None: a patient of its own.
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
        cases: in the order of the data list (or by name where there is no list).
        channels: channel names in file order, e.g. ``("T1", "FLAIR")``.
        labels: class name -> value in the label files, in class order, background first.
        ignore_label: value in the label files that means "not annotated", or None.
        validation: names of the cases that the data list itself puts aside for validation.

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

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label map."""
        return tuple(case for case in self.cases if case.label is not None)

    def select(self, names: Iterable[str]) -> Dataset:
        """The same data set with the named cases only, in the data set's own order.

        Raises:
            DataError: a name is not a case of the data set (near matches are listed), or no name was given.
        """
        wanted = list(dict.fromkeys(names))
        known = [case.name for case in self.cases]
        unknown = [name for name in wanted if name not in set(known)]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3) or known[:3]
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise DataError(
                f"{self.root}: no case is called {unknown[0]!r}{more}. "
                f"Names of cases are file names without extension, such as {', '.join(map(repr, near))}."
            )
        if not wanted:
            raise DataError(f"{self.root}: the list of cases to use is empty. Name at least one case.")
        chosen = set(wanted)
        cases = tuple(case for case in self.cases if case.name in chosen)
        return replace(self, cases=cases, validation=self.validation & chosen)


def read_case_names(file: str | Path) -> list[str]:
    """Case names from a text file: one a line, blank lines and comments (``#`` at a line's start or after a blank) left out.

    Raises:
        DataError: the file is missing, not text, or names no case.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file. Give a text file with one case name a line."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Give one case name a line.") from None
    names = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in text.splitlines()]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise DataError(f"{path}: names no case. Write one case name a line.")
    return names
