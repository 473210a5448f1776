"""The dense features of a stock segmentation network, and the head that projects them for the contrastive loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medseg_supcon.errors import ConfigError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN = "network."  # how the stock network's names begin in the wrapper, but not in its state dict
_SHORTEST = 1e-4  # shorter vectors stay shorter than 1: near zero, 1 / length would blow up their gradient
_SIDE_OUTPUTS = "deep_supervision_heads"  # of DynUNet: at lower resolution, defined after the main output
_CURE = "add one: torch.nn.Sequential(net, torch.nn.Conv3d(features, classes, 1)), if net gives features channels"


def classifier_name(network: nn.Module) -> str:
    """Name of the classifier: the last layer with weights that the network defines, a 1x1x1 convolution."""
    name, last = "", None
    for path, module in network.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and _SIDE_OUTPUTS not in path.split("."):
            name, last = path, module
    if isinstance(last, CONVOLUTIONS) and {*last.kernel_size, *last.stride, last.groups} == {1}:
        return name
    kind = "no layers with weights" if last is None else f"{name!r}, {last}, as its last layer"
    raise ConfigError(f"{type(network).__name__} has {kind}, not a 1x1x1 convolution of dense features: {_CURE}.")


class ContrastiveNetwork(nn.Module):
    """A stock network that also gives its dense features, the input of its classifier (the last 1x1x1 convolution).

    In training mode it gives ``(logits, features)``, in evaluation mode ``logits``, as a sliding window expects; of a
    network with deep supervision only the full-resolution output. ``in_channels`` is F, the features per voxel,
    ``out_channels`` C, the classes. ConfigError if the network does not end in a 1x1x1 convolution.

    A forward pre-hook takes the features and is removed after each call, so copying, saving and exporting see the
    stock network. The state dict is the stock network's, under its own names.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Conv3d(8, 2, 1))
        >>> logits, features = ContrastiveNetwork(net).train()(torch.zeros(1, 1, 4, 4, 4))
        >>> ContrastiveNetwork(net).eval()(torch.zeros(1, 1, 4, 4, 4)).shape
        torch.Size([1, 2, 4, 4, 4])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self._name = network, classifier_name(network)
        self._stays = False  # the hook, between calls
        self._caught: list[Tensor] = []
        self.in_channels, self.out_channels = int(self.classifier.in_channels), int(self.classifier.out_channels)
        self.register_state_dict_post_hook(_without_own_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_own_name)  # type: ignore[no-untyped-call]

    @property
    def classifier(self) -> Any:
        """The network's last 1x1x1 convolution, from features to logits, as it stands in the network now."""
        return self.network.get_submodule(self._name)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, channels, *spatial) to logits (B, C, *spatial), and features (B, F, *spatial) in training."""
        logits, features = self.forward_features(x)
        return (logits, features) if self.training else logits

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile``, in place: names in the state dict stay; arguments as for ``nn.Module.compile``."""
        if not self._stays:  # what is compiled sees no hook that comes later
            self.classifier.register_forward_pre_hook(self._catch)
            self._stays = True
        super().compile(*args, **kwargs)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features in either mode."""
        self._caught = []
        with nullcontext() if self._stays else self.classifier.register_forward_pre_hook(self._catch):
            output = self.network(x)
        caught, self._caught = self._caught, []
        if not caught or caught[-1].shape[2:] != x.shape[2:]:
            got = tuple(caught[-1].shape[2:]) if caught else "nothing"
            read = f"read {got}, and the input has {tuple(x.shape[2:])} voxels"
            raise ConfigError(f"{type(self.network).__name__}'s classifier {self._name!r} {read}; {_CURE}.")
        return _main_output(output, x), caught[-1]

    def _catch(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._caught.append(inputs[0])


def _without_own_name(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + OWN)]:
        state[prefix + name.removeprefix(prefix + OWN)] = state.pop(name)


def _with_own_name(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}{OWN}{name.removeprefix(prefix)}"] = state.pop(name)


def _main_output(output: Any, x: Tensor) -> Tensor:
    """The full-resolution logits of a network that gives one output, a list of them, or DynUNet's stack."""
    output = output[0] if isinstance(output, list | tuple) else output
    if isinstance(output, Tensor) and output.ndim == x.ndim + 1:
        output = output[:, 0]
    if isinstance(output, Tensor) and output.shape[2:] == x.shape[2:]:
        return output
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    cure = "take a segmentation network that ends at full resolution, or a patch size that it divides by"
    raise ConfigError(f"The network's output must be logits of {tuple(x.shape[2:])} voxels, but it is {got}: {cure}.")


class ProjectionHead(nn.Module):
    """A perceptron (linear, ReLU, linear; Khosla et al. 2020, section 3) on feature vectors, in float32.

    Args:
        in_channels: F, length of a feature vector.
        hidden_channels: width of the hidden layer; ``None`` or 0: a linear head.
        out_channels: D, length of a projected vector.
        normalise_input, normalise_output: scale the features, the projected vectors, to unit length.

    Example:
        >>> ProjectionHead(16)(torch.rand(5, 16)).norm(dim=1).allclose(torch.ones(5))
        True
    """

    def __init__(
        self, in_channels: int, hidden_channels: int | None = 128, out_channels: int = 64, *,
        normalise_input: bool = True, normalise_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = hidden_channels or 0
        if in_channels < 1 or out_channels < 1 or hidden < 0:
            got = f"{in_channels}, {out_channels} and {hidden_channels}"
            raise ValueError(f"in_channels and out_channels must be positive and hidden_channels >= 0, got {got}.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.normalise_input, self.normalise_output = normalise_input, normalise_output
        first = [nn.Linear(in_channels, hidden), nn.ReLU()] if hidden else []
        self.layers = nn.Sequential(*first, nn.Linear(hidden or in_channels, out_channels))

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) features, any floating type, to (N, D) float32."""
        if features.ndim != 2 or features.shape[1] != self.in_channels:
            raise ValueError(f"features must be (N, {self.in_channels}), got {tuple(features.shape)}.")
        with torch.autocast(features.device.type, enabled=False):
            z = features.float()
            z = self.layers(normalize(z, dim=1, eps=_SHORTEST) if self.normalise_input else z)
            return normalize(z, dim=1, eps=_SHORTEST) if self.normalise_output else z
