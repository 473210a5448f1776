"""What MONAI Label 0.8 does with a bundle: each config alone, its overrides, displayable_configs, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigItem, ConfigParser, ConfigWorkflow
from monai.transforms import LoadImaged, SaveImaged

from medseg_supcon.inference import Predictor

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")


class LabelApp:
    """What MONAI Label does with inference.json: one config alone, its device and root set from outside."""

    def __init__(self, run: Path) -> None:
        self.parser = ConfigParser()
        self.parser.read_config(str(run / "configs" / "inference.json"))
        self.parser.config.update({"bundle_root": str(run)})
        self.network = self.parser.get_parsed_content("network_def", instantiate=True)
        metadata = json.loads((run / "configs" / "metadata.json").read_text())["network_data_format"]
        (_, image), (_, pred) = (
            next(iter(metadata["inputs"].items())),
            next(iter(metadata["outputs"].items())),
        )
        self.dimension = len(image["spatial_shape"])
        self.labels = {name.lower(): int(i) for i, name in pred["channel_def"].items() if name != "background"}

        self.shown = self.parser.get_parsed_content("displayable_configs", instantiate=True)

    def change(self, **options: Any) -> None:
        """What the user sets in the viewer; every request carries every option."""
        self.parser["displayable_configs"].update({**self.shown, **options})
        self.parser.parse()

    def device(self, device: str) -> None:
        self.parser.config.update({"device": device})
        if self.parser.ref_resolver.items.get("device"):
            self.parser.ref_resolver.items["device"] = ConfigItem(config=device, id="device")

    def transforms(self, key: str) -> list[Any]:
        self.device("cpu")
        content = self.parser.get_parsed_content(key, instantiate=True)
        return [t for t in content.transforms if not isinstance(t, SaveImaged)]


def test_monai_label_reads_it(trained_run: Path, phantoms: Path, elsewhere: Path) -> None:
    app = LabelApp(trained_run)
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    assert app.dimension == 3
    assert app.labels == {name.lower(): i for i, name in enumerate(plan["labels"]) if name != "background"}
    assert app.shown == {"overlap": 0.5, "sw_batch_size": 4, "result_extension": ".nii.gz"}
    app.change(overlap=0.25)
    assert app.parser.get_parsed_content("inferer", instantiate=True).overlap == 0.25
    app.change()
    scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    data: Any = {"image": str(scan), "image_path": str(scan), **app.shown}  # a request is part of the data
    before = app.transforms("preprocessing")
    assert isinstance(before[0], LoadImaged)
    before[0]._loader.image_only = False
    for transform in before:
        data = transform(data)
    # Any file of models/ can be chosen; weights are the file's content, or what it has under "model".
    for file in (trained_run / "models").glob("*.pt"):
        weights = torch.load(file, weights_only=True)
        app.network.load_state_dict(weights.get("model", weights))
    app.network.load_state_dict(torch.load(trained_run / "models" / "model.pt", weights_only=True))
    inferer = app.parser.get_parsed_content("inferer", instantiate=True)
    with torch.inference_mode():
        data["pred"] = inferer(data["image"][None], app.network.eval())[0]
    for transform in app.transforms("postprocessing"):
        data = transform(data)
    expected = Predictor(trained_run, device="cpu").predict(scan).mask
    np.testing.assert_array_equal(np.asarray(data["pred"])[0], expected)


def test_monai_label_trains_it(run_copy: Path, phantoms: Path, elsewhere: Path) -> None:
    """As its train task does: lists, epochs and device from outside, a checkpoint loader in front."""
    items = [
        {"image": str(scan), "label": str(phantoms / "labelsTr" / scan.name)}
        for scan in sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:3]
    ]
    parser = ConfigParser()
    parser.read_config(str(run_copy / "configs" / "train.json"))
    handlers = parser.get("train#handlers", [])
    assert not [h for h in handlers if h.get("_target_") == "CheckpointLoader"]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(run_copy / "models" / "model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    workflow = ConfigWorkflow(
        config_file=str(run_copy / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        quiet=True,
        **{
            "bundle_root": str(run_copy),
            "overwrite": True,  # a person sets it in the config, as docs/slicer.md says
            "train#trainer#max_epochs": 1,
            "train#dataset#data": items[:2],
            "validate#dataset#data": items[2:],
            "device": "cpu",
            "train#handlers": [loader, *handlers],
            "displayable_configs": {**parser.get_parsed_content("displayable_configs"), "learning_rate": 0.5},
        },
    )
    workflow.initialize()
    workflow.run()
    assert workflow.trainer.state.iteration == 3
    assert len(workflow.train_dataset) == 2
    assert workflow.parser.get_parsed_content("lr_scheduler").base_lrs == [0.5]


def test_a_longer_training_has_a_longer_schedule(run_copy: Path) -> None:
    """MONAI Label sets the trainer's epochs and nothing else; a federated client has fewer than the plan."""
    decay = []
    for epochs in (40, 1):
        parser = ConfigParser()
        parser.read_config(str(run_copy / "configs" / "train.json"))
        parser.update({"bundle_root": str(run_copy), "train#trainer#max_epochs": epochs})
        schedule = parser.get_parsed_content("lr_scheduler")
        assert schedule.t_total == 3 * max(epochs, 2)
        decay.append(schedule.lr_lambda(5))
    assert decay[1] < decay[0]
