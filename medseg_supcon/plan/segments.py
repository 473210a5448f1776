"""Coded meanings of class names, for DICOM segmentation objects: the table ``segments`` of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

# Context groups of DICOM PS3.16 (types of segmented properties) with their category, of CID 7150; the first match counts.
GROUPS = (
    ("cid7192", "SCT:91723000 Anatomical Structure"),
    ("cid7191", "SCT:85756007 Tissue"),
    ("cid7194", "SCT:49755003 Morphologically Abnormal Structure"),
    ("cid7197", "SCT:91720002 Body Substance"),
    ("cid7193", "SCT:260787004 Physical object"),
)
ABNORMAL = GROUPS[2][1]
UNKNOWN = {"category": "SCT:91723000 Anatomical Structure", "type": "SCT:85756007 Tissue"}
SIDES = {"left": "SCT:7771000 Left", "right": "SCT:24028007 Right"}  # CID 244
SPELT = {  # as the groups spell them
    "oedema": "edema", "haemorrhage": "hemorrhage", "oesophagus": "esophagus", "grey": "gray",
    "tumor": "neoplasm", "tumour": "neoplasm", "tumors": "neoplasm", "tumours": "neoplasm", "cancer": "neoplasm",
    "vertebrae": "vertebra", "kidneys": "kidney", "lungs": "lung", "lesions": "lesion", "hippocampi": "hippocampus",
}  # fmt: skip
FILLERS = {"of", "the", "and", "structure", "urinary"}
NO_STRUCTURES = ("Background", "Normal")  # though they are in the groups
CODE = re.compile(r"([\w-]{1,16}):(\S{1,16}) ([^\\\n]{1,64})")


def segment_codes(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Category and type of each class, ``"SCHEME:CODE MEANING"``, by its name; a generic code if the name is not known.

    The codes (most are SNOMED CT) are those of DICOM's context groups of segmented property types, as pydicom has them.
    A class that names a side and is not a concept of its own (``kidney_left``) has a ``laterality``, and an abnormal
    structure (``liver tumour``) the ``region`` that its other words name.

    Example:
        >>> segment_codes(["left atrium", "core"])["left atrium"]["type"]
        'SCT:82471001 Left atrium'
        >>> segment_codes(["RightKidney"])["RightKidney"]["laterality"]
        'SCT:24028007 Right'
    """
    return {name: _codes_of(_words(name)) for name in names}


def code_parts(code: str) -> tuple[str, str, str]:
    """Value, scheme and meaning of a valid code, in the order of pydicom's ``Code``.

    >>> code_parts("SCT:10200004 Liver")
    ('10200004', 'SCT', 'Liver')
    """
    scheme, _, rest = code.partition(":")
    value, _, meaning = rest.partition(" ")
    return value, scheme, meaning


def are_segments(value: object) -> bool:
    """Whether a plan's ``segments`` holds valid codes, whatever its classes."""
    return isinstance(value, Mapping) and all(map(_is_entry, value.values()))


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not {"category", "type"} <= set(entry) <= {*UNKNOWN, "laterality", "region"}:
        return False
    return all(isinstance(code, str) and CODE.fullmatch(code) and code.isprintable() for code in entry.values())


def _codes_of(words: frozenset[str]) -> dict[str, str]:
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
def _concepts() -> Mapping[frozenset[str], dict[str, str]]:
    """Words -> category and type, of every concept under its keyword and its meaning."""
    from pydicom.sr.codedict import codes

    table: dict[frozenset[str], dict[str, str]] = {}
    for group, category in GROUPS:
        for keyword, code in getattr(codes, group).concepts.items():
            if keyword in NO_STRUCTURES:
                continue
            entry = {"category": category, "type": f"{code.scheme_designator}:{code.value} {code.meaning}"}
            for text in (keyword, code.meaning):
                table.setdefault(_words(text), entry)
    return table
