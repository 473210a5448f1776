"""Bias fields are for MR only: which patches get one in the default views."""

from __future__ import annotations

import pytest
import yaml
from monai.bundle import ConfigParser

from medseg_supcon.bundle import read_recipe, shared_folder
from medseg_supcon.views import leaves

TEMPLATE = yaml.safe_load((shared_folder("bundles") / "segmentation" / "configs" / "train.yaml").read_text())


@pytest.mark.parametrize("channels", [["MRI"], ["T1", "T2"], ["scan"]])
def test_views_of_mr_have_bias_fields(channels: list[str]) -> None:
    assert share(channels, "view_1") == share(channels, "view_2") == 0.3


@pytest.mark.parametrize("channels", [["CT"], ["ct"], ["PET", " CT "]])
def test_views_of_ct_have_none(channels: list[str]) -> None:
    assert share(channels, "view_1") == share(channels, "view_2") == 0


def test_the_teachers_view_has_none() -> None:
    overlay = read_recipe("semi")
    assert share(["MRI"], "view_1", overlay) == 0
    assert share(["MRI"], "view_2", overlay) == 0.3


def share(channels: list[str], view: str, overlay: dict[str, object] | None = None) -> float:
    plan = {"channels": channels, "patch_size": [8, 8, 8], "flip_axes": [0], "spacing": [1, 1, 1]}
    parser = ConfigParser(
        {
            "plan": plan,
            **{key: TEMPLATE[key] for key in ("imports", "bias_field", "scanner_shifts", "view_1", "view_2")},
        },
    )
    for key, value in (overlay or {}).items():
        if key.startswith("view_"):
            parser.set(value, key)
    found = [t for t in leaves(parser.get_parsed_content(view)) if type(t).__name__ == "BiasFieldd"]
    return found[0].prob if found else 0.0
