"""A network that can be frozen up to its last 1x1x1 convolution."""

from __future__ import annotations

from typing import Any

from medseg_supcon.networks import ContrastiveNetwork


class StagedNetwork(ContrastiveNetwork):
    """A ``ContrastiveNetwork`` whose layers, while ``frozen``, stay in evaluation mode during training.

    Norm statistics then stay as they are and are what normalises, and nothing is dropped out.

    Args:
        network: the stock network.

    Attributes:
        frozen: set by :class:`Stages`; not part of the state dict.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm3d(1), torch.nn.Conv3d(1, 2, 1))
        >>> staged = StagedNetwork(net)
        >>> staged.frozen = True
        >>> staged.train().training, net[0].training
        (True, False)
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.frozen = False

    def train(self, mode: bool = True) -> StagedNetwork:
        """Training mode gives features beside logits, frozen or not."""
        super().train(mode)
        if mode and self.frozen:
            self.network.eval()
        return self
