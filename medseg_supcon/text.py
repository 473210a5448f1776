"""Words for people: counts, suggestions, and names that Markdown or a spreadsheet would take for something else."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
