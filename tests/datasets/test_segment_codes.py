"""The table ``segments`` of a plan: codes of class names, and what a person may write there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_supcon.datasets import fingerprint, read_dataset
from medseg_supcon.errors import ConfigError
from medseg_supcon.plan import make_plan, read_plan, segment_codes, validate_plan, write_plan

ANATOMY, TISSUE, ABNORMAL = (
    "SCT:91723000 Anatomical Structure",
    "SCT:85756007 Tissue",
    "SCT:49755003 Morphologically Abnormal Structure",
)
# by hand, from DICOM PS3.16, CIDs 7150 to 7194, and SNOMED CT's browser
KNOWN = {
    "hippocampus": (ANATOMY, "SCT:5366008"),
    "Liver": (ANATOMY, "SCT:10200004"),
    "left_atrium": (ANATOMY, "SCT:82471001"),
    "spleen": (ANATOMY, "SCT:78961009"),
    "Pancreas": (ANATOMY, "SCT:15776009"),
    "prostate": (ANATOMY, "SCT:41216001"),
    "urinary_bladder": (ANATOMY, "SCT:89837001"),
    "inferior_vena_cava": (ANATOMY, "SCT:64131007"),
    "vertebrae_L5": (ANATOMY, "SCT:49668003"),
    "fat": (TISSUE, "SCT:55603005"),
    "tumour": (ABNORMAL, "SCT:108369006"),
    "whole tumor": (ABNORMAL, "SCT:108369006"),
    "edema": (ABNORMAL, "SCT:79654002"),
    "lesion": (ABNORMAL, "SCT:52988006"),
    "Anterior": (ANATOMY, "SCT:85756007"),
    "normal": (ANATOMY, "SCT:85756007"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name: str) -> None:
    codes = segment_codes([name])[name]
    category, kind = KNOWN[name]
    assert codes["category"] == category and codes["type"].split(" ")[0] == kind
    assert set(codes) == {"category", "type"}


@pytest.mark.parametrize("name", ["kidney_left", "Left Kidney", "LeftKidney", "kidneys left"])
def test_sides(name: str) -> None:
    assert segment_codes([name])[name] == {
        "category": ANATOMY,
        "type": "SCT:64033007 Kidney",
        "laterality": "SCT:7771000 Left",
    }


def test_where_a_tumour_is() -> None:
    assert segment_codes(["liver tumour"])["liver tumour"]["region"] == "SCT:10200004 Liver"


@pytest.fixture
def plan(phantoms: Path) -> dict[str, Any]:
    dataset = read_dataset(phantoms)
    return make_plan(fingerprint(dataset), dataset)


def test_a_plan_has_every_foreground_class_and_stays_the_same(plan: dict[str, Any], tmp_path: Path) -> None:
    assert list(plan["segments"]) == list(plan["labels"])[1:]
    write_plan(plan, tmp_path / "one.json")
    write_plan(read_plan(tmp_path / "one.json"), tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    del plan["segments"]
    validate_plan(plan)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_any_name_gets_valid_codes(names: list[str]) -> None:
    codes = segment_codes(names)
    assert list(codes) == names
    for entry in codes.values():
        for code in entry.values():
            scheme, _, rest = code.partition(":")
            value, _, meaning = rest.partition(" ")
            assert 0 < len(scheme) <= 16 and 0 < len(value) <= 16 and 0 < len(meaning) <= 64


GOOD = {"category": ANATOMY, "type": "SCT:10200004 Liver"}
BROKEN: dict[str, Callable[[str], Any]] = {
    "a list": lambda name: [name],
    "an unknown class": lambda name: {"nothing": GOOD},
    "background": lambda name: {"background": GOOD},
    "no type": lambda name: {name: {"category": ANATOMY}},
    "another key": lambda name: {name: {**GOOD, "colour": "red"}},
    "no scheme": lambda name: {name: {**GOOD, "type": "10200004 Liver"}},
    "no meaning": lambda name: {name: {**GOOD, "type": "SCT:10200004"}},
    "two lines": lambda name: {name: {**GOOD, "type": "SCT:10200004 Li\nver"}},
    "a backslash": lambda name: {name: {**GOOD, "type": "SCT:10200004 Li\\ver"}},
    "too long": lambda name: {name: {**GOOD, "type": f"SCT:10200004 {'x' * 65}"}},
    "a number": lambda name: {name: {**GOOD, "type": 10200004}},
}


@pytest.mark.parametrize("change", BROKEN)
def test_what_a_table_cannot_hold(plan: dict[str, Any], change: str) -> None:
    with pytest.raises(ConfigError, match='"segments" must be a mapping of foreground classes'):
        validate_plan({**plan, "segments": BROKEN[change](list(plan["labels"])[1])})
