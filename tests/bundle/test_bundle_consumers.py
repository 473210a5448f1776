"""Programs that take bundles: monai.bundle.load, a federated client, MONAI Label, the bundle commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigItem, ConfigParser, ConfigWorkflow, load
from monai.networks.utils import get_state_dict
from monai.transforms import LoadImaged, SaveImaged

from medseg_supcon.inference import Predictor
from medseg_supcon.networks import build_network
from medseg_supcon.training._faults import innermost

# MONAI warns that a config is code, whoever wrote it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def bundle_run(run: Path, config: str, cwd: Path, *more: str) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(run)]
    command += ["--config_file", str(run / "configs" / config), "--device", "$torch.device('cpu')", *more]
    # As many threads as these tests have: sums in another order would move the weights.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_preprocessing(trained_run: Path, phantoms: Path) -> None:
    """Train, validate, evaluate and inference see the very same tensor of a scan."""
    root, scan = str(trained_run), sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0]
    label = phantoms / "labelsTr" / scan.name
    tensors = {}
    for name, key in (
        ("inference", "preprocessing"),
        ("evaluate", "preprocessing"),
        ("train", "train::preprocessing"),
        ("train", "validate::preprocessing"),
    ):
        parser = ConfigParser()
        parser.read_config(str(trained_run / "configs" / f"{name}.yaml"))
        parser["bundle_root"] = root
        transform = parser.get_parsed_content(key)
        case = {"image": str(scan)} | ({} if name == "inference" else {"label": str(label)})
        tensors[name, key] = transform(case)["image"]
    first = tensors["inference", "preprocessing"]
    for tensor in tensors.values():
        assert tensor.dtype == first.dtype
        torch.testing.assert_close(tensor.as_tensor(), first.as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(tensor.affine, first.affine, rtol=0, atol=0)


def test_inference_command_gives_the_masks_of_medseg(
    trained_run: Path, phantoms: Path, elsewhere: Path
) -> None:
    scans = phantoms / "imagesTs"
    bundle_run(trained_run, "inference.yaml", elsewhere, "--dataset_dir", str(scans), "--output_dir", "masks")
    names = sorted(path.name for path in scans.glob("*.nii.gz"))
    assert sorted(path.name for path in (elsewhere / "masks").glob("*.nii.gz")) == names
    predictor = Predictor(trained_run, device="cpu")
    for name in names:
        mask, scan = nib.load(elsewhere / "masks" / name), nib.load(scans / name)
        assert mask.shape == scan.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), predictor.predict(scans / name).mask)


def test_evaluate_command_gives_the_runs_metrics(trained_run: Path, elsewhere: Path) -> None:
    bundle_run(trained_run, "evaluate.json", elsewhere, "--output_dir", str(elsewhere / "eval"))
    ours = json.loads((trained_run / "eval" / "metrics.json").read_text())
    theirs = json.loads((elsewhere / "eval" / "metrics.json").read_text())
    assert theirs["summary"] == ours["summary"]
    assert theirs["rows"]


def test_train_command_gives_the_runs_weights(run_copy: Path, trained_run: Path, elsewhere: Path) -> None:
    for file in (run_copy / "models").iterdir():
        file.unlink()
    bundle_run(run_copy, "train.json", elsewhere)
    ours = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    theirs = torch.load(run_copy / "models" / "model.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [{}, {"workflow_type": "inference"}], ids=["train", "inference"])
def test_bundle_load_from_elsewhere(trained_run: Path, elsewhere: Path, kind: dict[str, str]) -> None:
    """As a bundle of the zoo: its name and the folder that it lies in, no bundle_root."""
    network = load(trained_run.name, bundle_dir=str(trained_run.parent), device="cpu", **kind)
    weights = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    assert network.state_dict().keys() == weights.keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_bundle_load_into_a_network_at_hand(trained_run: Path, elsewhere: Path) -> None:
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    mine = build_network(plan["network_def"])
    load(trained_run.name, model=mine, bundle_dir=str(trained_run.parent), device="cpu")
    weights = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.state_dict().items())


def test_bundle_load_in_another_bundles_folder_is_no_mixture(
    trained_run: Path, planned_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planned_run())  # its plan, of another network, would be found at bundle_root "."
    with pytest.raises(RuntimeError) as error:
        load(trained_run.name, bundle_dir=str(trained_run.parent), workflow_type="inference", device="cpu")
    assert "is that the right bundle?" in str(innermost(error.value))


def test_two_federated_clients(trained_run: Path, tmp_path: Path, elsewhere: Path) -> None:
    """Two rounds of averaging, on clients that have different cases; weights go by the stock network's names."""
    from monai.fl.client import MonaiAlgo
    from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
    from monai.fl.utils.exchange_object import ExchangeObject

    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    cases = json.loads((trained_run / "configs" / "datalist.json").read_text())
    clients, runs = [], []
    for i in range(2):
        run = Path(shutil.copytree(trained_run, tmp_path / f"client{i}"))
        mine = {**cases, "training": cases["training"][i::2]}
        (run / "configs" / "datalist.json").write_text(json.dumps(mine))
        client = MonaiAlgo(bundle_root=str(run), send_weight_diff=False, train_kwargs={"quiet": True})
        client.initialize({ExtraItems.CLIENT_NAME: f"client{i}"})
        clients.append(client)
        runs.append(run)
    model: dict[str, torch.Tensor] = build_network(plan["network_def"]).state_dict()
    drawn = []
    for _ in range(2):
        sent = []
        for client in clients:
            client.train(ExchangeObject(weights=model))
            sent.append(client.get_weights())
            assert sent[-1].weights.keys() == model.keys()
            assert sent[-1].statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 3
        drawn.append(clients[0].train_workflow.parser.get_parsed_content("train::sampler").epoch)
        assert any(not torch.equal(sent[0].weights[k], sent[1].weights[k]) for k in model)
        model = {k: (sent[0].weights[k] + sent[1].weights[k]) / 2 for k in model}
    assert drawn == [1, 2]  # a second round draws anew
    scores = [client.evaluate(ExchangeObject(weights=model)).metrics["val_mean_dice"] for client in clients]
    assert scores[0] == scores[1]  # one model, the same validation cases
    assert all(torch.equal(t, model[k]) for k, t in get_state_dict(clients[0].evaluator.network).items())
    # what a server asks for at the end goes by the same names
    best = clients[0].get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
    assert best.weights.keys() == model.keys()
    for client in clients:
        client.finalize()


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
        self.labels = {
            name.lower(): int(i) for i, name in pred["channel_def"].items() if name != "background"
        }

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
    scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    data: Any = {"image": str(scan)}
    before = app.transforms("preprocessing")
    assert isinstance(before[0], LoadImaged)
    for transform in before:
        data = transform(data)
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
            "train#trainer#max_epochs": 1,
            "train#dataset#data": items[:2],
            "validate#dataset#data": items[2:],
            "device": "cpu",
            "train#handlers": [loader, *handlers],
        },
    )
    workflow.initialize()
    workflow.run()
    assert workflow.trainer.state.iteration == 3
    assert len(workflow.train_dataset) == 2
