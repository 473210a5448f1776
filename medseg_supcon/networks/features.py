"""The dense features of a stock segmentation network, and the network as the trainer sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medseg_supcon.errors import ConfigError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN = "network."  # how the stock network's names begin in the wrapper
_SIDE_OUTPUTS = "deep_supervision_heads"  # of DynUNet: at lower resolution, defined after the main output
_CURE = (
    "give it one: torch.nn.Sequential(net, torch.nn.Conv3d(features, classes, 1)), where net gives features channels"
)


def classifier_name(network: nn.Module) -> str:
    """Name of the classifier: the last layer with weights that the network defines, a 1x1x1 convolution."""
    name, last = "", None
    for path, module in network.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and _SIDE_OUTPUTS not in path.split("."):
            name, last = path, module
    if isinstance(last, CONVOLUTIONS) and {*last.kernel_size, *last.stride, last.groups} == {1}:
        return name
    kind = "no layers with weights" if last is None else f"{name!r}, {last}, as its last layer"
    raise ConfigError(
        f"{type(network).__name__} has {kind}, not a 1x1x1 convolution whose input are dense features: {_CURE}."
    )


class ContrastiveNetwork(nn.Module):
    """A stock network with its dense features, the input of its classifier (see `classifier_name`), beside its logits.

    In training mode ``forward`` gives ``(logits, features)``; in evaluation mode ``logits`` alone, so that a sliding
    window takes it like any network. Of a network with deep supervision, the full-resolution output is taken and the
    others are left out: the contrastive loss and Dice speak of the same voxels, and inference uses that output only.

    The features are taken by a forward pre-hook that lives during the call only, so copying, saving, scripting and
    exporting the stock network see nothing of it. The state dict is the stock network's, under its own names, so that
    what exchanges weights with a trainer (federated learning, checkpoint loaders) needs to know nothing of this wrapper.

    Args:
        network: BasicUNet, DynUNet, SegResNet, SwinUNETR, AttentionUnet, ``Sequential(UNet, Conv3d)``, ...

    Attributes:
        in_channels: F, features per voxel (what a projection head takes in).
        out_channels: C, classes.

    Raises:
        ConfigError: the network does not end in a 1x1x1 convolution.

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
        self._caught: list[torch.Tensor] = []
        self.in_channels, self.out_channels = int(self.classifier.in_channels), int(self.classifier.out_channels)
        self.register_state_dict_post_hook(_without_own_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_own_name)  # type: ignore[no-untyped-call]

    @property
    def classifier(self) -> Any:
        """The network's last 1x1x1 convolution, from features to logits, as it stands in the network now."""
        return self.network.get_submodule(self._name)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, channels, *spatial) to logits (B, C, *spatial), and features (B, F, *spatial) in training."""
        if self.training:
            return self.forward_features(x)
        output = self.network(x)
        self._caught = []
        return _main_output(output, x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile``, in place: names in the state dict stay; arguments as for ``nn.Module.compile``."""
        if not self._stays:  # what is compiled sees no hook that comes later
            self.classifier.register_forward_pre_hook(self._catch)
            self._stays = True
        super().compile(*args, **kwargs)

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features in either mode."""
        self._caught = []
        handle = None if self._stays else self.classifier.register_forward_pre_hook(self._catch)
        try:
            output = self.network(x)
        finally:
            if handle is not None:
                handle.remove()
        caught, self._caught = self._caught, []
        if not caught or caught[-1].shape[2:] != x.shape[2:]:
            found = tuple(caught[-1].shape[2:]) if caught else "nothing"
            raise ConfigError(
                f"The layer {self._name!r} of {type(self.network).__name__} was taken for the classifier, but it read "
                f"{found} where the input has {tuple(x.shape[2:])} voxels; {_CURE}."
            )
        return _main_output(output, x), caught[-1]

    def _catch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._caught.append(inputs[0])


def _without_own_name(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """``network.weight`` becomes ``weight``."""
    own = f"{prefix}{OWN}"
    for name in [name for name in state if name.startswith(own)]:
        state[prefix + name.removeprefix(own)] = state.pop(name)


def _with_own_name(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """``weight`` becomes ``network.weight``; in place, as torch wants it."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}{OWN}{name.removeprefix(prefix)}"] = state.pop(name)


def _main_output(output: Any, x: torch.Tensor) -> torch.Tensor:
    """The full-resolution logits of a network that gives one output, a list of them, or DynUNet's stack."""
    output = output[0] if isinstance(output, list | tuple) else output
    if isinstance(output, torch.Tensor) and output.ndim == x.ndim + 1:
        output = output[:, 0]
    if isinstance(output, torch.Tensor) and output.shape[2:] == x.shape[2:]:
        return output
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    raise ConfigError(
        f"The network's output must be logits of the input's {tuple(x.shape[2:])} voxels, but it is {found}: take a "
        "segmentation network that ends at full resolution, or a patch size that it divides by."
    )
