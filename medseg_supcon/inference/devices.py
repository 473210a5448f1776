"""Scans shared out to several devices: one process for each, all under one manifest."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

from medseg_supcon.errors import DataError, MedsegError
from medseg_supcon.scans import Scan
from medseg_supcon.text import exit_problem

Entry = dict[str, Any]
Report = Callable[[Scan, Entry | BaseException], None]
# In a process: predicts the scans that it is given, one after another, and reports each.
Predict = Callable[[Iterator[Scan], Report], None]
IN_HAND = 3  # scans of a process at a time: one is being written, one segmented, one read
STARTED = "started"


def share_out(devices: Sequence[str], start: Callable[[str], Predict], scans: Sequence[Scan], report: Report) -> None:
    """Predict scans in one process per device; ``report`` is called here, as they are finished.

    Args:
        start: picklable; called in each process with its device.

    A process that ends early costs the scans that it had in hand: each is reported as a DataError, and the other processes
    take the rest. After Ctrl-C each process still finishes the mask that it is writing. A MedsegError of ``start`` is raised.
    """
    context, waiting = get_context("spawn"), list(reversed(scans))
    workers: dict[Connection, _Worker] = {}
    threads = max(1, torch.get_num_threads() // max(1, devices.count("cpu")))
    try:
        for device in devices[: len(scans)]:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, device, threads, start))
            with _ignoring_ctrl_c():
                process.start()
            there.close()
            workers[here] = _Worker(device, process)
        for _ in range(IN_HAND):  # the first scans in turn, so that a few scans are on all devices
            for connection, worker in workers.items():
                _give(connection, worker, waiting)
        while workers:
            for connection in map(_as_connection, wait(list(workers))):
                _hear(connection, workers, waiting, report)
        for scan in reversed(waiting):
            report(scan, DataError(f"{scan.source}: not predicted, because the processes of all devices ended early."))
    except BaseException:
        for worker in workers.values():
            worker.process.terminate()
        waiting.clear()
        while workers:  # what they finish
            for connection in map(_as_connection, wait(list(workers))):
                with suppress(MedsegError):
                    _hear(connection, workers, waiting, report, stopped=True)
        raise


@dataclass
class _Worker:
    device: str
    process: Any
    in_hand: list[Scan] = field(default_factory=list)


def _as_connection(ready: Any) -> Connection:
    return ready  # type: ignore[no-any-return]


def _give(connection: Connection, worker: _Worker, waiting: list[Scan]) -> None:
    """Give a process its next scan, or say that there are no more."""
    with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which `_hear` notices
        connection.send(waiting[-1] if waiting else None)
    if waiting:
        worker.in_hand.append(waiting.pop())


def _hear(
    connection: Connection,
    workers: dict[Connection, _Worker],
    waiting: list[Scan],
    report: Report,
    stopped: bool = False,
) -> None:
    """Take one message of a process: a result, an error of its start, or its end."""
    worker = workers[connection]
    try:
        name, outcome = connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        connection.close()
        del workers[connection]
        why = exit_problem(worker.process.exitcode, None).replace("see above", "it failed: see above")
        for scan in () if stopped else worker.in_hand:
            lost = f"{scan.source}: the process on {worker.device} ended while it had this scan"
            report(scan, DataError(f"{lost} ({why}). Run the same command again to try it once more."))
        return
    if name is None:
        raise outcome
    scan = next(scan for scan in worker.in_hand if scan.name == name)
    worker.in_hand.remove(scan)
    report(scan, outcome if isinstance(outcome, dict) else DataError(outcome))
    _give(connection, worker, waiting)


def _work(connection: Connection, device: str, threads: int, start: Callable[[str], Predict]) -> None:
    """The process of a device."""
    signal.signal(signal.SIGTERM, _interrupt)
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # those of third parties are not for a person at a terminal
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        try:
            predict = start(device)
        except MedsegError as error:
            connection.send((None, error))
            return

        def report(scan: Scan, outcome: Entry | BaseException) -> None:
            connection.send((scan.name, outcome if isinstance(outcome, dict) else str(outcome)))

        predict(_scans(connection), report)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # without waiting for a thread that reads ahead
    finally:
        connection.close()


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """A process that starts meanwhile ignores Ctrl-C, which reaches all: the first process passes it on as SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _scans(connection: Connection) -> Iterator[Scan]:
    """The scans that the first process gives, until it says None or ends."""
    with suppress(EOFError):
        while (scan := connection.recv()) is not None:
            yield scan
