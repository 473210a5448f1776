"""What a run leaves in models/: weights for inference, and everything a resumed training needs."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medseg_supcon.bundle import load_tensors
from medseg_supcon.errors import RunError
from medseg_supcon.files import remove_leftovers, write_whole

TYPES: dict[str, Any] = {
    "finished": bool, "max_epochs": int, "epoch": int, "iteration": int, "best": float | int | None,
    "best_epoch": int, "config": dict, "scaler": dict | None, "model": dict, "state": dict
}  # fmt: skip
OF_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")  # what a schedule remembers; the rest is its settings


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` that leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.save(value, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def load_initial(network: nn.Module, path: str | Path | None, channels_last: bool = False) -> nn.Module:
    """The network, changed in place: with the weights of ``path`` (a ``model.pt``) that fit it; `RunError` if none does."""
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if path is None:
        return network
    if not Path(path).is_file():
        raise RunError(f"{path} does not exist. Correct init_weights in the run's train.yaml, or set it to null.")
    weights, own = load_tensors(Path(path)), network.state_dict()
    if not isinstance(weights, dict):
        raise RunError(f"{path} contains a {type(weights).__name__}, not the weights of a network.")
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == getattr(v, "shape", None)}
    if not fitting:
        raise RunError(f"No weight in {path} fits this run's network. Is network_def the same in both plans?")
    network.load_state_dict({**own, **fitting})
    return network


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a ``checkpoint.pt``, on the CPU; `RunError` if it is not one that `Checkpoint` wrote."""
    saved = load_tensors(path)
    whole = isinstance(saved, dict) and all(key in saved and isinstance(saved[key], TYPES[key]) for key in TYPES)
    if whole and 0 <= saved["epoch"] <= saved["max_epochs"] and saved["iteration"] >= saved["epoch"]:
        return dict(saved)
    raise RunError(f"{path} is not a checkpoint that medseg wrote. Copy it again, or delete it to start over.")


def _alike(own: Any, saved: Any) -> bool:
    """Whether no number, mapping or list of a saved state is of another kind than the one it replaces."""
    if isinstance(own, dict) and isinstance(saved, dict):
        return all(_alike(value, saved[key]) for key, value in own.items() if key in saved)
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        return all(map(_alike, own, saved))
    if isinstance(own, int | float):
        return isinstance(saved, int | float)
    return isinstance(saved, dict) == isinstance(own, dict)


class Checkpoint:
    """Saves after every epoch, and resumes.

    ``checkpoint.pt`` holds what ``state`` names (objects with ``state_dict``), loss scale, epoch and best metric; random
    states are not needed, because draws depend on (seed, epoch). ``best.pt`` and ``model.pt`` are bare state dicts of the
    stock network: the best validation's, and what inference uses (``keep``: ``"last"`` or ``"best"``). Rank 0 writes; any
    number of ranks can resume, if their ``config`` (patch size, seed, ...) is the checkpoint's.
    """

    def __init__(
        self, folder: str | Path, network: nn.Module, state: dict[str, Any], sampler: Any = None, resume: bool = False,
        keep: str = "best", validator: Any = None, config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if keep not in ("best", "last"):
            raise ValueError(f"keep must be 'best' or 'last', got {keep!r}")
        self.folder, self.network, self.state, self.sampler = Path(folder), network, state, sampler
        self.resume, self.keep, self.validator, self.config = resume, keep, validator, config or {}
        self.path = self.folder / "checkpoint.pt"
        self.best: float | None = None
        self.best_epoch = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self._write, True)  # also after an early stop

    def start(self, engine: Any) -> None:
        if idist.get_rank() == 0:
            remove_leftovers(self.folder)
        if self.resume and self.path.exists():
            self._load(engine)
        if self.sampler is not None:
            self.sampler.epoch = engine.state.epoch + 1  # not 1 in a federated client's second round

    def _load(self, engine: Any) -> None:
        # to the CPU: every part moves its own tensors. AdamW's step counts stay there, or a GPU would wait for them
        saved = read_checkpoint(self.path)
        for key, value in self.config.items():
            if (was := saved["config"].get(key)) != value:
                raise RunError(
                    f"{self.path} was trained with {key} = {was}, not {value}. Set it back or start a new run."
                )
        for name, thing in self.state.items():
            try:
                state = saved["state"][name]
                if isinstance(thing, LambdaLR):  # a longer training has another schedule
                    state = {**thing.state_dict(), **{key: state[key] for key in OF_SCHEDULE}}
                if not _alike(thing.state_dict(), state):
                    raise ValueError("a value is of another kind.")
                thing.load_state_dict(state)
                if isinstance(thing, Optimizer) and any(
                    isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape
                    for parameter, values in thing.state.items()
                    for value in values.values()
                ):
                    raise ValueError("a tensor has another shape.")
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:  # torch's own
                raise RunError(
                    f"{self.path} does not fit the {name} of the config: {str(error).splitlines()[-1].strip()} Set "
                    "back what was changed in train.yaml or plan.json, or train into another folder."
                ) from error
        if engine.scaler is not None and saved["scaler"]:  # {}: of a scaler that was not enabled
            engine.scaler.load_state_dict(saved["scaler"])
        engine.state.epoch, engine.state.iteration = saved["epoch"], saved["iteration"]
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]

    def save(self, engine: Any) -> None:
        weights, metric = self.network.state_dict(), None
        if self.validator is not None and self.validator.state.epoch == engine.state.epoch:  # it was validated
            metric = float(self.validator.state.metrics[self.validator.state.key_metric_name])
            metric = -1.0 if math.isnan(metric) else metric
        improved = metric is not None and (self.best is None or metric > self.best)
        if improved:
            self.best, self.best_epoch = metric, engine.state.epoch
            self._save(weights, "best.pt")
        if improved or self.keep == "last" or self.validator is None:
            self._save(weights, "model.pt")
        self._write(engine, finished=False)

    def _save(self, value: Any, name: str) -> None:
        if idist.get_rank() == 0:
            save_atomically(value, self.folder / name)

    def _write(self, engine: Any, finished: bool) -> None:
        content = {name: getattr(engine.state, name) for name in ("max_epochs", "epoch", "iteration")}
        content |= {"finished": finished, "best": self.best, "best_epoch": self.best_epoch, "config": self.config}
        content["scaler"] = None if engine.scaler is None else engine.scaler.state_dict()
        content["model"] = self.network.state_dict()  # where MONAI's tools look for weights
        content["state"] = {name: thing.state_dict() for name, thing in self.state.items()}
        self._save(content, self.path.name)
