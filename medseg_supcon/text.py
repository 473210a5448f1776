"""Helpers for messages: counts, suggestions for misspelt names, escaping for Markdown, and how a process ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medseg_supcon.errors import nearest

MARKDOWN_SIGNS = re.compile(r"([\\`*|\[\]])")


def counted(number: int, what: str) -> str:
    """A number of things in words: 1 epoch, 3 test scans."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def suggestion(name: object, known: Iterable[object]) -> str:
    """The nearest known name, or all of them.

    >>> suggestion("seed", ["seeds", "labels"]), suggestion("x", ["seeds", "labels"])
    ('Did you mean seeds?', 'Known: seeds, labels.')
    """
    names = [str(option) for option in known]
    near = nearest(name, names)
    return f"Did you mean {near}?" if near else f"Known: {', '.join(names)}."


def markdown_text(value: Any) -> Any:
    """A text that Markdown shows as it is, on one line; other values stay as they are. A jinja ``finalize`` function.

    >>> print(markdown_text("a|b\\n<script> `x`"), markdown_text(3))
    a\\|b &lt;script> \\`x\\` 3
    """
    if not isinstance(value, str):
        return value
    return MARKDOWN_SIGNS.sub(r"\\\1", re.sub(r"\s*[\r\n]+\s*", " ", value)).replace("<", "&lt;")


def exit_problem(code: int, log: Path | None) -> str:
    """What went wrong in one of our processes, from its exit code and the last line of its log ("": nothing).

    >>> exit_problem(-9, None)
    'it was stopped by SIGKILL; perhaps memory ran out'
    """
    if code < 0:  # the process itself says nothing
        return f"it was stopped by {signal.Signals(-code).name}; perhaps memory ran out"
    if code == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines() if log else ["see above"]
    return lines[-1].removeprefix("medseg: ") if lines else f"see {log}"
