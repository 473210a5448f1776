"""Bias fields and scanner shifts of the default views follow from the channels, and the config hands them on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

from medseg_supcon.bundle import read_recipe, shared_folder
from medseg_supcon.views import leaves

TEMPLATE = yaml.safe_load((shared_folder("bundles") / "segmentation" / "configs" / "train.yaml").read_text())
SOME = {"inversion": 0.1, "ghosting": 0.05}


@pytest.mark.parametrize("channels", [["MRI"], ["T1", "T2"], ["scan"]])
def test_views_of_mr_have_bias_fields(channels: list[str]) -> None:
    assert bias_share(channels, "view_1") == bias_share(channels, "view_2") == 0.3


@pytest.mark.parametrize("channels", [["CT"], ["ct"], ["PET", " CT "]])
def test_views_of_ct_have_none(channels: list[str]) -> None:
    assert bias_share(channels, "view_1") == bias_share(channels, "view_2") == 0


def test_the_teachers_view_has_none() -> None:
    overlay = {**read_recipe("semi"), "scanner_shifts": SOME}
    assert bias_share(["MRI"], "view_1", overlay) == 0
    assert bias_share(["MRI"], "view_2", overlay) == 0.3
    assert shift_shares(["MRI"], "view_1", overlay) == {}
    assert shift_shares(["MRI"], "view_2", overlay) == pytest.approx(SOME)


@pytest.mark.parametrize("view", ["view_1", "view_2"])
def test_scanner_shifts_are_set_by_one_key(view: str) -> None:
    assert shift_shares(["MRI"], view, {"scanner_shifts": {}}) == {}
    assert shift_shares(["MRI"], view, {"scanner_shifts": SOME}) == pytest.approx(SOME)


def test_the_usual_scanner_shifts_follow_from_the_channels() -> None:
    assert shift_shares(["CT"], "view_1", {}) == {}
    assert {"inversion", "remap"} < set(shift_shares(["T1", "T2"], "view_2", {}))


def bias_share(channels: list[str], view: str, overlay: dict[str, Any] | None = None) -> float:
    found = [t for t in policy(channels, view, overlay or {}) if type(t).__name__ == "BiasFieldd"]
    return found[0].prob if found else 0.0


def shift_shares(channels: list[str], view: str, overlay: dict[str, Any]) -> dict[str, float]:
    found = [t for t in policy(channels, view, overlay) if type(t).__name__ == "ScannerShiftd"]
    return dict(found[0].shares) if found else {}


def policy(channels: list[str], view: str, overlay: dict[str, Any]) -> list[Any]:
    """The transforms of a view in train.yaml, under the parts of an overlay that concern views."""
    plan = {"channels": channels, "patch_size": [8, 8, 8], "flip_axes": [0], "spacing": [1, 1, 1]}
    keys = ("imports", "bias_field", "scanner_shifts", "view_1", "view_2")
    parser = ConfigParser(copy.deepcopy({"plan": plan, **{key: TEMPLATE[key] for key in keys}}))  # it is set in place
    for key, value in overlay.items():
        if key.startswith(("view_", "scanner_shifts")):
            parser.set(value, key)
    return list(leaves(parser.get_parsed_content(view)))
