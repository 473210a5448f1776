"""Contrast first, then the classifier, then everything: stages of epochs, and what learns in each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training.average import WeightAverage
from medseg_supcon.training.handlers import Handler
from medseg_supcon.training.loss import with_unknown

STAGES = ("contrast", "classifier", "fine_tune")
Loss = Callable[..., Tensor]
Epochs = Mapping[str, int]  # of each stage


def stage_epochs(shares: Mapping[str, float], epochs: int) -> dict[str, int]:
    """How many of the epochs each stage gets: its share, at least one if the share is above 0."""
    if not set(shares) <= set(STAGES) or any(not share >= 0 for share in shares.values()):
        raise ConfigError(f"stage_shares must give {', '.join(STAGES)} shares of at least 0, got {dict(shares)}.")
    used = {name: float(shares[name]) for name in STAGES if shares.get(name, 0) > 0}
    if not used.keys() - {"contrast"}:
        raise ConfigError("stage_shares leaves the classifier untrained. Give classifier or fine_tune a share above 0.")
    if epochs < len(used):
        raise ConfigError(
            f"Training in {len(used)} stages needs at least {len(used)} epochs, got {epochs}. Give --epochs "
            f"{len(used)} or more, or set a stage's share to 0 (--set stage_shares::fine_tune=0)."
        )
    ideal = {name: share / sum(used.values()) * epochs for name, share in used.items()}
    given = {name: max(1, math.floor(n)) for name, n in ideal.items()}
    while (left := epochs - sum(given.values())) != 0:
        step = 1 if left > 0 else -1
        free = [name for name in given if given[name] + step >= 1]
        given[max(free, key=lambda name: step * (ideal[name] - given[name]))] += step
    return {name: given.get(name, 0) for name in STAGES}


def stage_at(epochs: Epochs, epoch: int) -> tuple[str, int]:
    """The stage of an epoch (1, 2, ...) and the stage's first epoch; past the end, those of the last stage."""
    order = [name for name in STAGES for _ in range(epochs.get(name, 0))]
    stage = order[min(epoch, len(order)) - 1]
    return stage, order.index(stage) + 1


def staged_schedule(
    optimizer: Optimizer, epochs: Epochs, steps_per_epoch: int, factors: Mapping[str, float] | None = None,
    decay: bool = True,
) -> LambdaLR:  # fmt: skip
    """A learning rate that restarts in every stage: linear warm-up from a tenth, then cosine decay to 0.

    The warm-up is a tenth of the stage, at most 100 steps; without ``decay`` the rate stays constant after it.
    `factors`: stage -> factor of the learning rate (default 1).
    """

    def rate(step: int) -> float:
        name, first = stage_at(epochs, step // steps_per_epoch + 1)
        length = epochs[name] * steps_per_epoch
        t, warmup = step - (first - 1) * steps_per_epoch, min(100, length // 10)
        if t < warmup:
            shape = 0.1 + 0.9 * t / warmup
        elif decay:
            shape = 0.5 * (1 + math.cos(math.pi * min(1.0, (t - warmup) / max(1, length - warmup))))
        else:
            shape = 1.0
        return float((factors or {}).get(name, 1.0)) * shape

    return LambdaLR(optimizer, rate)


class StagedNetwork(ContrastiveNetwork):
    """A ``ContrastiveNetwork`` whose layers, while ``frozen``, stay in evaluation mode: norm statistics do not change."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.frozen = False

    def train(self, mode: bool = True) -> StagedNetwork:
        super().train(mode)
        if mode and self.frozen:
            self.network.eval()
        return self


class StagedLoss(nn.Module):
    """The loss of the stage that training is in; has the interface of ``DiceSupConLoss``.

    ``contrastive_loss`` is called without logits, because the classifier is not trained yet, the others with (logits,
    labels). `unknown`: class index that stage ``contrast`` gives unlabelled voxels (`with_unknown`).
    """

    def __init__(
        self, contrastive_loss: Loss, classifier_loss: Loss, fine_tune_loss: Loss, unknown: int | None = None
    ) -> None:
        super().__init__()
        self.contrastive_loss, self.unknown = contrastive_loss, unknown
        self.classifier_loss, self.fine_tune_loss = classifier_loss, fine_tune_loss
        self.stage = STAGES[0]  # `Stages` sets it
        self.terms: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, labels: Tensor, features: Tensor, **ids: Tensor | None) -> Tensor:
        contrast = self.stage == "contrast"
        if contrast:
            known = with_unknown(labels, ids.get("pair_ids"), self.unknown)
            loss = self.contrastive_loss(features, known, **ids)
        else:
            loss = (self.classifier_loss if self.stage == "classifier" else self.fine_tune_loss)(logits, labels)
        self.terms = {
            "loss": loss.detach(),
            "stage": loss.new_full((), STAGES.index(self.stage) + 1.0),
            "contrast_weight": loss.new_full((), float(contrast)),
            "contrastive" if contrast else "segmentation": loss.detach(),
        }
        return loss


class Stages(Handler):
    """Puts network, loss and optimiser into the stage of the epoch that starts.

    - ``contrast``: all but the classifier learns from the contrastive loss, the projection head included.
    - ``classifier``: only the last 1x1x1 convolution learns; the rest has no gradient (so neither momentum nor weight
      decay moves it) and is in evaluation mode (so norm statistics stay).
    - ``fine_tune``: the whole network learns; the projection head is not used.
    """

    event = Events.EPOCH_STARTED

    def __init__(
        self, epochs: Epochs, network: StagedNetwork, loss: StagedLoss, optimizer: Optimizer,
        average: WeightAverage | None = None,
    ) -> None:  # fmt: skip
        self.epochs, self.network, self.loss, self.optimizer = dict(epochs), network, loss, optimizer
        self.average = average

    def __call__(self, engine: Engine) -> None:
        stage, first = stage_at(self.epochs, engine.state.epoch)
        classifier = {id(p) for p in self.network.classifier.parameters()}
        head = {id(p) for p in self.loss.parameters()}
        for parameter in chain(self.network.parameters(), self.loss.parameters()):
            if stage == "fine_tune":
                learns = id(parameter) not in head
            else:
                learns = (id(parameter) in classifier) == (stage == "classifier")
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # a gradient of zeros would still be a step for the optimiser
        self.network.frozen = stage == "classifier"
        self.loss.stage = stage
        if engine.state.epoch == first:
            self.optimizer.state.clear()  # its moments belong to another loss
            if self.average is not None:
                self.average.restart()
            engine.logger.info(f"Stage {stage}: {self.epochs.get(stage, 0)} epochs from epoch {first}.")
