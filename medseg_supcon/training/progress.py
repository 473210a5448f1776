"""The live display: one line that says how far training is, how good, and how long it will take."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import Any

from ignite.engine import Engine, Events
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from medseg_supcon.training.ranks import rank


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3600)
    ('1:15', '1:00:00')
    """
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _loss(engine: Engine) -> float:
    return float(engine.state.output["loss"].detach())


class ProgressDisplay:
    """A progress bar on a terminal, a line per validated epoch elsewhere (both on stderr).

    The time left counts validation and augmentation: it is the pace of the last epochs. Of several ranks the first
    one shows it.

    Args:
        name: what is trained, shown before the bar.
        validator: evaluator whose key metric is shown.
        quiet: show nothing.
    """

    def __init__(self, name: str = "training", validator: Any = None, quiet: bool = False) -> None:
        self.name, self.validator, self.quiet = name, validator, quiet
        self.console = Console(file=sys.stderr, markup=False)  # a data set's name may hold [brackets]
        self.live = self.console.is_terminal
        self.bar: Progress | None = None
        self._ends: deque[float] = deque(maxlen=6)
        self._dice = ""

    def attach(self, engine: Engine) -> None:
        if self.quiet or rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=5), self.step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self.close)

    def start(self, engine: Engine) -> None:
        """Open the bar with the first epoch."""
        if not self._ends:
            self._ends.append(monotonic())
        if self.live and self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]}{task.fields[dice]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            total = engine.state.max_epochs * engine.state.epoch_length
            self.task = self.bar.add_task(self.name, total=total, epoch="", loss="", dice="", left="")
            self.bar.start()

    def step(self, engine: Engine) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=engine.state.iteration,
                epoch=f"{engine.state.epoch}/{engine.state.max_epochs}",
                loss=f"{_loss(engine):.3f}",
                dice=self._dice,
                left=self._left(engine),
            )

    def epoch(self, engine: Engine) -> None:
        """Take the epoch's time and metric; without a terminal, print them."""
        self._ends.append(monotonic())
        validated = self.validator is not None and self.validator.state.epoch == engine.state.epoch
        if validated:
            state = self.validator.state
            self._dice = f"  Dice {float(state.metrics[state.key_metric_name]):.3f}"
        if not self.live and (validated or engine.state.epoch == engine.state.max_epochs):
            self.console.print(
                f"{self.name}: epoch {engine.state.epoch}/{engine.state.max_epochs}  loss {_loss(engine):.3f}{self._dice}"
                f"  {self._left(engine)}",
                soft_wrap=True,
                highlight=False,
            )

    def _left(self, engine: Engine) -> str:
        epochs = len(self._ends) - 1
        if epochs == 0:
            return "measuring the pace"
        pace = (self._ends[-1] - self._ends[0]) / epochs
        done = engine.state.iteration / engine.state.epoch_length
        return f"{clock(pace * (engine.state.max_epochs - done))} left"

    def close(self, engine: Engine, error: BaseException | None = None) -> None:
        """Leave the terminal as it was; pass an exception on."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if error is not None:
            raise error


class CountDisplay:
    """How many of so many are done: a bar on a terminal, elsewhere a line now and then, once it takes its time.

    Of several ranks the first one shows it.

    Args:
        name: what is done.
        total: how many there are.
        quiet: show nothing.

    Example:
        >>> with CountDisplay("preparing scans", 2) as display:
        ...     display.show(1)
    """

    PATIENCE, PAUSE = 3.0, 15.0  # seconds before the first sign, and between lines

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self.name, self.total, self.silent = name, total, quiet or rank() > 0
        self.console = Console(file=sys.stderr, markup=False, highlight=False)
        self.bar: Progress | None = None

    def __enter__(self) -> CountDisplay:
        self.due = monotonic() + self.PATIENCE
        return self

    def show(self, done: int) -> None:
        """So many are done."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)
        elif not self.silent and monotonic() >= self.due:
            if self.console.is_terminal:
                self.bar = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    console=self.console,
                    transient=True,
                )
                self.bar.add_task(self.name, total=self.total, completed=done)
                self.bar.start()
            else:
                self.console.print(f"{self.name}: {done}/{self.total}", soft_wrap=True)
                self.due = monotonic() + self.PAUSE

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
