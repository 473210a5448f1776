"""What a data set is (cases, channels, labels), and which of its cases train, validate or count as unlabelled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg_supcon.errors import DataError, nearest

CT_WORDS = {"ct", "cta", "cect", "ncct", "ldct", "hrct"}
VALIDATION = 0.15  # share of the labelled cases
MOST_VALIDATION = 20
BY_NAME = ("nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")  # nnU-Net's channel names for a normalisation


@dataclass(frozen=True)
class Case:
    """One scan and, if somebody drew one, its label map."""

    name: str  # unique in the data set; the file name without extension and channel suffix
    images: tuple[Path, ...]  # one NIfTI file (3-D, or 4-D with the channels last), or one 3-D file per channel
    label: Path | None = None  # 3-D, on the grid of the scan
    patient: str | None = None  # a split never separates scans of one patient; None: a patient of its own


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
        """The data set with the named cases only, in its own order; `DataError` for unknown names, or for none."""
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


@dataclass(frozen=True)
class Split:
    """The cases of one training run."""

    training: tuple[Case, ...]  # labelled, in the seeded order
    validation: tuple[Case, ...]  # labelled, to choose the best weights on
    unlabelled: tuple[Case, ...] = ()  # all others, without their label maps
    warnings: tuple[str, ...] = ()  # for the person who trains, for instance that no case is held out


def split_cases(
    dataset: Dataset, *, labels: int | None = None, seed: int = 0, validation_fraction: float = VALIDATION
) -> Split:
    """Split a data set by patients, for a budget of `labels` labelled cases, validation included.

    The order of the labelled cases depends on the seed and their names only; a budget of N takes the first N. Whether
    a case trains or validates is decided along that order, so a smaller budget's training cases are among those of a
    larger one, and likewise for validation. About ``max(1, min(20, round(validation_fraction * N)))`` cases validate
    (more if a patient has many scans). If the data list names validation cases, only these validate; without a budget
    all of them do. With `validation_fraction` 0 all cases of the budget train, and the first 20 also validate.

    Raises:
        DataError: fewer labelled cases than `labels`, or a patient on both sides of the data list's own split.
        ValueError: `validation_fraction` outside [0, 1).

    Example:
        >>> from pathlib import Path
        >>> from medseg_supcon.datasets import Case, Dataset, split_cases
        >>> cases = tuple(Case(f"case{i}", (Path(f"{i}.nii"),), Path(f"l{i}.nii")) for i in range(10))
        >>> dataset = Dataset(Path("."), "toy", cases, ("MRI",), {"background": 0, "tumour": 1})
        >>> split = split_cases(dataset, labels=4)
        >>> len(split.training), len(split.validation), len(split.unlabelled)
        (3, 1, 6)
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    labelled = dataset.labelled
    total = len(labelled) if labels is None else labels
    if not labelled:
        raise DataError(f"{dataset.root}: no case has a label map. Training needs at least one.")
    if total < 1:
        raise DataError(f"{dataset.root}: a budget of {total} labelled cases is too small. Give at least 1.")
    if total > len(labelled):
        raise DataError(
            f"{dataset.root}: {total} labelled cases were asked for, but it has {len(labelled)}. "
            f"Ask for at most {len(labelled)}, or label more scans."
        )

    def draw(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{text}".encode()).digest()

    ordered = sorted(labelled, key=lambda case: (draw(_group(case)), _group(case), draw(f"case {case.name}")))
    training: list[Case] = ordered[:total]
    validation: list[Case] = []
    if validation_fraction > 0 and 0 < sum(case.name in dataset.validation for case in labelled) < len(labelled):
        training, validation = _along_own_split(dataset, ordered, total, validation_fraction, labels is None)
    elif validation_fraction > 0:
        training, validation = _along_order(ordered, total, validation_fraction)
    warnings = []
    if not validation or not training:
        training = training or validation
        validation = training if validation_fraction > 0 else training[:MOST_VALIDATION]
        why = "no other labelled patient can validate" if validation_fraction > 0 else "all of them train"
        names = ", ".join(case.name for case in training[:3])
        names += f" and {len(training) - 3} more" if len(training) > 3 else ""
        warnings.append(
            f"Validation uses the training cases themselves ({names}): {why}. Its scores say nothing about new scans."
        )
    used = {case.name for case in (*training, *validation)}
    rest = tuple(replace(case, label=None) for case in dataset.cases if case.name not in used)
    return Split(tuple(training), tuple(validation), rest, tuple(warnings))


def _group(case: Case) -> str:
    return f"case {case.name}" if case.patient is None else f"patient {case.patient}"


def _wanted(total: int, fraction: float) -> int:
    """How many of `total` cases validate. It grows by at most one as `total` does, hence the nesting."""
    return max(1, min(MOST_VALIDATION, round(fraction * total), total - 1))


def _along_order(ordered: list[Case], total: int, fraction: float) -> tuple[list[Case], list[Case]]:
    training: list[Case] = []
    validation: list[Case] = []
    sides: dict[str, list[Case]] = {}
    for count, case in enumerate(ordered[:total], 1):
        group = _group(case)
        if group not in sides:
            due = bool(training) and len(validation) < _wanted(count, fraction)
            sides[group] = validation if due else training
        sides[group].append(case)
    return training, validation


def patient_on_both_sides(dataset: Dataset) -> str | None:
    """A sentence on a patient whose labelled scans both train and validate in the data list; None if none does."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for case in dataset.labelled:
        sides[case.name in dataset.validation].add(_group(case))
    if not (both := sides[0] & sides[1]):
        return None
    return (
        f"{dataset.root}: patient {min(both).removeprefix('patient ')!r} has scans both in the training and in the "
        "validation part of the data list. Keep a patient's scans on one side."
    )


def _along_own_split(
    dataset: Dataset, ordered: list[Case], total: int, fraction: float, everything: bool
) -> tuple[list[Case], list[Case]]:
    to_train = [case for case in ordered if case.name not in dataset.validation]
    to_validate = [case for case in ordered if case.name in dataset.validation]
    if (mixed := patient_on_both_sides(dataset)) is not None:
        raise DataError(mixed)
    if everything:
        return to_train, to_validate
    number = 0 if total == 1 else min(_wanted(total, fraction), len(to_validate))
    number = max(number, total - len(to_train))
    return to_train[: total - number], to_validate[:number]
