"""Small handlers about the optimiser's step and the validation's place in training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import ValidationHandler
from torch import nn

from medseg_supcon.errors import RunError
from medseg_supcon.training.data import item_seed
from medseg_supcon.training.ranks import on_any_rank, rank


class GradientClip:
    """Clips the gradient's global norm before the optimiser's step, after the loss scale is taken out.

    Args:
        parameters: what the optimiser moves.
        max_norm: largest norm; ``None`` does not clip.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float | None = 12.0) -> None:
        self.parameters, self.max_norm = list(parameters), max_norm

    def attach(self, engine: Engine) -> None:
        if self.max_norm is not None:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if getattr(engine, "scaler", None) is not None:
            engine.scaler.unscale_(engine.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm or math.inf)


class StepSeed:
    """Seeds torch from (seed, step) before every step, so that a resumed run draws what an uninterrupted one does.

    Whatever else draws in between (a data loader's start, a validation) then leaves no trace in the training.
    Each rank has a stream of its own (rank 0 that of a single process), so that dropout differs between them.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(item_seed(self.seed, 0, engine.state.iteration, rank()))


class StopOnNaN:
    """Ends the run with a sentence when the loss is no number.

    Checked every ``interval`` steps, since looking at the loss makes a GPU wait, and at the end of an epoch, before
    its weights are saved. Of several ranks all stop.
    """

    def __init__(self, interval: int = 25) -> None:
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(every=self.interval) | Events.EPOCH_COMPLETED, self
        )

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]
        if on_any_rank(not torch.isfinite(loss).all(), loss.device):
            raise RunError(
                f"The loss became {loss.item()} at step {engine.state.iteration}. Try a lower learning rate "
                "(--set learning_rate=1e-3) or switch mixed precision off (--set amp=false)."
            )


class LateValidation(ValidationHandler):  # type: ignore[misc]
    """MONAI's ``ValidationHandler``: every ``interval`` epochs, and after the last one whatever the interval.

    Args:
        first: the first epoch that may be validated. While nothing trains the classifier, Dice says nothing.
        args, kwargs: of ``ValidationHandler``.
    """

    def __init__(self, *args: Any, first: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = first

    def attach(self, engine: Engine) -> None:
        def due(engine: Engine, epoch: int) -> bool:
            last = epoch == engine.state.max_epochs
            return epoch >= self.first and (epoch % self.interval == 0 or last)

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)


class EarlyStop:
    """Ends training after ``patience`` validations without a better key metric; its count survives a resume.

    Args:
        validator: evaluator whose key metric is watched.
        patience: validations to wait; ``None`` never stops.
    """

    def __init__(self, validator: Any, patience: int | None = None) -> None:
        self.validator, self.patience = validator, patience
        self.best, self.waited = -math.inf, 0

    def attach(self, engine: Engine) -> None:
        if self.patience is not None:
            # with the validation itself, so that a checkpoint of this epoch holds the count
            self.validator.add_event_handler(Events.COMPLETED, self, engine)

    def __call__(self, validator: Engine, engine: Engine) -> None:
        state = self.validator.state
        if self.patience is None:
            return
        value = float(state.metrics[state.key_metric_name])
        self.best, self.waited = (value, 0) if value > self.best else (self.best, self.waited + 1)
        if on_any_rank(self.waited >= self.patience, getattr(engine.state, "device", None)):
            engine.terminate()

    def state_dict(self) -> dict[str, float]:
        """The best value so far and the validations since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.best, self.waited = state["best"], int(state["waited"])
