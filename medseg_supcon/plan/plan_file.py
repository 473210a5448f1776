"""`plan.json` on disk, and what a plan edited by hand must keep to."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.errors import ConfigError, RunError

REQUIRED = (
    "name", "channels", "labels", "ignore_label", "orientation", "spacing", "intensity", "patch_size",
    "flip_axes", "batch_size", "steps_per_epoch", "epochs", "class_frequencies", "class_weights",
    "network_def", "inference", "keep_largest", "expected", "fingerprint",
)  # fmt: skip
OPTIONAL = ("trust_scan_affine",)
LARGEST = 1_000_000  # batch_size, steps_per_epoch, epochs


def read_plan(path: str | Path) -> dict[str, Any]:
    """A validated plan from its file.

    Raises:
        RunError: the file is missing.
        ConfigError: it is not JSON, or `validate_plan` finds a fault.
    """
    file = Path(path)
    try:
        plan = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RunError(
            f"{file}: there is no such plan. Make one with: medseg plan DATASET --out RUN"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file}: is not valid JSON ({error.msg}, line {error.lineno}). Correct it."
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, 5,000 digits, 10,000 levels
        raise ConfigError(f"{file}: cannot be read ({error}).") from None
    validate_plan(plan, source=file)
    return dict(plan)


def write_plan(plan: Mapping[str, Any], path: str | Path) -> None:
    """Write a plan as JSON that a person can read: one line for a list of numbers or a short mapping."""
    Path(path).write_text(_pretty(plan, 0) + "\n", encoding="utf-8")


def _pretty(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if (
        not isinstance(value, Mapping | list | tuple)
        or (depth > 0 and len(line) + 2 * depth <= 100)
        or not value
    ):
        return line
    pad = "  " * (depth + 1)
    if isinstance(value, Mapping):
        rows = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {_pretty(v, depth + 1)}" for key, v in value.items()
        ]
        start, end = "{}"
    else:
        rows = [_pretty(entry, depth + 1) for entry in value]
        start, end = "[]"
    return start + "\n" + ",\n".join(pad + row for row in rows) + "\n" + "  " * depth + end


def validate_plan(
    plan: object, *, divisor: int | Sequence[int] | None = None, source: str | Path = "plan.json"
) -> None:
    """Refuse a plan that training could not use, with the key at fault and what it must be.

    Args:
        plan: the content of `plan.json`.
        divisor: what the network's patch sizes must divide by, for all axes or per axis; None: not looked at.
        source: named in the message.

    Raises:
        ConfigError: a key is missing, unknown, of the wrong kind or out of range.
    """
    if not isinstance(plan, Mapping):
        raise ConfigError(f"{source}: must hold a JSON object, found {type(plan).__name__}.")
    missing = [key for key in REQUIRED if key not in plan]
    for key in plan:
        if key not in REQUIRED + OPTIONAL:
            near = difflib.get_close_matches(str(key), REQUIRED, n=1)
            raise ConfigError(
                f"{source}: knows no key {key!r}."
                + (f" Did you mean {near[0]!r}?" if near else " Remove it.")
            )
    if missing:
        raise ConfigError(f"{source}: the key {missing[0]!r} is missing. Add it, or make the plan anew.")

    def need(key: str, fits: bool, what: str) -> None:
        if not fits:
            raise ConfigError(
                f'{source}: "{key}" must be {what}, found {json.dumps(plan[key], default=str)[:80]}.'
            )

    channels, labels = plan["channels"], plan["labels"]
    need("name", isinstance(plan["name"], str), "a text")
    need("channels", _list_of(channels, str) and len(channels) > 0, "a list of channel names")
    values = list(labels.values()) if isinstance(labels, Mapping) else []
    need(
        "labels",
        len(values) >= 2 and all(_is_number(value) for value in values) and len(set(values)) == len(values),
        "a mapping of at least two class names to different values, background first",
    )
    ignore = plan["ignore_label"]
    need(
        "ignore_label",
        ignore is None or (_is_number(ignore) and ignore not in values),
        "null or a value of no class",
    )
    need("orientation", _is_orientation(plan["orientation"]), 'three axis codes such as "RAS"')
    need(
        "spacing",
        _list_of(plan["spacing"], float, 3) and min(plan["spacing"]) > 0 and max(plan["spacing"]) <= 100,
        "three lengths in mm, above 0 and at most 100",
    )
    intensity = plan["intensity"]
    need(
        "intensity",
        isinstance(intensity, list) and all(isinstance(t, Mapping) and "_target_" in t for t in intensity),
        'a list of transform configs, each with a "_target_"',
    )
    patch = plan["patch_size"]
    need("patch_size", _list_of(patch, int, 3) and min(patch) > 0, "three whole numbers above 0")
    if divisor is not None:
        by = [divisor] * 3 if isinstance(divisor, int) else [int(n) for n in divisor]
        rounded = [math.ceil(n / d) * d for n, d in zip(patch, by, strict=True)]
        need(
            "patch_size",
            rounded == patch,
            f"divisible by {by} for this network (such as {rounded})",
        )
    axes = plan["flip_axes"]
    need("flip_axes", _list_of(axes, int) and set(axes) <= {0, 1, 2}, "a list of axes among 0, 1 and 2")
    for key in ("batch_size", "steps_per_epoch", "epochs"):
        fits = _is_number(plan[key], int) and 0 < plan[key] <= LARGEST
        need(key, fits, f"a whole number from 1 to {LARGEST}")
    for key in ("class_frequencies", "class_weights"):
        fits = _list_of(plan[key], float, len(values)) and min(plan[key]) >= 0
        need(key, fits, f"{len(values)} numbers of at least 0, one for each class")
    definition = plan["network_def"]
    need(
        "network_def",
        (isinstance(definition, Mapping) and "_target_" in definition)
        or (isinstance(definition, str) and definition.startswith("$")),
        'a mapping with a "_target_" or an expression that starts with "$"',
    )
    window = plan["inference"]
    need("inference", isinstance(window, Mapping), "a mapping")
    overlap, batch = window.get("overlap"), window.get("sw_batch_size")
    need(
        "inference", _is_number(overlap) and 0 <= overlap < 1, 'given an "overlap" of at least 0 and below 1'
    )
    need("inference", _is_number(batch, int) and batch > 0, 'given a whole "sw_batch_size" above 0')
    keep = plan["keep_largest"]
    need(
        "keep_largest",
        _list_of(keep, str) and set(keep) <= set(labels),
        f"a list of classes among {list(labels)}",
    )
    for key in ("expected", "fingerprint"):
        need(key, isinstance(plan[key], Mapping), "a mapping")


def _is_number(value: object, kind: type = float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (kind is float or isinstance(value, int))


def _list_of(value: object, kind: type, length: int | None = None) -> bool:
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        return False
    return all(isinstance(v, str) if kind is str else _is_number(v, kind) for v in value)


def _is_orientation(value: object) -> bool:
    pairs = ("LR", "PA", "IS")
    return (
        isinstance(value, str)
        and len(value) == 3
        and sorted(next((i for i, pair in enumerate(pairs) if code in pair), 9) for code in value)
        == [0, 1, 2]
    )
