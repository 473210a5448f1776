"""The network as the trainer sees it: logits and dense features in training, logits alone otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medseg_supcon.errors import ConfigError

from ._tap import FeatureTap

OWN = "network."


class ContrastiveNetwork(nn.Module):
    """A stock network with its dense features beside its logits.

    In training mode ``forward`` gives ``(logits, features)``; in evaluation mode ``logits`` alone, so that a
    sliding window takes it like any network. Of a network with deep supervision, the full-resolution output
    is taken and the others are left out: the contrastive loss and Dice speak of the same voxels, and
    inference uses that output only.

    The state dict is the stock network's, under its own names, so that what exchanges weights with a trainer
    (federated learning, checkpoint loaders) needs to know nothing of this wrapper.

    Args:
        network: see :class:`FeatureTap`.

    Attributes:
        network: the stock network.
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
        self.network = network
        self._tap = FeatureTap(network)
        self.in_channels = self._tap.in_channels
        self.out_channels = self._tap.out_channels
        self.register_state_dict_post_hook(_without_own_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_own_name)  # type: ignore[no-untyped-call]

    @property
    def classifier(self) -> nn.Module:
        """The network's last 1x1x1 convolution, from features to logits."""
        classifier: nn.Module = self._tap.classifier
        return classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, channels, *spatial) to logits (B, C, *spatial), and features (B, F, *spatial) in training."""
        if self.training:
            return self.forward_features(x)
        output = self.network(x)
        self._tap.take()
        return _main_output(output, x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile``, in place: names in the state dict stay; arguments as for ``nn.Module.compile``."""
        self._tap.stay()
        super().compile(*args, **kwargs)

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features in either mode."""
        output, features = self._tap(x)
        return _main_output(output, x), features


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
    if isinstance(output, list | tuple):
        output = output[0]
    if isinstance(output, torch.Tensor) and output.ndim == x.ndim + 1:
        output = output[:, 0]
    if not isinstance(output, torch.Tensor) or output.shape[2:] != x.shape[2:]:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ConfigError(
            f"The network's output must be logits of the input's {tuple(x.shape[2:])} voxels, but it is "
            f"{found}: take a segmentation network that ends at full resolution, or a patch size that it "
            "divides by."
        )
    return output
