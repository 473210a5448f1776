"""A running average of the weights, which is validated and saved in place of the last ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import ContrastiveNetwork


class WeightAverage:
    """The running average of a network's weights and norm statistics; a handler that moves it after every step.

    After step t = 0, 1, ... since the start or `restart`: average = d * average + (1 - d) * weights, with
    d = min(decay, (1 + t) / (10 + t)), so that the first, random weights are soon forgotten (Tarvainen and Valpola 2017,
    Mean teachers are better role models). ``network`` is given the trained network, and as an attribute is the averaged
    one, in evaluation mode; with a ``decay`` of 0 it is the trained network itself.
    """

    def __init__(self, network: nn.Module, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"weight_average must be at least 0 and below 1, got {decay}.")
        self.student, self.decay, self._d = network, decay, 0.0
        self.network, self.average = network, None
        if decay > 0:
            self.average = AveragedModel(network, multi_avg_fn=self._average, use_buffers=True)
            self.network = self.average.module.eval().requires_grad_(False)
            for module in self.network.modules():  # a compiled network's hook would hand features to its wrapper
                for key, hook in list(module._forward_pre_hooks.items()):
                    if isinstance(getattr(hook, "__self__", None), ContrastiveNetwork):
                        del module._forward_pre_hooks[key]

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], _: Tensor | int) -> None:
        # all tensors in one call: for one at a time torch would copy its count to the GPU each time, and wait
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.copy_(self._d * average + (1 - self._d) * weight)
            else:  # counters
                average.copy_(weight)

    def attach(self, engine: Engine) -> None:
        if self.average is not None:
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.update)

    @torch.no_grad()
    def update(self) -> None:
        if self.average is not None:
            t = int(self.average.n_averaged)
            self._d = min(self.decay, (1 + t) / (10 + t))
            self.average.update_parameters(self.student)

    def restart(self) -> None:
        """Begin a new average with the next step's weights, because training goes on with another loss."""
        if self.average is not None:
            self.average.n_averaged.zero_()

    def validated(self, trained: ContrastiveNetwork) -> ContrastiveNetwork:
        """The network that validation runs: ``trained``, the wrapped (and perhaps compiled) one, if there is no average."""
        return trained if self.average is None else ContrastiveNetwork(self.network)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else dict(self.average.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(dict(state))
        elif state:
            raise ValueError("weight_average was above 0.")
