"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3600)
    ('1:15', '1:00:00')
    """
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _console() -> Console:
    return Console(file=sys.stderr, markup=False, highlight=False)  # a data set's name may hold [brackets]


class ProgressDisplay:
    """Epoch, loss, Dice and time left of a training: a bar on a terminal, elsewhere a line per validated epoch.

    The time left follows from the last five epochs, validation included. Only rank 0 shows it.

    Args:
        name: shown before the bar.
        validator: evaluator whose key metric is shown.
    """

    def __init__(self, name: str = "training", validator: Any = None, quiet: bool = False) -> None:
        self.name, self.validator, self.quiet = name, validator, quiet
        self.console = _console()
        self.bar: Progress | None = None
        self._ends: deque[float] = deque(maxlen=6)
        self._dice = ""

    def attach(self, engine: Engine) -> None:
        if self.quiet or idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=5), self.step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self.close)

    def start(self, engine: Engine) -> None:
        if not self._ends:
            self._ends.append(monotonic())
        if self.console.is_terminal and self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar.add_task(self.name, total=total, state="", left="")
            self.bar.start()

    def step(self, engine: Engine) -> None:
        if self.bar is not None:
            done, state, left = engine.state.iteration, self._state(engine), self._left(engine)
            self.bar.update(self.bar.task_ids[0], completed=done, state=state, left=left)

    def epoch(self, engine: Engine) -> None:
        """Take the epoch's time and metric; without a terminal, print them."""
        self._ends.append(monotonic())
        validated = self.validator is not None and self.validator.state.epoch == engine.state.epoch
        if validated:
            state = self.validator.state
            self._dice = f"  Dice {float(state.metrics[state.key_metric_name]):.3f}"
        last = engine.state.epoch == engine.state.max_epochs
        if not self.console.is_terminal and (validated or last):
            line = f"{self.name}: {self._state(engine)}  {self._left(engine)}"
            self.console.print(line, soft_wrap=True)

    def _state(self, engine: Engine) -> str:
        loss = float(engine.state.output["loss"].detach())
        return f"epoch {engine.state.epoch}/{engine.state.max_epochs}  loss {loss:.3f}{self._dice}"

    def _left(self, engine: Engine) -> str:
        if len(self._ends) < 2:
            return "measuring the speed"
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        done = engine.state.iteration / engine.state.epoch_length
        return f"{clock(pace * (engine.state.max_epochs - done))} left"

    def close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if error is not None:
            raise error


class CountDisplay:
    """How many of a total are done. Nothing is shown for work that takes less than 3 seconds, or on ranks above 0.

    Example:
        >>> with CountDisplay("preparing scans", 2) as display:
        ...     display.show(1)
    """

    PATIENCE, PAUSE = 3.0, 15.0  # seconds before the first sign, and between lines

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self.name, self.total, self.silent = name, total, quiet or idist.get_rank() > 0
        self.console = _console()
        self.bar: Progress | None = None

    def __enter__(self) -> CountDisplay:
        self.due = monotonic() + self.PATIENCE
        return self

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)
        elif self.silent or monotonic() < self.due:
            return
        elif self.console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.add_task(self.name, total=self.total, completed=done)
            self.bar.start()
        else:
            self.console.print(f"{self.name}: {done}/{self.total}", soft_wrap=True)
            self.due = monotonic() + self.PAUSE

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
