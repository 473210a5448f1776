"""`plan.json` on disk, and the rules that a plan edited by hand must keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_supcon.errors import ConfigError, RunError, nearest
from medseg_supcon.files import LARGEST, read_json
from medseg_supcon.plan.segments import are_segments

AXES = ({"L", "R"}, {"P", "A"}, {"I", "S"})


def _is_number(value: object, kind: type = float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST and (kind is float or isinstance(value, int))  # NaN compares as False


def _is_whole(value: object, most: int) -> bool:
    return _is_number(value, int) and 0 < value <= most  # type: ignore[operator]


def _list_of(value: object, kind: type, length: int | None = None) -> bool:
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        return False
    return all(isinstance(v, str) if kind is str else _is_number(v, kind) for v in value)


def _is_orientation(value: object) -> bool:
    codes = value if isinstance(value, str) and len(value) == 3 else ""
    return all(sum(code in pair for code in codes) == 1 for pair in AXES)


def _are_labels(value: object) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else []
    return len(values) >= 2 and all(map(_is_number, values)) and len(set(values)) == len(values)


def _is_network(value: object) -> bool:
    return "_target_" in value if isinstance(value, Mapping) else str(value).startswith("$")


def _is_window(value: object) -> bool:
    window: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    overlap = window.get("overlap", -1)
    return _is_number(overlap) and 0 <= overlap < 1 and _is_whole(window.get("sw_batch_size"), 1024)


Rule = tuple[str, Callable[[Any], bool]]  # what the value must be, and whether it is
RULES: dict[str, Rule] = {
    "name": ("a text", lambda v: isinstance(v, str)),
    "channels": ("a list of channel names", lambda v: _list_of(v, str) and len(v) > 0),
    "labels": ("a mapping of at least two class names to different values, background first", _are_labels),
    "ignore_label": ("null or a value of no class", lambda v: v is None or _is_number(v)),
    "orientation": ('three axis codes such as "RAS"', _is_orientation),
    "spacing": (
        "three lengths in mm from 0.0001 to 100",
        lambda v: _list_of(v, float, 3) and all(1e-4 <= mm <= 100 for mm in v),
    ),
    "intensity": (
        'a list of transform configs, each with a "_target_"',
        lambda v: isinstance(v, list) and all(isinstance(t, Mapping) and "_target_" in t for t in v),
    ),
    "patch_size": (
        "three whole numbers from 1 to 1024",
        lambda v: _list_of(v, int, 3) and all(_is_whole(n, 1024) for n in v),
    ),
    "flip_axes": ("a list of axes among 0, 1 and 2", lambda v: _list_of(v, int) and set(v) <= {0, 1, 2}),
    "batch_size": ("a whole number from 1 to 1024", lambda v: _is_whole(v, 1024)),
    **dict.fromkeys(
        ("steps_per_epoch", "epochs"), ("a whole number from 1 to 1,000,000", lambda v: _is_whole(v, 10**6))
    ),
    **dict.fromkeys(("class_frequencies", "class_weights"), ("a list of numbers", lambda v: _list_of(v, float))),
    "network_def": ('a mapping with a "_target_" or an expression that starts with "$"', _is_network),
    "inference": ('an "overlap" from 0 to below 1 and a "sw_batch_size" from 1 to 1024', _is_window),
    "keep_largest": ("a list of class names", lambda v: _list_of(v, str)),
    **dict.fromkeys(("expected", "fingerprint"), ("a mapping", lambda v: isinstance(v, Mapping))),
}
SEGMENTS = (
    'a mapping of foreground classes to a "category", a "type" and, if there is one, a "laterality" and a "region", each a '
    'code such as "SCT:10200004 Liver"'
)
OPTIONAL = ("trust_scan_affine", "segments")


def read_plan(path: str | Path) -> dict[str, Any]:
    """A validated plan from its file; `RunError` if it is missing, `ConfigError` if it is damaged or invalid."""
    file = Path(path)
    if not file.exists():
        raise RunError(f"{file}: there is no such plan. Make one with: medseg plan DATASET --out RUN")
    plan = read_json(file, ConfigError)
    validate_plan(plan, source=file)
    return plan


def write_plan(plan: Mapping[str, Any], path: str | Path) -> None:
    """Write a plan as JSON that a person can read: a list of numbers or a short mapping takes one line."""
    Path(path).write_text(_pretty(plan, 0) + "\n", encoding="utf-8")


def _pretty(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, Mapping | list | tuple) or (depth > 0 and len(line) + 2 * depth <= 100):
        return line
    names = [json.dumps(str(key), ensure_ascii=False) + ": " for key in value] if isinstance(value, Mapping) else None
    parts = value.values() if isinstance(value, Mapping) else value
    rows = [_pretty(part, depth + 1) for part in parts]
    rows = [name + row for name, row in zip(names, rows, strict=True)] if names else rows
    start, end = "{}" if names else "[]"
    return start + "".join(f"\n{'  ' * (depth + 1)}{row}," for row in rows)[:-1] + f"\n{'  ' * depth}{end}"


def validate_plan(
    plan: object, *, divisor: int | Sequence[int] | None = None, source: str | Path = "plan.json"
) -> None:
    """Refuse a plan that training could not use, with the key at fault and what it must be.

    `divisor`: what the network's patch sizes must divide by, for all axes or per axis; None: not checked.

    Raises:
        ConfigError: a key is missing, unknown, of the wrong kind or out of range.
    """
    if not isinstance(plan, Mapping):
        raise ConfigError(f"{source}: must hold a JSON object, found {type(plan).__name__}.")
    for key in plan:
        if key not in RULES and key not in OPTIONAL:
            near = nearest(key, RULES)
            hint = f"Did you mean {near!r}?" if near else "Remove it."
            raise ConfigError(f"{source}: the key {key!r} is not known. {hint}")
    missing = [key for key in RULES if key not in plan]
    if missing:
        raise ConfigError(f"{source}: the key {missing[0]!r} is missing. Add it, or make a new plan.")

    def need(key: str, fits: bool, what: str) -> None:
        if not fits:
            found = json.dumps(plan[key], default=str)[:80]
            raise ConfigError(f'{source}: "{key}" must be {what}, found {found}.')

    for key, (what, fits) in RULES.items():
        need(key, fits(plan[key]), what)
    labels, patch = plan["labels"], plan["patch_size"]
    need("ignore_label", plan["ignore_label"] not in labels.values(), RULES["ignore_label"][0])
    for key in ("class_frequencies", "class_weights"):
        fits_classes = len(plan[key]) == len(labels) and min(plan[key]) >= 0
        need(key, fits_classes, f"{len(labels)} numbers of at least 0, one for each class")
    need("keep_largest", set(plan["keep_largest"]) <= set(labels), f"a list of classes among {list(labels)}")
    need("segments", are_segments(plan.get("segments", {}), list(labels)[1:]), SEGMENTS)
    if divisor is not None:
        by = [divisor] * 3 if isinstance(divisor, int) else [int(n) for n in divisor]
        rounded = [math.ceil(n / d) * d for n, d in zip(patch, by, strict=True)]
        need("patch_size", rounded == list(patch), f"divisible by {by} for this network (such as {rounded})")


def plan_warnings(plan: Mapping[str, Any]) -> list[str]:
    """Warnings on structures that may vanish at the plan's spacing: below two voxels, as nearest neighbour resamples."""
    warnings = []
    voxel = math.prod(plan["spacing"])
    for name, least in plan["fingerprint"].get("smallest", {}).items():
        left = least["mm3"] / voxel
        if left < 2 and left < 0.99 * least["voxels"]:
            plural = "s" if least["voxels"] > 1 else ""
            spacing = " x ".join(f"{mm:.3g}" for mm in plan["spacing"])
            warnings.append(
                f"the smallest {name!r} (case {least['case']}: {least['voxels']} voxel{plural}, {least['mm3']:.3g} mm3) has "
                f"about {left:.2g} voxels at the plan's spacing of {spacing} mm and may vanish. Plan with a finer "
                "spacing: --set plan::spacing=[X,Y,Z]."
            )
    return warnings
