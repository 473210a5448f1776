"""Files that appear whole or not at all, what a killed process leaves of them, and folders for one at a time."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from medseg_supcon.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".medseg-"
OLD = 24 * 3600.0  # seconds after which a file counts as left behind where there are no locks
_held: set[int] = set()  # handles of the folders that this process is alone in


def temporary_name(folder: Path) -> Path:
    """A name that no other process has, in this container or another."""
    return folder / f"{PREFIX}{secrets.token_hex(8)}.tmp"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file that appears whole or not at all: written beside its place, then moved there."""
    while True:
        temporary = temporary_name(path.parent)
        try:
            with temporary.open("xb") as file:
                _lock(file)
                if not temporary.exists():  # another process took it for a leftover before it was locked
                    continue
                write(file)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # while it is locked
                    os.replace(temporary, path)  # what the fault injection of the tests replaces
            if fcntl is None:  # Windows moves no open file
                os.replace(temporary, path)
            return
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8 that appears whole or not at all; its folder is made, and rid of leftovers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    # half a character (a lone surrogate) as its escape, which is also that of JSON
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A table that appears whole or not at all. None is an empty field; what no column asks for is left out."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        RunError: it is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: is {path.parents[1]} a run?") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON (line {error.lineno}): {error.msg}.") from None
    except (OSError, ValueError, RecursionError) as error:  # no text, numbers of 5,000 digits, 10,000 levels
        raise RunError(f"{path} cannot be read ({error}).") from None


def remove_leftovers(folder: Path) -> None:
    """Removes our temporary files that no process has open any more."""
    for path in folder.glob(f"{PREFIX}*.tmp"):
        with suppress(OSError):
            if fcntl is None:
                if _is_old(path):
                    path.unlink()
                continue
            with path.open("rb") as file:
                if _lock(file, wait=False):
                    path.unlink(missing_ok=True)


def _lock(file: IO[bytes], wait: bool = True) -> bool:
    """Locks an open file, until it is closed or the process ends. False: another has it, or may have it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network drive without locks
        return _is_old(Path(file.name))
    return True


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > OLD


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """No other process in here at the same time, where folders can be locked.

    A process that ends, however, holds no lock any more.

    Args:
        folder: what is locked.
        wait: until the other process is out. Else False is what it gives while another is in.
    """
    with ExitStack() as stack:
        free = True
        if fcntl is not None:
            with suppress(OSError):  # a network drive
                handle = os.open(folder, os.O_RDONLY)
                _held.add(handle)
                stack.callback(_leave, handle, partial(fcntl.flock, handle, fcntl.LOCK_UN))
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
        yield free


def _leave(handle: int, unlock: Callable[[], None]) -> None:
    if handle in _held:  # not in a forked process
        _held.remove(handle)
        with suppress(OSError):  # nothing could be locked
            unlock()
        os.close(handle)


def _close_held() -> None:
    """In a forked process, which would hold the lock on when this one is killed: a loader's worker lives 5 s longer."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_held)
