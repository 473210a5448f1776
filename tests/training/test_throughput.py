"""Options that make a GPU faster, tested on the CPU for what they must not change: results, names, checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from torch import nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import ContrastiveNetwork, build_network
from medseg_supcon.training import (
    Checkpoint,
    GradientClip,
    LossScale,
    amp_dtype,
    compiled,
    load_initial,
    tune_gpu,
    usual_amp_dtype,
)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1))


def trainer(dtype: torch.dtype, folder: Path, epochs: int, resume: bool = False) -> SupervisedTrainer:
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    batches = torch.randn(4, 2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint(folder, network, {"network": network, "optimizer": optimizer}, resume=resume)
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=[{"image": b, "label": b} for b in batches],
        network=network,
        optimizer=optimizer,
        loss_function=lambda prediction, label: ((prediction - label) ** 2).mean(),
        # the scale is out of the gradient when it is clipped
        train_handlers=[LossScale(dtype), GradientClip(network.parameters(), 0.1), checkpoint],
        amp=True,
        amp_kwargs={"dtype": dtype},
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_scaled_loss_moves_the_weights_alike(tmp_path: Path) -> None:
    """On a CPU MONAI's autocast is off, so a scale (a power of two) must change nothing at all."""
    ends = {}
    for dtype in (torch.bfloat16, torch.float16):
        engine = trainer(dtype, tmp_path / str(dtype), 2)
        engine.run()
        assert engine.scaler.is_enabled() == (dtype == torch.float16)
        ends[dtype] = engine.network.state_dict()
    for name, tensor in ends[torch.float16].items():
        torch.testing.assert_close(tensor, ends[torch.bfloat16][name], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_scale_is_resumed(tmp_path: Path) -> None:
    whole = trainer(torch.float16, tmp_path / "whole", 2)
    whole.run()
    trainer(torch.float16, tmp_path / "parts", 1).run()
    rest = trainer(torch.float16, tmp_path / "parts", 2, resume=True)
    rest.run()
    assert rest.scaler.state_dict() == whole.scaler.state_dict()
    assert rest.scaler.state_dict()["_growth_tracker"] == 8
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, rest.network.state_dict()[name])
    # a run that went on without a scale, and back: a fresh scale
    other = trainer(torch.bfloat16, tmp_path / "parts", 3, resume=True)
    other.run()
    back = trainer(torch.float16, tmp_path / "parts", 4, resume=True)
    back.run()
    assert back.scaler.state_dict()["_growth_tracker"] == 4


def test_a_resume_puts_nothing_on_the_gpu_that_was_not_there(tmp_path: Path) -> None:
    """A step count on a GPU makes it wait, for every parameter at every step. ``meta`` stands for the GPU here."""
    engine: Any = SimpleNamespace(
        state=SimpleNamespace(epoch=1, iteration=1, max_epochs=2, device=torch.device("meta")), scaler=None
    )
    for resume in (False, True):
        network = small_network()
        optimizer = torch.optim.AdamW(network.parameters())
        checkpoint = Checkpoint(tmp_path, network, {"network": network, "optimizer": optimizer}, resume=resume)
        if resume:
            checkpoint.start(engine)
            assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
            assert len(optimizer.state) == len(list(network.parameters()))
        else:
            network(torch.ones(1, 1, 4, 4, 4)).sum().backward()
            optimizer.step()
            checkpoint.save(engine)


def test_channels_last_is_a_layout_and_nothing_else(trained_run: Path) -> None:
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    found = []
    for switched in (False, True):
        network = load_initial(build_network(plan["network_def"]), trained_run / "models" / "model.pt", switched)
        wide = next(p for p in network.parameters() if p.ndim == 5 and min(p.shape) > 1)
        assert wide.is_contiguous(memory_format=torch.channels_last_3d) == switched
        assert network.state_dict().keys() == weights.keys()
        found.append(network.eval()(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_compiled_network_gives_the_same_and_keeps_its_names() -> None:
    plain, fast = ContrastiveNetwork(small_network()), ContrastiveNetwork(small_network())
    assert compiled(plain, None) is plain
    teacher = copy.deepcopy(compiled(fast, "aot_eager"))  # needs no C++ compiler
    for seed in range(2):
        x = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        gradients = []
        for network in (plain, fast, teacher):
            network.zero_grad()
            logits, features = network.train()(x)
            (logits.sum() + features.square().sum()).backward()
            gradients.append([logits, features, *(p.grad for p in network.parameters())])
        for a, *others in zip(*gradients, strict=True):
            for b in others:
                torch.testing.assert_close(b, a)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), plain.eval()(x))
    assert list(fast.state_dict()) == list(plain.state_dict()) == list(small_network().state_dict())


def test_a_backend_that_does_not_work_is_left_out_with_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """As inductor without a C++ compiler."""

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler found")

    torch._dynamo.register_backend(broken, name="broken")
    network, plain = ContrastiveNetwork(small_network()), ContrastiveNetwork(small_network())
    assert compiled(network, "broken") is network
    assert "compile=broken does not work here, so it is off: no compiler found." in caplog.text
    x = torch.ones(1, 1, 8, 8, 8)
    assert torch.equal(network.eval()(x), plain.eval()(x))


def test_unknown_options_are_sentences() -> None:
    with pytest.raises(ConfigError, match="bfloat16 or float16, got 'float8'"):
        amp_dtype("float8")
    with pytest.raises(ConfigError, match="inductor"):
        compiled(ContrastiveNetwork(small_network()), "indoctor")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_a_gpu_without_bfloat16_takes_float16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """It would emulate bfloat16, many times slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert usual_amp_dtype("cuda") == usual_amp_dtype(torch.device("cuda:1")) == dtype
    assert usual_amp_dtype("cpu") == "bfloat16"


def test_a_cpu_is_left_as_it_is() -> None:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    tune_gpu("cpu")
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"amp_dtype": "float16"},
        {"channels_last": True},
        {"compile": "aot_eager"},
        {"tf32": False},
        {"cudnn_benchmark": False},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_one_key_of_the_config_each(trained_run: Path, setting: dict[str, object]) -> None:
    parser = ConfigParser()
    parser.read_config(str(trained_run / "configs" / "train.yaml"))
    parser.update({"bundle_root": str(trained_run), "device": "$torch.device('cpu')", **setting})
    network = parser.get_parsed_content("train::network")
    (key, value), stock = next(iter(setting.items())), parser.get_parsed_content("network")
    if key == "amp_dtype":
        assert parser.get_parsed_content("train::handlers")[0].dtype == torch.float16
        assert parser.get_parsed_content("train::trainer::amp_kwargs") == {"dtype": torch.float16}
    elif key == "channels_last":
        wide = next(p for p in stock.parameters() if p.ndim == 5 and min(p.shape) > 1)
        assert wide.is_contiguous(memory_format=torch.channels_last_3d)
    elif key == "compile":
        called = parser.get_parsed_content("train::trainer::network")
        assert called is network and called._compiled_call_impl is not None
    else:
        assert key in str(parser["initialize"]) and parser.get_parsed_content(key) is value
