"""Which cases train, which validate, and which count as unlabelled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from medseg_supcon.datasets.dataset import Case, Dataset
from medseg_supcon.errors import DataError

VALIDATION = 0.15  # share of the labelled cases
MOST_VALIDATION = 20


@dataclass(frozen=True)
class Split:
    """The cases of one training run.

    Attributes:
        training: labelled cases to learn from, in the seeded order.
        validation: labelled cases to choose the best weights on.
        unlabelled: all other cases, without their label maps.
        warnings: sentences for the person who trains, for instance that no case is held out for validation.
    """

    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    unlabelled: tuple[Case, ...] = ()
    warnings: tuple[str, ...] = ()


def split_cases(
    dataset: Dataset, *, labels: int | None = None, seed: int = 0, validation_fraction: float = VALIDATION
) -> Split:
    """Split a data set by patients, for a budget of `labels` labelled cases, validation included.

    The labelled cases get an order that depends on the seed and their names only; a budget of N takes the first N.
    Whether a case trains or validates is decided along that order, so the training cases of a smaller budget are
    among those of a larger one, and likewise for validation. About ``max(1, min(20, round(validation_fraction *
    N)))`` cases validate (more if one patient has many scans). If the data list names validation cases, only these
    validate; without a budget all of them do. With `validation_fraction` 0 all labelled cases of the budget train,
    and the first 20 of them also validate.

    Args:
        dataset: the cases; those without a label map are unlabelled.
        labels: the budget N, or None for all labelled cases.
        seed: of the order.
        validation_fraction: share of the labelled cases to validate on, in [0, 1).

    Raises:
        DataError: fewer labelled cases than `labels`, or a patient on both sides of the data list's own
            split.
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
    ordered = _ordered(labelled, seed)
    held_out = sum(case.name in dataset.validation for case in labelled)
    training = ordered[:total]
    validation: list[Case] = []
    if validation_fraction > 0 and 0 < held_out < len(labelled):
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


def _ordered(cases: Iterable[Case], seed: int) -> list[Case]:
    """Patients in an order of their own, each patient's cases together."""

    def draw(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{text}".encode()).digest()

    return sorted(cases, key=lambda case: (draw(g := _group(case)), g, draw(f"case {case.name}")))


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
    both = sides[0] & sides[1]
    if not both:
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
    mixed = patient_on_both_sides(dataset)
    if mixed is not None:
        raise DataError(mixed)
    if everything:
        return to_train, to_validate
    number = 0 if total == 1 else min(_wanted(total, fraction), len(to_validate))
    number = max(number, total - len(to_train))
    return to_train[: total - number], to_validate[:number]
