"""Our own list of what MONAI's model zoo checks before it accepts a bundle, on a run, from another directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, verify_net_in_out
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

REQUIREMENTS = Path(__file__).with_name("metadata_requirements.json")
LARGEST = 100 * 2**20  # bytes; a larger file would have to be downloaded by way of large_files.yml

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


@pytest.fixture(scope="module")
def bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a folder of the zoo's ``models``."""
    models = tmp_path_factory.mktemp("zoo") / "models"
    return Path(shutil.copytree(trained_run, models / "phantom_segmentation"))


@pytest.fixture
def metadata(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "configs" / "metadata.json").read_text())
    return found


def test_files_are_there_and_of_a_size_to_keep_in_git(bundle: Path) -> None:
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "models/model.pt",
        "configs/inference.json",
        "docs/README.md",
    ):
        assert (bundle / name).is_file(), name
    sizes = {str(p.relative_to(bundle)): p.stat().st_size for p in bundle.rglob("*") if p.is_file()}
    assert all(0 < size < LARGEST for size in sizes.values()), sizes
    assert not list(bundle.rglob("*.part")) and not list(bundle.rglob("__pycache__"))


def test_the_version_is_in_the_changelog(metadata: dict[str, Any]) -> None:
    parts = metadata["version"].split(".")
    assert len(parts) == 3 and all(part.isdigit() for part in parts)
    assert metadata["changelog"][metadata["version"]]


def test_metadata(metadata: dict[str, Any]) -> None:
    jsonschema.validate(metadata, json.loads(REQUIREMENTS.read_text()))
    # a pull request installs these, so each must name a version
    assert all(version[:1].isdigit() for version in metadata["required_packages_version"].values())


@pytest.mark.parametrize(
    ("config", "kind", "wanted"),
    [("inference", "inference", InferProperties), ("train", "train", TrainProperties)],
)
def test_properties(bundle: Path, elsewhere: Path, config: str, kind: str, wanted: dict[str, Any]) -> None:
    workflow = create_workflow(
        config_file=str(bundle / "configs" / f"{config}.json"),
        workflow_type=kind,
        bundle_root=str(bundle),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
    )
    workflow.properties = {**MetaProperties, **wanted}
    assert workflow.check_properties() == []


def test_the_network_takes_and_gives_what_metadata_says(bundle: Path, elsewhere: Path) -> None:
    verify_net_in_out(
        "network_def",
        str(bundle / "configs" / "metadata.json"),
        str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
        device="cpu",
    )


def test_the_weights_are_the_networks_and_become_torchscript(bundle: Path, elsewhere: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network_def")
    weights = torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(weights, strict=True)
    ckpt_export(
        "network_def",
        str(elsewhere / "model.ts"),
        str(bundle / "models" / "model.pt"),
        str(bundle / "configs" / "metadata.json"),
        str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
    )
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exported = torch.jit.load(str(elsewhere / "model.ts"), map_location="cpu")(image)
        torch.testing.assert_close(exported, network.eval()(image), rtol=0, atol=1e-4)


def test_no_config_names_a_place_of_its_own(bundle: Path, trained_run: Path) -> None:
    """Only the data folder is a path; ``dataset_dir`` says where it was, and can be set again."""
    for name in ("inference", "train", "evaluate", "multi_gpu_train", "multi_gpu_evaluate", "metadata"):
        config = json.loads((bundle / "configs" / f"{name}.json").read_text())
        config.pop("dataset_dir", None)
        text = json.dumps(config)
        for place in ("/workspace", "/home", str(trained_run.parent), str(bundle.parent)):
            assert place not in text, (name, place)
