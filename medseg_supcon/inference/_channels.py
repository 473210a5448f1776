"""Which files are channels of one scan."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from medseg_supcon.inference._itk import read_information
from medseg_supcon.inference._nifti import dimensions

if TYPE_CHECKING:
    from medseg_supcon.inference._scans import Scan


def group_channels(scans: list[Scan], count: int) -> list[Scan]:
    """Files ``case_0000``, ``case_0001``, ... of a folder as one scan ``case``; what does not fit stands in its problem."""
    groups: dict[tuple[str, str], list[tuple[int, Scan]]] = {}
    out: list[Scan | tuple[str, str]] = []
    for scan in scans:
        match = re.fullmatch(r"(.+)_(\d{4})", scan.name)
        if match is None or scan.problem is not None or not _is_single(scan):
            out.append(scan)
            continue
        key = (os.path.realpath(scan.files[0].parent), match[1])
        if key not in groups:
            out.append(key)
        groups.setdefault(key, []).append((int(match[2]), scan))
    return [_one(item[1], groups[item], count) if isinstance(item, tuple) else item for item in out]


def _one(name: str, numbered: list[tuple[int, Scan]], count: int) -> Scan:
    numbered.sort(key=lambda part: part[0])
    numbers, parts = [number for number, _ in numbered], [scan for _, scan in numbered]
    whole = parts[0].source.parent / name
    problem = None
    if twice := [n for n in numbers if numbers.count(n) > 1]:
        rivals = ", ".join(scan.source.name for n, scan in numbered if n == twice[0])
        problem = f"{whole}: there are two files for channel {twice[0]:04d} ({rivals}). Keep one."
    elif len({scan.kind for scan in parts}) > 1:
        names = ", ".join(scan.source.name for scan in parts)
        problem = f"{whole}: channels must be of one format, found {names}. Convert them to NIfTI."
    elif numbers != list(range(count)):
        have = ", ".join(f"{number:04d}" for number in numbers)
        problem = (
            f"{whole}: the model takes {count} channels, {name}_0000 to {name}_{count - 1:04d}, "
            f"and there are {have}. Add what is missing or give one 4-D file."
        )
    return replace(parts[0], name=name, files=tuple(scan.files[0] for scan in parts), problem=problem)


def _is_single(scan: Scan) -> bool:
    """Whether a file holds one channel; also where it cannot be read (reading it will say why)."""
    if scan.kind == "nifti":
        return all(n == 1 for n in dimensions(scan.files[0])[3:])
    if scan.kind == "dicom":
        return False
    try:
        return int(read_information(scan.files[0]).GetNumberOfComponents()) == 1
    except RuntimeError:
        return True
