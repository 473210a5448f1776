"""The projection head: from a voxel's features to the space of the contrastive loss. Training only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

# vectors shorter than this are left shorter than 1: near zero, 1 / length would blow up their gradient
_SHORTEST = 1e-4


class ProjectionHead(nn.Module):
    """A two-layer perceptron (linear, ReLU, linear) on feature vectors, unit length in and out by default.

    Runs in float32 under autocast too, and takes any number of vectors, none and one included: it has no batch
    statistics. Khosla et al. 2020, Supervised Contrastive Learning, section 3.

    Args:
        in_channels: F, length of a feature vector.
        hidden_channels: width of the hidden layer; ``None`` or 0: a linear head.
        out_channels: D, length of a projected vector.
        normalise_input: scale the features to unit length first.
        normalise_output: scale the projected vectors to unit length.

    Raises:
        ValueError: a width is not positive, or the features do not have F channels.

    Example:
        >>> ProjectionHead(16)(torch.rand(5, 16)).norm(dim=1).allclose(torch.ones(5))
        True
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | None = 128,
        out_channels: int = 64,
        *,
        normalise_input: bool = True,
        normalise_output: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden_channels or 0
        if in_channels < 1 or out_channels < 1 or hidden < 0:
            got = f"{in_channels}, {out_channels} and {hidden_channels}"
            raise ValueError(f"in_channels and out_channels must be positive and hidden_channels >= 0, got {got}.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.normalise_input, self.normalise_output = normalise_input, normalise_output
        first = [nn.Linear(in_channels, hidden), nn.ReLU()] if hidden else []
        self.layers = nn.Sequential(*first, nn.Linear(hidden or in_channels, out_channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, F) features, any floating type, to (N, D) float32."""
        if features.ndim != 2 or features.shape[1] != self.in_channels:
            raise ValueError(f"features must be (N, {self.in_channels}), got {tuple(features.shape)}.")
        with torch.autocast(features.device.type, enabled=False):
            z = features.float()
            if self.normalise_input:
                z = normalize(z, dim=1, eps=_SHORTEST)
            z = self.layers(z)
            return normalize(z, dim=1, eps=_SHORTEST) if self.normalise_output else z
