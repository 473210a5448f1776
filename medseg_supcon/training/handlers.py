"""Small handlers of the training engine: seed, loss scale, clipping, validation, and reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import ValidationHandler
from torch import nn

from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.training.data import item_seed
from medseg_supcon.training.ranks import on_any_rank


class Handler:
    """Called at ``event`` of the engine that it is attached to."""

    event: Any

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.event, self)


class LossScale(Handler):
    """Scales the loss for float16, where small gradients would vanish; listed before ``Checkpoint``, which restores it."""

    event = Events.STARTED

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, engine: Any) -> None:
        if engine.amp:
            device = torch.device(engine.state.device).type
            # a scaler that is not enabled changes nothing, and does not wait for "all finite?"
            engine.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)


class StepSeed(Handler):
    """Seeds torch from (seed, step, rank) before every step, whatever was drawn in between or before a resumption."""

    event = Events.ITERATION_STARTED

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(item_seed(self.seed, 0, engine.state.iteration, idist.get_rank()))


class GradientClip(Handler):
    """Clips the gradient's global norm to ``max_norm`` before the optimiser's step; ``None`` does not clip."""

    event = IterationEvents.BACKWARD_COMPLETED

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float | None = 12.0) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"gradient_clip must be above 0, or null, got {max_norm}.")
        self.parameters, self.max_norm = list(parameters), max_norm

    def __call__(self, engine: Any) -> None:
        if self.max_norm is not None:
            if getattr(engine, "scaler", None) is not None:
                engine.scaler.unscale_(engine.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class StopOnNaN(Handler):
    """Ends the run with a sentence when the loss is NaN or infinite on any rank.

    Checked every 25 steps, because looking at the loss makes a GPU wait, and before an epoch's weights are saved.
    """

    event = Events.ITERATION_COMPLETED(every=25) | Events.EPOCH_COMPLETED

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]
        if on_any_rank(not torch.isfinite(loss).all()):
            raise RunError(
                f"The loss became {loss.item()} at step {engine.state.iteration}. Try a lower learning rate "
                "(--set learning_rate=1e-3) or switch mixed precision off (--set amp=false)."
            )


class StopWithoutFolder(Handler):
    """Ends the run with a sentence at the end of an epoch if its folder was deleted or moved."""

    event = Events.EPOCH_COMPLETED

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)

    def __call__(self, engine: Engine) -> None:
        if on_any_rank(not (self.run / "configs").is_dir()):
            raise RunError(f"{self.run} was deleted or moved during training. If moved, continue there with --resume.")


class LateValidation(ValidationHandler):  # type: ignore[misc]
    """MONAI's ``ValidationHandler`` that also validates the last epoch, and none before ``first``."""

    def __init__(self, interval: int, *args: Any, first: int = 1, **kwargs: Any) -> None:
        if interval < 1:
            raise ConfigError(f"val_interval must be at least 1, got {interval}.")
        super().__init__(interval, *args, **kwargs)
        self.first = first

    def attach(self, engine: Engine) -> None:
        def due(engine: Engine, epoch: int) -> bool:
            return epoch >= self.first and (epoch % self.interval == 0 or epoch == engine.state.max_epochs)

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)


class EarlyStop:
    """Ends training after ``patience`` validations without a better key metric; ``None``: never."""

    def __init__(self, validator: Any, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"early_stop must be at least 1, or null, got {patience}.")
        self.validator, self.patience = validator, patience
        self.best, self.waited = -math.inf, 0

    def attach(self, engine: Engine) -> None:
        if self.patience is not None:
            # with the validation itself, so that a checkpoint of this epoch has the count
            self.validator.add_event_handler(Events.COMPLETED, self, engine)

    def __call__(self, validator: Engine, engine: Engine) -> None:
        state = self.validator.state
        value = float(state.metrics[state.key_metric_name])
        self.best, self.waited = (value, 0) if value > self.best else (self.best, self.waited + 1)
        if on_any_rank(self.patience is not None and self.waited >= self.patience):
            engine.terminate()

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.waited = state["best"], int(state["waited"])
