"""One set of tests for every architecture that must work by changing network_def alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from torch import nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import ContrastiveNetwork, build_network, chain, size_divisor

CLASSES = 3


class Architecture:
    """Inherited once per architecture."""

    network_def: ClassVar[dict[str, object] | str]
    features: ClassVar[int]
    divisor: ClassVar[tuple[int, int, int]]
    size: ClassVar[tuple[int, int, int]] = (16, 16, 32)
    channels: ClassVar[int] = 1

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return build_network(self.network_def, in_channels=self.channels, num_classes=CLASSES)

    def scan(self, size: tuple[int, ...] | None = None) -> torch.Tensor:
        return torch.randn(1, self.channels, *(size or self.size), generator=torch.Generator().manual_seed(1))

    def test_features_to_logits_exactly(self) -> None:
        network = ContrastiveNetwork(self.build()).train()
        x = self.scan()
        logits, features = network(x)
        assert logits.shape == (1, CLASSES, *self.size)
        assert features.shape == (1, self.features, *self.size)
        assert network.in_channels == self.features
        assert network.out_channels == CLASSES
        classifier = network.classifier
        weight = classifier.weight.reshape(CLASSES, self.features)
        by_hand = torch.einsum("cf,bfxyz->bcxyz", weight, features) + classifier.bias.reshape(1, -1, 1, 1, 1)
        torch.testing.assert_close(by_hand, logits, rtol=1e-4, atol=1e-5)

    def test_backward_through_both(self) -> None:
        network = ContrastiveNetwork(self.build()).train()
        logits, features = network(self.scan())
        (logits.square().mean() + features.square().mean()).backward()
        side = "deep_supervision_heads"
        without = [name for name, p in network.named_parameters() if p.grad is None and side not in name]
        assert without == []

    def test_features_alone_train_the_rest_of_the_network(self) -> None:
        network = ContrastiveNetwork(self.build()).train()
        _, features = network(self.scan())
        features.square().mean().backward()
        assert all(p.grad is None for p in network.classifier.parameters())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())

    def test_evaluation_gives_logits_alone(self) -> None:
        stock = self.build().eval()
        network = ContrastiveNetwork(stock).eval()
        x = self.scan()
        with torch.no_grad():
            assert torch.equal(network(x), stock(x))
            logits, features = network.forward_features(x)
            assert torch.equal(logits, stock(x))
            window = sliding_window_inference(x, self.size, 1, network)
        assert features.shape[1] == self.features
        torch.testing.assert_close(window.as_subclass(torch.Tensor), logits)

    def test_size_divisor(self) -> None:
        network = self.build().train()
        network(self.scan())  # DynUNet then holds tensors of a graph
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        assert size_divisor(network, self.channels) == self.divisor
        assert all(module.training for module in network.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    def test_odd_sizes_are_refused_or_work_as_the_divisor_says(self) -> None:
        network = ContrastiveNetwork(self.build()).eval()
        for axis, divisor in enumerate(self.divisor):
            for size in {self.size[axis] + divisor, self.size[axis] + max(divisor // 2, 1)}:
                shape = list(self.size)
                shape[axis] = size
                fits = size % divisor == 0
                try:
                    with torch.no_grad():
                        assert network(self.scan(tuple(shape))).shape[2:] == tuple(shape)
                    worked = True
                except (RuntimeError, ValueError, ConfigError):
                    worked = False
                assert worked == fits

    def test_state_dict_is_the_stock_networks(self) -> None:
        stock = self.build()
        keys = list(stock.state_dict())
        network = ContrastiveNetwork(stock)
        network.train()(self.scan())
        assert list(network.state_dict()) == keys
        assert list(stock.state_dict()) == keys
        assert not any(module._forward_pre_hooks for module in stock.modules())

    def test_save_and_load(self) -> None:
        network = ContrastiveNetwork(self.build()).eval()
        file = io.BytesIO()
        torch.save(network.network.state_dict(), file)
        file.seek(0)
        torch.manual_seed(7)
        other = build_network(self.network_def)
        other.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            assert torch.equal(other.eval()(self.scan()), network(self.scan()))

    def test_deepcopy_taps_the_copy(self) -> None:
        network = ContrastiveNetwork(self.build())
        teacher = copy.deepcopy(network).train()
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.zero_()
            assert teacher(self.scan())[0].abs().max() == 0
            logits, features = network.train()(self.scan())
        assert logits.abs().max() > 0
        assert features.abs().max() > 0
        assert teacher.classifier is not network.classifier

    @pytest.mark.filterwarnings(
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:__array_wrap__ must accept context:DeprecationWarning",
        "ignore::torch.jit.TracerWarning",
    )
    def test_torchscript_of_the_stock_network(self) -> None:
        network = ContrastiveNetwork(self.build())
        network.train()(self.scan())
        stock = network.network.eval()
        for parameter in stock.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            traced = torch.jit.trace(stock, self.scan(), check_trace=False)
            torch.testing.assert_close(traced(self.scan()), stock(self.scan()), rtol=1e-5, atol=1e-5)


class TestUNetWithClassifier(Architecture):
    network_def: ClassVar = chain(
        {
            "_target_": "monai.networks.nets.UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 6,
            "channels": [4, 8, 16],
            "strides": [2, 2],
            "num_res_units": 2,
        },
        {"_target_": "torch.nn.Conv3d", "in_channels": 6, "out_channels": 3, "kernel_size": 1},
    )
    features, divisor = 6, (4, 4, 4)


class TestBasicUNet(Architecture):
    network_def: ClassVar = {
        "_target_": "BasicUNet",
        "spatial_dims": 3,
        "in_channels": 4,
        "out_channels": CLASSES,
        "features": [4, 4, 8, 8, 8, 5],
    }
    features, divisor, channels, size = 5, (1, 1, 1), 4, (16, 16, 32)

    def test_odd_sizes_are_refused_or_work_as_the_divisor_says(self) -> None:
        with torch.no_grad():
            assert ContrastiveNetwork(self.build()).eval()(self.scan((17, 23, 33))).shape[2:] == (17, 23, 33)


class TestDynUNet(Architecture):
    network_def: ClassVar = {
        "_target_": "DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": CLASSES,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, [2, 2, 1]],
        "upsample_kernel_size": [2, [2, 2, 1]],
        "filters": [4, 8, 16],
    }
    features, divisor = 4, (4, 4, 2)


class TestDynUNetWithDeepSupervision(Architecture):
    network_def: ClassVar = {
        "_target_": "DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": CLASSES,
        "kernel_size": [3, 3, 3, 3],
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2],
        "filters": [4, 8, 8, 8],
        "deep_supervision": True,
        "deep_supr_num": 2,
    }
    features, divisor = 4, (8, 8, 8)


class TestSegResNet(Architecture):
    network_def: ClassVar = {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "in_channels": 2,
        "out_channels": CLASSES,
        "init_filters": 8,
        "blocks_down": [1, 1, 1],
        "blocks_up": [1, 1],
    }
    features, divisor, channels = 8, (4, 4, 4), 2


class TestAttentionUnet(Architecture):
    network_def: ClassVar = {
        "_target_": "AttentionUnet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": CLASSES,
        "channels": [4, 8, 16],
        "strides": [2, 2],
    }
    features, divisor = 4, (4, 4, 4)


class TestSwinUNETR(Architecture):
    network_def: ClassVar = {
        "_target_": "SwinUNETR",
        "in_channels": 1,
        "out_channels": CLASSES,
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
    }
    features, divisor, size = 12, (32, 32, 32), (32, 32, 64)


NO_CLASSIFIER: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: UNet(3, 1, CLASSES, channels=(4, 8, 16), strides=(2, 2), num_res_units=2),
    "Identity": nn.Identity,
    "strided": lambda: nn.Conv3d(1, CLASSES, 1, stride=2),
}


@pytest.mark.parametrize("name", NO_CLASSIFIER)
def test_a_network_without_classifier_is_refused_with_the_cure(name: str) -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Sequential\(net, torch\.nn\.Conv3d"):
        ContrastiveNetwork(NO_CLASSIFIER[name]())


def test_a_classifier_at_low_resolution_is_refused() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.Conv3d(4, CLASSES, 1))
    with pytest.raises(ConfigError, match=r"\(4, 4, 4\), and the input has \(8, 8, 8\)"):
        ContrastiveNetwork(network).train()(torch.zeros(1, 1, 8, 8, 8))


def test_the_hook_is_gone_after_a_failure() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, CLASSES, 1))
    with pytest.raises(RuntimeError):
        ContrastiveNetwork(network).forward_features(torch.zeros(1, 2, 8, 8, 8))
    assert not network[1]._forward_pre_hooks


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend of torch.distributed")
def test_distributed(tmp_path: Path) -> None:
    network = ContrastiveNetwork(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, CLASSES, 1)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        logits, features = wrapped.train()(torch.randn(1, 1, 6, 6, 6))
        (logits.sum() + features.sum()).backward()
        assert all(p.grad is not None for p in network.parameters())
        assert wrapped.eval()(torch.randn(1, 1, 6, 6, 6)).shape == (1, CLASSES, 6, 6, 6)
    finally:
        dist.destroy_process_group()


# torch 2.13 looks at .grad of the features where it leaves and re-enters the graph around the hook
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    network = ContrastiveNetwork(
        nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, CLASSES, 1))
    ).train()
    x = torch.randn(1, 1, 6, 6, 6)
    compiled = torch.compile(network, backend="eager")
    for got, expected in zip(compiled(x), network(x), strict=True):
        torch.testing.assert_close(got, expected)
