"""What a training shows and leaves to look at: progress on stderr, TensorBoard events, history.csv."""

from __future__ import annotations

import csv
import sys
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.visualize import blend_images
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from medseg_supcon.datasets import Regions
from medseg_supcon.errors import RunError
from medseg_supcon.files import write_csv
from medseg_supcon.training.loss import predicted_classes
from medseg_supcon.training.ranks import mean_over_ranks
from medseg_supcon.training.tracking import Tracker

MEAN = "val_mean_dice"


def overlay_slice(image: Tensor, label: Tensor, prediction: Tensor) -> Tensor:
    """The axial slice with most foreground of a scan's first channel, reference beside prediction: RGB (3, Y, 2X), 0..1."""
    z = int(((label > 0) | (prediction > 0)).sum(dim=(0, 1, 2)).argmax())
    picture = image[:1, :, :, z].float()
    low, high = torch.quantile(picture, torch.tensor([0.01, 0.99], device=picture.device))
    picture = ((picture - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    panels = [torch.as_tensor(blend_images(picture, m[..., z].clamp_min(0), alpha=0.4)) for m in (label, prediction)]
    return torch.cat([p.rot90(1, (1, 2)) for p in panels], dim=2).clamp(0, 1)


class TrainingLog:
    """Writes every epoch's means to ``history.csv`` and TensorBoard, and an overlay image at validation.

    A resumed run drops rows and events after the epoch that it starts from. Rank 0 writes the means over all ranks.
    `loss.terms`: name -> detached tensor of the last call; `labels`: names of the foreground classes, or of the `regions`;
    `validator`: has the metrics ``val_mean_dice`` and ``val_dice_per_class``; `track`: ``mlflow``: the scalars go there too.
    """

    def __init__(
        self, folder: str | Path, loss: Any, optimizer: Any, labels: list[str], validator: Any = None,
        track: str | None = None, regions: Regions | None = None,
    ) -> None:  # fmt: skip
        self.track, self.regions = track, regions
        self.tracker: Tracker | None = None
        self.folder, self.path = Path(folder), Path(folder) / "history.csv"
        self.loss, self.optimizer, self.labels, self.validator = loss, optimizer, labels, validator
        self.rows: list[dict[str, Any]] = []
        self.writer: SummaryWriter | None = None
        self._sums: dict[str, Tensor] = {}
        self._count, self._since = 0, monotonic()
        self._overlay: Tensor | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        engine.add_event_handler(Events.COMPLETED, self.close)
        if self.validator is not None:
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.draw_overlay)

    def start(self, engine: Engine) -> None:
        self._sums, self._count, self._since = {}, 0, monotonic()
        if self.writer is not None or idist.get_rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        done = engine.state.epoch - 1
        if done == 0:
            for stale in self.folder.glob("events.out.tfevents.*"):
                stale.unlink()
        elif self.path.exists():
            try:
                with self.path.open(newline="", encoding="utf-8") as stream:
                    self.rows = [r for r in csv.DictReader(stream) if int(r["epoch"]) <= done]
            except (KeyError, ValueError, TypeError, csv.Error):
                text = f"{self.path} is damaged. Copy it again, or delete it: only its curves are lost."
                raise RunError(text) from None
        self.tracker = Tracker(self.folder, engine) if self.track else None
        self.writer = SummaryWriter(str(self.folder), purge_step=engine.state.iteration + 1 if done else None)

    def add(self, engine: Engine) -> None:
        for name, value in self.loss.terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def write(self, engine: Engine) -> None:
        sums = mean_over_ranks(self._sums)
        if self.writer is None:  # a rank above 0
            return
        row: dict[str, Any] = {"epoch": engine.state.epoch, "step": engine.state.iteration}
        row |= {"seconds": round(monotonic() - self._since, 2), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        row |= {name: float(total) / max(1, self._count) for name, total in sums.items()}
        if self.validator is not None and self.validator.state.epoch == engine.state.epoch:
            row |= self._validation()
        self.rows.append(row)
        write_csv(self.path, list(dict.fromkeys(c for r in self.rows for c in r)), self.rows)
        scalars = {}
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step", "seconds"):
                group = "validation" if name.startswith("val_") else "train"
                scalars[f"{group}/{name}"] = value
                self.writer.add_scalar(f"{group}/{name}", value, row["step"])
        if self.tracker is not None:
            self.tracker.add(scalars, row["step"])
        if self._overlay is not None:
            self.writer.add_image("validation/reference_and_prediction", self._overlay, row["step"])
            self._overlay = None
        self.writer.flush()

    def _validation(self) -> dict[str, float | None]:
        state = self.validator.state
        per_class = torch.as_tensor(state.metrics["val_dice_per_class"]).reshape(-1).tolist()
        details = getattr(state, "metric_details", {}).get(MEAN)
        if details is not None:  # a class that is in no case has no score; MONAI's mean over none is 0
            shown = torch.as_tensor(details).isfinite().any(0).tolist()
            per_class = [value if there else None for value, there in zip(per_class, shown, strict=True)]
        names = [f"val_dice_{name}" for name in self.labels]
        return {MEAN: float(state.metrics[MEAN]), **dict(zip(names, per_class, strict=True))}

    def draw_overlay(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            output = engine.state.output[0]
            image, label, logits = (torch.as_tensor(output[key]) for key in ("image", "label", "pred"))
            self._overlay = overlay_slice(image, label, predicted_classes(logits, self.regions)).cpu()

    def close(self, engine: Engine) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.close()


def _bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A bar on stderr, shown only on a terminal."""
    console = Console(file=sys.stderr, markup=False, highlight=False)  # names may contain [brackets]
    name = TextColumn("{task.description}", markup=False)
    return Progress(name, BarColumn(), *columns, console=console, transient=transient, disable=not console.is_terminal)


class ProgressDisplay:
    """Epoch, loss, Dice and time left of a training: a bar on a terminal, elsewhere a line per validated epoch.

    The time left follows from this process's time so far, validation included. Only rank 0 shows it.
    """

    def __init__(self, name: str = "training", validator: Any = None, quiet: bool = False) -> None:
        self.name, self.validator, self.quiet = name, validator, quiet
        self.bar = _bar(TimeElapsedColumn(), TextColumn("{task.fields[text]}", markup=False))
        self._first, self._dice = 0, ""

    def attach(self, engine: Engine) -> None:
        if not self.quiet and idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=5), self.step)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)
            engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self.close)

    def start(self, engine: Engine) -> None:
        if not self.bar.tasks:
            self._first, total = engine.state.iteration, engine.state.max_epochs * engine.state.epoch_length
            self.bar.add_task(self.name, total=total, completed=self._first, text="")
            self.bar.start()

    def step(self, engine: Engine) -> None:
        state, (task,) = engine.state, self.bar.tasks
        pace = (task.elapsed or 0.0) / (state.iteration - self._first)
        left = timedelta(seconds=int(pace * (state.max_epochs * state.epoch_length - state.iteration)))
        loss = float(state.output["loss"].detach())
        text = f"epoch {state.epoch}/{state.max_epochs}  loss {loss:.3f}{self._dice}  {left} left"
        self.bar.update(task.id, completed=state.iteration, text=text)

    def epoch(self, engine: Engine) -> None:
        validated = self.validator is not None and self.validator.state.epoch == engine.state.epoch
        if validated:
            state = self.validator.state
            self._dice = f"  Dice {float(state.metrics[state.key_metric_name]):.3f}"
        self.step(engine)
        if self.bar.disable and (validated or engine.state.epoch == engine.state.max_epochs):
            self.bar.console.print(f"{self.name}: {self.bar.tasks[0].fields['text']}", soft_wrap=True)

    def close(self, engine: Engine, error: BaseException | None = None) -> None:
        self.bar.stop()
        for task in self.bar.task_ids:  # none is left for a federated client's next round
            self.bar.remove_task(task)
        if error is not None:
            raise error


class CountDisplay:
    """How many of a total are done. Nothing is shown for work that takes less than 3 seconds, or on ranks above 0."""

    PATIENCE, PAUSE = 3.0, 15.0  # seconds before the first sign, and between lines

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self.name, self.total, self.silent = name, total, quiet or idist.get_rank() > 0
        self.bar = _bar(MofNCompleteColumn(), TimeElapsedColumn(), transient=True)

    def __enter__(self) -> CountDisplay:
        self.due = monotonic() + self.PATIENCE
        self.task = self.bar.add_task(self.name, total=self.total)
        return self

    def show(self, done: int) -> None:
        self.bar.update(self.task, completed=done)
        if self.silent or monotonic() < self.due:
            return
        self.bar.start()
        if self.bar.disable:
            self.bar.console.print(f"{self.name}: {done}/{self.total}", soft_wrap=True)
            self.due = monotonic() + self.PAUSE

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
