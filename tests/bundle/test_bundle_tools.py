"""MONAI's own tools on a run, and the exported network where MONAI and this package are not installed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    onnx_export,
    verify_metadata,
    verify_net_in_out,
)
from torch import Tensor, nn

from medseg_supcon.bundle import export_model, self_contained
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.networks import build_network

REQUIREMENTS = Path(__file__).with_name("metadata_requirements.json")

# Runs without the packages named first: whatever imports one of them fails.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


def network_of(run: Path) -> nn.Module:
    plan = json.loads((run / "configs" / "plan.json").read_text())
    network = build_network(plan["network_def"])
    network.load_state_dict(torch.load(run / "models" / "model.pt", weights_only=True))
    return network.eval()


def python(code: str, missing: set[str], cwd: Path) -> None:
    script = WITHOUT.replace("{missing}", repr(missing)) + code
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_no_property_is_missing(trained_run: Path, elsewhere: Path, name: str, kind: str, ending: str) -> None:
    file = trained_run / "configs" / f"{name}.{ending}"
    workflow = ConfigWorkflow(str(file), workflow_type=kind, logging_file=False, bundle_root=str(trained_run))
    workflow.initialize()
    assert workflow.check_properties() == []


def test_files_that_the_zoo_asks_for(trained_run: Path) -> None:
    wanted = ("LICENSE", "docs/README.md", "models/model.pt", "configs/metadata.json", "configs/logging.conf")
    configs = tuple(f"configs/{n}.{e}" for n in ("train", "evaluate", "inference") for e in ("json", "yaml"))
    for file in (*wanted, *configs):
        assert (trained_run / file).stat().st_size > 0, file
    assert "Apache License" in (trained_run / "LICENSE").read_text()
    weights = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    assert set(weights) == set(network_of(trained_run).state_dict())


def test_verify_metadata_offline(trained_run: Path, tmp_path: Path) -> None:
    schema = shutil.copy(REQUIREMENTS, tmp_path / "schema.json")  # found there, MONAI does not download it
    md5 = hashlib.md5(REQUIREMENTS.read_bytes()).hexdigest()
    verify_metadata(str(trained_run / "configs" / "metadata.json"), filepath=str(schema), hash_val=md5)
    broken = json.loads((trained_run / "configs" / "metadata.json").read_text())
    del broken["network_data_format"]["inputs"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(str(tmp_path / "broken.json"), filepath=str(schema), hash_val=md5)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("config", ["inference.json", "train.yaml"])
def test_verify_net_in_out(trained_run: Path, elsewhere: Path, config: str, n: int) -> None:
    configs = trained_run / "configs"
    verify_net_in_out(
        "network_def",
        str(configs / "metadata.json"),
        str(configs / config),
        device="cpu",
        n=n,
        bundle_root=str(trained_run),
    )


def test_ckpt_export_loads_in_torch_alone(trained_run: Path, elsewhere: Path) -> None:
    configs = trained_run / "configs"
    ckpt_export(
        "network_def",
        str(elsewhere / "model.ts"),
        str(trained_run / "models" / "model.pt"),
        str(configs / "metadata.json"),
        [str(configs / "inference.json"), str(configs / "train.json")],
        bundle_root=str(trained_run),
    )
    compare_in_torch_alone(network_of(trained_run), elsewhere)


def test_torchscript_of_ours(trained_run: Path, elsewhere: Path) -> None:
    result = export_model(trained_run, "torchscript", elsewhere / "model.ts")
    assert result["max_abs_difference"] <= 1e-4
    assert result["any_size"] is True
    compare_in_torch_alone(network_of(trained_run), elsewhere)
    files = {"metadata.json": "", "inference.json": "", "train.json": "", "plan.json": ""}
    torch.jit.load(str(elsewhere / "model.ts"), _extra_files=files)
    contents = {name: json.loads(text) for name, text in files.items()}
    assert contents["metadata.json"] == json.loads((trained_run / "configs" / "metadata.json").read_text())
    # As MONAI Deploy does: transforms and inferer from the archive alone, the run's folder out of sight.
    parser = ConfigParser(contents["inference.json"])
    parser.parse()
    assert parser.get_parsed_content("preprocessing").transforms
    assert parser.get_parsed_content("postprocessing").transforms
    assert list(parser.get_parsed_content("inferer").roi_size) == contents["plan.json"]["patch_size"]


def compare_in_torch_alone(network: nn.Module, folder: Path) -> None:
    torch.manual_seed(0)
    images = [torch.randn(1, 1, 16, 16, 16), torch.randn(2, 1, 24, 16, 32)]
    with torch.inference_mode():
        torch.save([(image, network(image)) for image in images], folder / "pairs.pt")
    code = """
import torch
model = torch.jit.load("model.ts", map_location="cpu").eval()
for image, expected in torch.load("pairs.pt", weights_only=True):
    assert (model(image) - expected).abs().max() < 1e-4
"""
    python(code, {"monai", "medseg_supcon", "ignite"}, folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_of_ours_in_onnxruntime_alone(trained_run: Path, elsewhere: Path) -> None:
    result = export_model(trained_run, "onnx", elsewhere / "model.onnx")
    assert result["max_abs_difference"] <= 1e-4
    network, rng = network_of(trained_run), np.random.default_rng(0)
    for i, shape in enumerate([(1, 1, 16, 16, 16), (2, 1, 24, 16, 32)]):
        image = rng.standard_normal(shape, dtype=np.float32)
        with torch.inference_mode():
            np.savez(elsewhere / f"{i}.npz", image=image, expected=network(torch.from_numpy(image)).numpy())
    code = """
import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
assert "labels" in json.loads(session.get_modelmeta().custom_metadata_map["plan.json"])
for name in ("0.npz", "1.npz"):
    pair = np.load(name)
    (found,) = session.run(["pred"], {"image": pair["image"]})
    assert abs(found - pair["expected"]).max() < 1e-4
"""
    python(code, {"torch", "monai", "medseg_supcon"}, elsewhere)


def test_onnx_export_of_monai(trained_run: Path, elsewhere: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    configs = trained_run / "configs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words about the exporter that traces
        onnx_export(
            "network_def",
            str(elsewhere / "model.onnx"),
            str(trained_run / "models" / "model.pt"),
            str(configs / "metadata.json"),
            str(configs / "inference.json"),
            converter_kwargs={"dynamo": False},
            use_trace=True,
            bundle_root=str(trained_run),
        )
    session = onnxruntime.InferenceSession(str(elsewhere / "model.onnx"), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), network_of(trained_run)(image), rtol=0, atol=1e-4)


class Pads(nn.Module):
    """Accepts any size when it runs, but a trace keeps the size that it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv3d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        odd = int(x.shape[-1]) % 2
        return self.last(nn.functional.pad(x, (0, odd)))[..., : int(x.shape[-1])] + float(x.shape[-1])


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_traced_size_is_found_out(
    planned_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, format: Any, tmp_path: Path
) -> None:
    run, network = planned_run(), Pads().eval()
    plan = json.loads((run / "configs" / "plan.json").read_text())

    class Stub:
        pass

    model = Stub()
    model.plan, model.network = plan | {"patch_size": [8, 8, 8]}, network  # type: ignore[attr-defined]
    monkeypatch.setattr("medseg_supcon.bundle.export.load_model", lambda run, trust: model)
    monkeypatch.setattr("medseg_supcon.bundle.export.size_divisor", lambda *args, **kwargs: (1, 1, 1))
    monkeypatch.setattr(torch.jit, "script", lambda network: (_ for _ in ()).throw(RuntimeError("no script")))
    result = export_model(run, format, tmp_path / "model")
    assert result["any_size"] is False
    assert result["sizes"] == [(8, 8, 8)]


def test_export_says_what_is_wrong(
    planned_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned_run()
    with pytest.raises(ConfigError, match="torchscript or onnx"):
        export_model(run, "pickle", tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"model\.pt"):
        export_model(run, "torchscript", tmp_path / "x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .medseg-supcon\[export\]"):
        export_model(run, "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["plain", "a@b::c", "x#y", "\\import", "\"'$%", "é漢"])
def test_a_plan_survives_inlining(name: str) -> None:
    plan = {"name": name, "labels": {name: 1}, "network_def": {"_target_": "torch.nn.ReLU"}, "none": None}
    config = json.loads(json.dumps(self_contained({"plan": "$1/0", "copy": "$@plan['name']"}, plan)))
    parser = ConfigParser(config)
    assert parser.get_parsed_content("plan") == plan
    assert parser.get_parsed_content("copy") == name


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_options_as_a_shell_gives_them(trained_run: Path, elsewhere: Path, config: str) -> None:
    """``--bundle_root 7 --device cpu``: Fire turns the first into an int, and the second is not a ``torch.device``."""
    shutil.copytree(trained_run, elsewhere / "7")
    kind, key = ("train", "train::trainer") if config == "train" else ("infer", "evaluator")
    file = f"7/configs/{config}.yaml"
    workflow = ConfigWorkflow(file, workflow_type=kind, logging_file=False, bundle_root=7, device="cpu")
    workflow.initialize()
    assert not workflow.parser.get_parsed_content(key).amp
