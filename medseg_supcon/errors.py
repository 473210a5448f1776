"""The errors that a person can fix: each message is a sentence that names the file and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedsegError(Exception):
    """The input is at fault, not the program. The command line prints the message and exits with 2."""


class DataError(MedsegError):
    """A scan, label map or data set cannot be used as it is."""


class ConfigError(MedsegError):
    """A setting, recipe or plan is wrong or does not exist."""


class RunError(MedsegError):
    """A run folder is missing, incomplete, or not in the state a command needs."""


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known name that is most like `name`, whatever the case of its letters; None if none is.

    >>> nearest("Patch_sise", ["spacing", "patch_size"]), nearest("x", ["spacing"])
    ('patch_size', None)
    """
    names = {str(entry).lower(): str(entry) for entry in known}
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=cutoff)
    return names[near[0]] if near else None
