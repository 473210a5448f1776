"""Files of weights, read as tensors and plain values alone."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from medseg_supcon.errors import RunError


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """Load a file of tensors and plain values; nothing in it is run, whatever `--trust` says.

    Raises:
        RunError: the file is missing, cannot be read, is damaged, holds anything else, or NaN or infinite values.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused right after
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{path} does not exist. Train the run first: medseg train DATASET --out RUN."
        ) from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is None:
            raise RunError(f"{path} is damaged: {error}. Copy it again.") from error
        raise RunError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            raise RunError(  # not torch's words, which tell a person how to run what is in the file
                f"{path} is damaged or holds more than weights, and was not loaded: such a file can run any code. "
                "Get the weights (a state dict) from a source that you trust."
            ) from error
        raise RunError(f"{path} is damaged or not a file of weights: {reason[:200]}.") from error
    if (name := _not_finite(content)) is not None:
        raise RunError(f"{path} holds NaN or infinite values{name}. Copy it again, or train the run again.")
    return content


def _not_finite(value: Any, name: str = "") -> str | None:
    """Where a NaN or infinite value is, ``" in x.y"``; None if all tensors are finite."""
    if isinstance(value, torch.Tensor):
        finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
        return None if finite else name and f" in {name}"
    if isinstance(value, Mapping):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return None
    places = (_not_finite(part, f"{name}.{key}" if name else str(key)) for key, part in parts)
    return next((place for place in places if place is not None), None)
