"""The errors a person can mend: each message is a sentence that names the file and the cure."""

from __future__ import annotations


class MedsegError(Exception):
    """The input is at fault, not the program. The command line prints the message and exits with 2."""


class DataError(MedsegError):
    """A scan, label map or data set cannot be used as it is."""


class ConfigError(MedsegError):
    """A setting, recipe or plan is wrong or does not exist."""


class RunError(MedsegError):
    """A run folder is missing, incomplete, or not in the state a command needs."""
