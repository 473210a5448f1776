"""The template in the checkout is itself a bundle: the phantoms' plan, no cases, no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
from monai.bundle import ConfigWorkflow, verify_net_in_out

from medseg_supcon.bundle import write_metadata
from medseg_supcon.plan import validate_plan

TEMPLATE = Path(__file__).parents[2] / "bundles" / "segmentation"
CONFIGS = TEMPLATE / "configs"
VERSIONS = ("monai_version", "pytorch_version", "numpy_version", "required_packages_version")


def test_its_metadata_follows_its_plan(tmp_path: Path) -> None:
    validate_plan(json.loads((CONFIGS / "plan.json").read_text()))
    found = json.loads((CONFIGS / "metadata.json").read_text())
    requirements = Path(__file__).with_name("metadata_requirements.json").read_text()
    jsonschema.validate(found, json.loads(requirements))
    run = Path(shutil.copytree(TEMPLATE, tmp_path / "run"))
    (run / "configs" / "metadata.json").unlink()
    write_metadata(run)
    fresh = json.loads((run / "configs" / "metadata.json").read_text())
    assert found == fresh | {key: found[key] for key in VERSIONS}


def test_its_network_fits_its_metadata(elsewhere: Path) -> None:
    verify_net_in_out(
        "network_def",
        str(CONFIGS / "metadata.json"),
        str(CONFIGS / "inference.yaml"),
        device="cpu",
        bundle_root=str(TEMPLATE),
    )


def test_tools_can_open_it_without_data(elsewhere: Path) -> None:
    workflow = ConfigWorkflow(
        str(CONFIGS / "inference.yaml"), workflow_type="infer", logging_file=False, bundle_root=str(TEMPLATE)
    )
    workflow.initialize()
    assert workflow.check_properties() == []
