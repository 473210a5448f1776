"""Files that appear whole or not at all, leftovers of killed processes, and folder locks."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from medseg_supcon.errors import MedsegError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".medseg-"
MOST_LEVELS = 100  # of JSON
LARGEST = 2**63  # whole number that fits into 64 bits
HALF_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # not the bytes of a file name that is not text
OLD = 24 * 3600.0  # seconds after which a file counts as left behind where there are no locks
LOCK = ".medseg.lock"


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
    """A table that appears whole or not at all. None is an empty field; keys that are not columns are left out."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(_csv_cell(column) for column in columns)
    writer.writerows([_csv_cell(row.get(column)) for column in columns] for row in rows)
    write_text(path, stream.getvalue())


def _csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula (``=cmd``) gets an apostrophe in front; numbers stay numbers."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    with suppress(ValueError):
        float(value)
        return value
    return f"'{value}"


def read_json(path: Path, error: type[MedsegError] = RunError) -> dict[str, Any]:
    """The object in a JSON file in UTF-8, with nothing in it that other programs read differently or cannot write.

    Raises:
        MedsegError: (of the type ``error``) the file is missing, empty, not UTF-8, not JSON or not an object, or holds a
            key twice, NaN, a number beyond 64 bits, half a character, or more than 100 levels.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            raise error(f"{path}: holds the key {twice!r} twice in one object. Remove one of the two.")
        return content

    def refuse(word: str) -> None:
        raise error(f"{path}: holds {word}, which is not a JSON value. Replace it by a number or null.")

    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse) if text.strip() else None
    except FileNotFoundError:
        raise error(f"{path} does not exist. Check the path.") from None
    except json.JSONDecodeError as fault:
        where = f"{fault.msg}, line {fault.lineno}"
        raise error(f"{path} is not valid JSON ({where}). Check the commas there, and use double quotes.") from None
    except UnicodeDecodeError:
        raise error(f"{path}: is not text in UTF-8. Save it as UTF-8 (not UTF-16, not Latin-1).") from None
    except RecursionError:
        raise error(f"{path}: is nested more than {MOST_LEVELS} levels deep. Correct the file.") from None
    except ValueError:  # int() of more than 4,300 digits
        raise error(f"{path}: holds a whole number that is too long. Correct it.") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror}). Check its permissions.") from None
    if not isinstance(content, dict):
        what = type(content).__name__ if text.strip() else "an empty file"
        raise error(f"{path}: must hold a JSON object ({{...}}), found {what}.")
    if (problem := _unwritable(content)) is not None:
        raise error(f"{path}: {problem}. Correct the file.")
    return content


def _unwritable(content: dict[str, Any]) -> str | None:
    stack: list[tuple[Any, int]] = [(content, 1)]
    while stack:
        value, level = stack.pop()
        if level > MOST_LEVELS:
            return f"is nested more than {MOST_LEVELS} levels deep"
        if isinstance(value, dict):
            stack += [(part, level + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            stack += [(part, level + 1) for part in value]
        elif isinstance(value, str) and HALF_CHARACTER.search(value):
            return f"holds half a character (a lone surrogate) in {ascii(value)[:60]}"
        elif isinstance(value, int) and abs(value) > LARGEST:
            return f"holds a whole number of {len(str(abs(value)))} digits"
        elif isinstance(value, float) and not math.isfinite(value):
            return "holds a number that is too large"
    return None


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
def folder_lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes out of a folder while the block runs; the lock ends with the process, however it ends.

    The lock is the file ``.medseg.lock``; a folder that cannot hold it (read-only, say) is not locked. Without ``wait``
    the block gets False while another process holds the lock.
    """
    lock = FileLock(folder / LOCK, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows deletes no open file
            (folder / LOCK).unlink()  # a process that waits for the deleted file notices and tries again
        lock.release()
