"""The dense features of a stock segmentation network: what its last 1x1x1 convolution reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medseg_supcon.errors import ConfigError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# extra outputs at lower resolution (DynUNet) are defined after the main one
_SIDE_OUTPUTS = "deep_supervision_heads"
_CURE = (
    "give it one with torch.nn.Sequential(net, torch.nn.Conv3d(features, classes, 1)), "
    "where net has features output channels"
)


class FeatureTap:
    """Reads a network's dense full-resolution features without changing the network.

    The features are the input of the classifier: the 1x1x1 convolution that is the last layer with weights
    that the network defines (deep-supervision heads left aside). They are taken by a forward pre-hook that
    lives during the call only, so copying, saving, scripting and exporting the network see nothing of it
    (:meth:`stay` keeps it).

    Args:
        network: BasicUNet, DynUNet, SegResNet, SwinUNETR, AttentionUnet, ``Sequential(UNet, Conv3d)``, ...

    Attributes:
        network: the network, as given.
        name: the classifier's name in the network.
        in_channels: F, the features per voxel.
        out_channels: C, the classes.

    Raises:
        ConfigError: the network does not end in a 1x1x1 convolution.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Conv3d(8, 2, 1))
        >>> output, features = FeatureTap(net)(torch.zeros(1, 1, 4, 4, 4))
        >>> output.shape, features.shape
        (torch.Size([1, 2, 4, 4, 4]), torch.Size([1, 8, 4, 4, 4]))
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.name = _classifier_name(network)
        self._stays = False
        self._caught: list[torch.Tensor] = []
        self.in_channels = int(self.classifier.in_channels)
        self.out_channels = int(self.classifier.out_channels)

    @property
    def classifier(self) -> Any:
        """The last 1x1x1 convolution, as it stands in the network now."""
        return self.network.get_submodule(self.name)

    def stay(self) -> None:
        """Keep the hook between calls: ``torch.compile`` builds it in, and sees no later one."""
        if not self._stays:
            self.classifier.register_forward_pre_hook(self._catch)
            self._stays = True

    def take(self) -> list[torch.Tensor]:
        """What the hook has caught since the last time."""
        caught, self._caught = self._caught, []
        return caught

    def _catch(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._caught.append(inputs[0])

    def __call__(self, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The network's own output and the features (B, F, *spatial) for ``x`` (B, channels, *spatial).

        Raises:
            ConfigError: the classifier was not run, or not at the resolution of the input.
        """
        self.take()
        handle = None if self._stays else self.classifier.register_forward_pre_hook(self._catch)
        try:
            output = self.network(x)
        finally:
            if handle is not None:
                handle.remove()
        caught = self.take()
        if not caught or caught[-1].shape[2:] != x.shape[2:]:
            found = tuple(caught[-1].shape[2:]) if caught else "nothing"
            raise ConfigError(
                f"The layer {self.name!r} of {type(self.network).__name__} was taken for the classifier, but "
                f"it read {found} where the input has {tuple(x.shape[2:])} voxels; {_CURE}."
            )
        return output, caught[-1]


def _classifier_name(network: nn.Module) -> str:
    """Name of the last layer with weights, if it is a pointwise convolution."""
    last: tuple[str, nn.Module] | None = None
    for name, module in network.named_modules():
        has_weights = any(True for _ in module.parameters(recurse=False))
        if has_weights and _SIDE_OUTPUTS not in name.split("."):
            last = name, module
    if last is None or not _is_pointwise(last[1]):
        kind = "no layers with weights" if last is None else f"{last[0]!r}, {last[1]}, as its last layer"
        raise ConfigError(
            f"{type(network).__name__} has {kind}, not a 1x1x1 convolution whose input are dense "
            f"features: {_CURE}."
        )
    return last[0]


def _is_pointwise(module: nn.Module) -> bool:
    if not isinstance(module, CONVOLUTIONS):
        return False
    return (
        all(k == 1 for k in module.kernel_size) and all(s == 1 for s in module.stride) and module.groups == 1
    )
