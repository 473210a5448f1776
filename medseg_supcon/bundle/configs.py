"""Faults in a config, told as a sentence instead of MONAI's chain of wrapped errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from medseg_supcon.errors import ConfigError, MedsegError

OURS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ModuleNotFoundError)


def innermost(error: BaseException) -> BaseException:
    """The error that began the chain; one of ours, wherever in it."""
    chain, current = [error], error
    while (following := current.__cause__ or current.__context__) is not None and following not in chain:
        chain.append(following)
        current = following
    return next((e for e in chain if isinstance(e, MedsegError)), chain[-1])


@contextlib.contextmanager
def settings_at_fault() -> Iterator[None]:
    """Whatever goes wrong inside is the settings' fault: a ``ConfigError`` that says what.

    Out of memory and interruptions pass as they are.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OURS as error:
        cause = innermost(error)
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        said = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0].rstrip(" .:")
        raise ConfigError(
            f"The settings cannot be used: {said}. Check what this names, --set, the recipe, "
            "and the run's configs/train.yaml and configs/plan.json."
        ) from error
