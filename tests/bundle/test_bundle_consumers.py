"""Programs that take bundles: monai.bundle.load and the bundle commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser, load

from medseg_supcon.inference import Predictor
from medseg_supcon.networks import build_network

# MONAI warns that a config is code, whoever wrote it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def bundle_run(run: Path, config: str, cwd: Path, *more: str) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", os.path.relpath(run, cwd)]
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


def test_inference_command_gives_the_masks_of_medseg(trained_run: Path, phantoms: Path, elsewhere: Path) -> None:
    scans = phantoms / "imagesTs"
    bundle_run(trained_run, "inference.yaml", elsewhere, "--dataset_dir", str(scans), "--output_dir", "masks")
    names = sorted(path.name for path in scans.glob("*.nii.gz"))
    assert sorted(path.name for path in (elsewhere / "masks").glob("*.nii.gz")) == names
    predictor = Predictor(trained_run, device="cpu")
    for name in names:
        mask, scan = nib.load(elsewhere / "masks" / name), nib.load(scans / name)
        assert mask.shape == scan.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
        ours, theirs = (sitk.ReadImage(str(folder / name)) for folder in (elsewhere / "masks", scans))
        assert ours.GetSize() == theirs.GetSize()
        for get in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(ours, get)(), getattr(theirs, get)(), atol=1e-4)
        prediction = predictor.predict(scans / name, probabilities=True)
        differ = np.asarray(mask.dataobj) != prediction.mask
        assert differ.sum() <= 3
        second, first = np.sort(prediction.probabilities[:, differ], axis=0)[-2:]  # ties to within rounding
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_evaluate_command_gives_the_runs_metrics(trained_run: Path, elsewhere: Path) -> None:
    bundle_run(trained_run, "evaluate.json", elsewhere, "--output_dir", str(elsewhere / "eval"))
    ours = json.loads((trained_run / "eval" / "metrics.json").read_text())
    theirs = json.loads((elsewhere / "eval" / "metrics.json").read_text())
    assert theirs["summary"] == ours["summary"]
    assert len(theirs["rows"]) == len(ours["rows"]) == 5
    assert all(a == pytest.approx(b) for a, b in zip(theirs["rows"], ours["rows"], strict=True))


def test_train_command_gives_the_runs_weights(run_copy: Path, trained_run: Path, elsewhere: Path) -> None:
    for file in (run_copy / "models").iterdir():
        file.unlink()
    bundle_run(run_copy, "train.json", elsewhere)
    ours = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    theirs = torch.load(run_copy / "models" / "model.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
    assert list(elsewhere.iterdir()) == []


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
    network = load(trained_run.name, bundle_dir=str(trained_run.parent), workflow_type="inference", device="cpu")
    weights = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
