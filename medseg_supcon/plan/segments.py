"""Coded meanings of class names, for DICOM segmentation objects: the table ``segments`` of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

# Context groups of DICOM PS3.16 (types of segmented properties) with their category, of CID 7150; the first match counts.
GROUPS = (
    ("cid7192", ["91723000", "SCT", "Anatomical Structure"]),
    ("cid7191", ["85756007", "SCT", "Tissue"]),
    ("cid7194", ["49755003", "SCT", "Morphologically Abnormal Structure"]),
    ("cid7197", ["91720002", "SCT", "Body Substance"]),
    ("cid7193", ["260787004", "SCT", "Physical object"]),
)
ABNORMAL = GROUPS[2][1]
UNKNOWN = {"category": ["91723000", "SCT", "Anatomical Structure"], "type": ["85756007", "SCT", "Tissue"]}
SIDES = {"left": ["7771000", "SCT", "Left"], "right": ["24028007", "SCT", "Right"]}  # CID 244
SPELT = {  # as the groups spell them
    "oedema": "edema", "haemorrhage": "hemorrhage", "oesophagus": "esophagus", "grey": "gray",
    "tumor": "neoplasm", "tumour": "neoplasm", "tumors": "neoplasm", "tumours": "neoplasm", "cancer": "neoplasm",
    "vertebrae": "vertebra", "kidneys": "kidney", "lungs": "lung", "lesions": "lesion", "hippocampi": "hippocampus",
}  # fmt: skip
FILLERS = {"of", "the", "and", "structure", "urinary"}
NO_STRUCTURES = ("Background", "Normal")  # though they are in the groups
CODE_LENGTHS = (16, 16, 64)  # of a value, a scheme and a meaning


def segment_codes(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Category and type of each class, ``[code, scheme, meaning]``, by its name; a generic code if the name is not known.

    The codes (most are SNOMED CT) are those of DICOM's context groups of segmented property types, as pydicom has them.
    A class that names a side and is not a concept of its own (``kidney_left``) has a ``laterality``, and an abnormal
    structure (``liver tumour``) the ``region`` that its other words name.

    Example:
        >>> segment_codes(["left atrium", "core"])["left atrium"]["type"]
        ['82471001', 'SCT', 'Left atrium']
        >>> segment_codes(["RightKidney"])["RightKidney"]["laterality"]
        ['24028007', 'SCT', 'Right']
    """
    return {name: _codes_of(_words(name)) for name in names}


def are_segments(value: object, names: Iterable[str]) -> bool:
    """Whether a plan's ``segments`` is valid for the foreground classes `names`; it may leave classes out."""
    known = set(names)
    return isinstance(value, Mapping) and all(name in known and _is_entry(entry) for name, entry in value.items())


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not {"category", "type"} <= set(entry) <= {*UNKNOWN, "laterality", "region"}:
        return False
    return all(isinstance(code, list | tuple) and len(code) == 3 and _fits(code) for code in entry.values())


def _fits(code: Iterable[object]) -> bool:
    texts = zip(code, CODE_LENGTHS, strict=True)
    return all(isinstance(text, str) and 0 < len(text) <= most and text.isprintable() for text, most in texts)


def _codes_of(words: frozenset[str]) -> dict[str, list[str]]:
    concepts = _concepts()
    sides = words & set(SIDES)
    if found := concepts.get(words):
        return {**found}
    laterality = {"laterality": SIDES[min(sides)]} if len(sides) == 1 else {}
    rest = words - sides
    if found := concepts.get(rest):
        return {**found, **laterality}
    for word in sorted(rest):
        found = concepts.get(frozenset([word]), UNKNOWN)
        if found["category"] == ABNORMAL:
            region = concepts.get(rest - {word}, {})
            place = {"region": region["type"]} if region.get("category") == UNKNOWN["category"] else {}
            return {**found, **laterality, **place}
    return {**UNKNOWN, **laterality}


def _words(name: str) -> frozenset[str]:
    """The words of a name, spelt as the context groups spell them."""
    parts = re.findall(r"[A-Z]+\d+|[A-Z]?[a-z]+\d*|[A-Z]+|\d+", name)
    return frozenset(SPELT.get(part.lower(), part.lower()) for part in parts) - FILLERS


@cache
def _concepts() -> Mapping[frozenset[str], dict[str, list[str]]]:
    """Words -> category and type, of every concept under its keyword and its meaning."""
    from pydicom.sr.codedict import codes

    table: dict[frozenset[str], dict[str, Any]] = {}
    for group, category in GROUPS:
        for keyword, code in getattr(codes, group).concepts.items():
            if keyword in NO_STRUCTURES:
                continue
            entry = {"category": category, "type": [code.value, code.scheme_designator, code.meaning]}
            for text in (keyword, code.meaning):
                table.setdefault(_words(text), entry)
    return table
