"""The values of `plan.json`: by which rules they follow from a data set, and what one edited by hand must keep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from medseg_supcon.datasets import Dataset, Fingerprint, output_channels, readable, target_names
from medseg_supcon.errors import ConfigError, DataError, RunError, nearest
from medseg_supcon.files import LARGEST, read_json, write_text
from medseg_supcon.losses import balanced_class_weights
from medseg_supcon.plan.preprocessing import intensity_transforms
from medseg_supcon.plan.segments import are_segments, segment_codes
from medseg_supcon.text import counted

CPU_STEPS, GPU_STEPS = 4000, 15000  # the default length; docs/results.md has the minutes of the CPU's
CPU_PATCH_VOXELS, GPU_PATCH_VOXELS = 90_000, 128**3
GPU_GIB_PER_LARGEST_SCAN = 8.0  # two views of one scan at 128^3, mixed precision
SIDED = re.compile(  # kidney_left, Left Kidney, leftKidney, KidneyLeft, LKidney; not bright, cleft, LV
    r"(?<![a-z])(left|right)|(?<![a-z])(lh|rh|l|r|lt|rt|sin|dext?)(?![a-z])"
    r"|(?<=[a-z])(Left|Right|LH|RH)\b|(?<![A-Za-z])[LR](?=[A-Z][a-z])"
)
ANISOTROPIC, SMALLEST_EDGE, MOST_PATCHES_ON_CPU, MOST_CHANNELS = 3.0, 4, 64, 320
LEAST_STEPS = 2  # DynUNet has three levels or more
Floats = npt.NDArray[np.float64]


def default_epochs(device: str, steps_per_epoch: int) -> int:
    """Length of a training on a CPU or a GPU, whatever its speed."""
    return max(1, round((CPU_STEPS if device.startswith("cpu") else GPU_STEPS) / steps_per_epoch))


def make_plan(
    fingerprint: Fingerprint, dataset: Dataset, *, device: str = "cpu", memory_gib: float | None = None
) -> dict[str, Any]:
    """The content of `plan.json` (keys and meaning: docs/architecture.md), the same whatever the machine's load.

    Orientation RAS. Spacing: the median; along the coarse axis of anisotropic data (ratio above 3) the 10th percentile.
    On a CPU the finest axes are coarsened until a scan of median size holds at most 64 patches. Patch: grown axis by
    axis, isotropic in mm, up to the median scan within 90,000 voxels (CPU) or 128^3 (GPU, by memory), in steps of what
    the network divides by. Network: nnU-Net's UNet of three strides, more for larger patches, no stride along an axis
    that is still twice as coarse as the finest. The left-right axis may be mirrored unless a class name says left or
    right; no other axis may. Length: 80 epochs of 50 steps on a CPU, 60 of 250 on a GPU.
    `memory_gib`: the GPU's; None for that of this machine. `DataError` if no case has a labelled structure.
    """
    on_gpu = not device.startswith("cpu")
    memory = memory_gib or 2 * GPU_GIB_PER_LARGEST_SCAN
    if memory_gib is None and device.startswith("cuda") and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.device(device)).total_memory / 2**30
    budget = int(GPU_PATCH_VOXELS * min(1.0, memory / (2 * GPU_GIB_PER_LARGEST_SCAN))) if on_gpu else CPU_PATCH_VOXELS
    counts = fingerprint.class_voxels
    if counts[1:].sum() == 0:
        raise DataError(
            f"{dataset.root}: the label maps of the training cases contain no structure. Add labelled cases."
        )

    spacing = target_spacing(fingerprint.spacings)
    extents = fingerprint.shapes * fingerprint.spacings
    if not on_gpu:
        spacing = coarsened(spacing, np.median(extents, axis=0), budget)
    spacing = np.array([readable(mm) for mm in spacing])
    shape = np.median(np.round(extents / spacing), axis=0)
    side = float(np.prod(np.minimum(shape, budget ** (1 / 3))) ** (1 / 3))
    steps = strides(spacing, shape, levels=3 if side < 64 else 4 if side < 112 else 5)
    patch = patch_size(spacing, shape, budget, np.prod(steps, axis=0))
    scans_in_memory = memory / GPU_GIB_PER_LARGEST_SCAN * GPU_PATCH_VOXELS / math.prod(patch)
    steps_per_epoch = 250 if on_gpu else 50
    foreground = [fingerprint.foreground(c) for c in range(len(dataset.channels))]
    # a mirrored scan would be labelled wrongly
    meaning = dataset.label_plan
    targets, outputs = target_names(meaning), output_channels(meaning)
    names = (*dataset.labels, *targets)
    sided = any(SIDED.search(name.replace("_", " ").lower()) or SIDED.search(name) for name in names)
    return {
        "name": dataset.name,
        "channels": list(dataset.channels),
        **meaning,
        "segments": segment_codes(targets),
        "orientation": "RAS",
        "spacing": [float(mm) for mm in spacing],
        "intensity": intensity_transforms(dataset.channels, foreground),
        "patch_size": patch,
        "flip_axes": [] if sided else [0],
        "batch_size": int(np.clip(scans_in_memory, 2, 8)) if on_gpu else 2,
        "steps_per_epoch": steps_per_epoch,
        "epochs": default_epochs(device, steps_per_epoch),
        "class_frequencies": [readable(n / counts.sum()) for n in counts],
        "class_weights": [readable(w) for w in balanced_class_weights(counts.tolist()).tolist()],
        "network_def": network_definition(len(dataset.channels), outputs, spacing, steps, 32 if on_gpu else 16),
        "inference": {"overlap": 0.5, "sw_batch_size": 4},
        "keep_largest": [],
        "fingerprint": fingerprint.summary(),
    }


def target_spacing(spacings: Floats) -> Floats:
    """nnU-Net's rule (Isensee et al., Nature Methods 2021): the median (3,) of spacings (n, 3), or less on a coarse axis."""
    target = np.median(spacings, axis=0)
    coarse = int(np.argmax(target))
    if target[coarse] > ANISOTROPIC * target.min():
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), np.delete(target, coarse).max())
    return target.astype(np.float64)


def coarsened(spacing: Floats, extent: Floats, budget: int) -> Floats:
    """Spacing at which a scan of `extent` mm has at most 64 patches of `budget` voxels; the finest axes change first."""
    finest, voxel = np.sort(spacing), np.prod(extent) / (MOST_PATCHES_ON_CPU * budget)
    floor = 0.0
    for axes in (1, 2, 3):  # how many of them get one spacing
        floor = float(voxel / np.prod(finest[axes:])) ** (1 / axes)
        if axes == 3 or floor <= finest[axes]:
            break
    return np.maximum(spacing, floor)


def strides(spacing: Floats, shape: Floats, levels: int) -> list[tuple[int, int, int]]:
    """Strides of the encoder's levels: axes are halved that are at most twice as coarse as the finest and keep 4 voxels."""
    spacing, shape = spacing.copy(), shape.copy()
    steps: list[tuple[int, int, int]] = []
    for _ in range(levels):
        halve = fine(spacing) & (shape / 2 >= SMALLEST_EDGE)
        step = np.where(halve, 2, 1)
        if len(steps) >= LEAST_STEPS and not halve.any():
            break
        steps.append((int(step[0]), int(step[1]), int(step[2])))
        spacing, shape = spacing * step, shape / step
    return steps


def fine(spacing: Floats) -> npt.NDArray[np.bool_]:
    """Which axes are at most twice as coarse as the finest."""
    coarsest = 2 * float(spacing.min()) + 1e-6
    return np.array(spacing <= coarsest, dtype=np.bool_)


def patch_size(spacing: Floats, shape: Floats, budget: int, divisor: Sequence[int]) -> list[int]:
    """The axis that is shortest in mm grows by its divisor, until each covers `shape` or the budget of voxels is spent."""
    step = np.asarray(divisor, dtype=np.int64)
    size = step.copy()
    open_axes = size < np.ceil(shape)
    while open_axes.any():
        axis = int(np.argmin(np.where(open_axes, size * spacing, np.inf)))
        longer = size.copy()
        longer[axis] += step[axis]
        fits = np.prod(longer) <= budget
        size = longer if fits else size
        open_axes[axis] = fits and size[axis] < np.ceil(shape[axis])
    return [int(n) for n in size]


def network_definition(
    in_channels: int, outputs: int, spacing: Floats, steps: Sequence[Sequence[int]], width: int
) -> dict[str, Any]:
    """A plan's ``network_def``: MONAI's DynUNet, nnU-Net's network (Isensee et al. 2021), `width` channels doubled per level.

    The first level has full resolution, each of `steps` leads to the next. Kernels have one voxel along an axis that is
    more than twice as coarse as the finest. The activation is nnU-Net's, LeakyReLU of slope 0.01.
    """
    kernels, factor = [], np.ones(3)
    for step in ((1, 1, 1), *steps):
        factor = factor * step
        kernels.append(np.where(fine(spacing * factor), 3, 1).tolist())
    return {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": 3,
        "in_channels": in_channels,
        "out_channels": outputs,
        "kernel_size": kernels,
        "strides": [[1, 1, 1], *map(list, steps)],
        "upsample_kernel_size": [list(step) for step in steps],
        "filters": [min(width * 2**level, MOST_CHANNELS) for level in range(len(kernels))],
        "norm_name": ["INSTANCE", {"affine": True}],
        "act_name": ["LEAKYRELU", {"negative_slope": 0.01, "inplace": True}],
    }


Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, le=1024)]
Steps = Annotated[int, Field(ge=1, le=10**6)]
Millimetres = Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)]
THREE = Field(min_length=3, max_length=3)


class Definition(TypedDict):
    """Of a MONAI object; it may have more keys."""

    _target_: str


class Window(TypedDict):
    overlap: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    sw_batch_size: Size


ORIENTATIONS = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
STEPS = ("a whole number from 1 to 1,000,000", Steps)
NUMBERS = ("a list of numbers", Sequence[Number])
RULES: dict[str, tuple[str, Any]] = {  # what the value must be, in words and as a type
    "name": ("a string", str),
    "channels": ("a list of channel names", Annotated[Sequence[str], Field(min_length=1)]),
    "labels": ("a mapping of at least two class names to different values, background first", dict[str, Number]),
    "ignore_label": ("null or a value that no class has", Number | None),
    "orientation": ('three axis codes such as "RAS"', str),
    "spacing": ("three lengths in mm from 0.0001 to 100", Annotated[Sequence[Millimetres], THREE]),
    "intensity": ('a list of transform configs, each with a "_target_"', Sequence[Definition]),
    "patch_size": ("three whole numbers from 1 to 1024", Annotated[Sequence[Size], THREE]),
    "flip_axes": ("a list of axes among 0, 1 and 2", Sequence[Annotated[int, Field(ge=0, le=2)]]),
    "batch_size": ("a whole number from 1 to 1024", Size),
    "steps_per_epoch": STEPS,
    "epochs": STEPS,
    "class_frequencies": NUMBERS,
    "class_weights": NUMBERS,
    "network_def": (
        'a mapping with a "_target_", or a "$" expression',
        Definition | Annotated[str, Field(pattern=r"^\$")],
    ),
    "inference": ('an "overlap" from 0 to below 1 and a "sw_batch_size" from 1 to 1024', Window),
    "keep_largest": ("a list of class names", Sequence[str]),
    "fingerprint": ("a mapping", dict[str, Any]),
}
SEGMENTS = (
    'a mapping of foreground classes (or regions) to a "category", a "type" and, if there is one, a "laterality" and a '
    '"region", each a code such as "SCT:10200004 Liver"'
)
REGIONS = "a mapping of regions to different lists of foreground values, which together hold all of them"
ORDER = "one foreground value for each region"
OPTIONAL: dict[str, tuple[str, Any]] = {
    "regions": (REGIONS, Annotated[dict[str, Sequence[Number]], Field(min_length=1)]),
    "regions_class_order": (ORDER, Sequence[Number]),
    "smallest_mm3": (
        "a mapping of foreground classes (or regions) to volumes above 0 (mm3)",
        dict[str, Annotated[Number, Field(gt=0)]],
    ),
    "segments": (SEGMENTS, dict[str, dict[str, str]]),
    "minutes": ("a number above 0", Annotated[Number, Field(gt=0)]),
    "trust_scan_affine": ("true or false", bool),
}


def read_plan(path: str | Path) -> dict[str, Any]:
    """A validated plan; `RunError` if its file is missing, `ConfigError` if it is damaged or invalid."""
    file = Path(path)
    if not file.exists():
        raise RunError(f"{file}: this plan does not exist. Create one with: medseg plan DATASET --out RUN")
    plan = read_json(file, ConfigError)
    validate_plan(plan, source=file)
    return plan


def write_plan(plan: Mapping[str, Any], path: str | Path) -> None:
    """Write a plan as JSON that a person can read: a list of numbers or a short mapping takes one line."""
    write_text(Path(path), _pretty(plan, 0) + "\n")


def _pretty(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, Mapping | list | tuple) or (depth > 0 and len(line) + 2 * depth <= 100):
        return line
    if isinstance(value, Mapping):
        names = (json.dumps(str(key), ensure_ascii=False) for key in value)
        rows = [f"{name}: {_pretty(part, depth + 1)}" for name, part in zip(names, value.values(), strict=True)]
    else:
        rows = [_pretty(part, depth + 1) for part in value]
    start, end = "{}" if isinstance(value, Mapping) else "[]"
    return start + ",".join(f"\n{'  ' * (depth + 1)}{row}" for row in rows) + f"\n{'  ' * depth}{end}"


def validate_plan(plan: object, *, divisor: Sequence[int] | None = None, source: str | Path = "plan.json") -> None:
    """`ConfigError` with the key at fault for a plan that training could not use; `divisor`: of the patch, per axis."""
    if not isinstance(plan, Mapping):
        raise ConfigError(f"{source}: must contain a JSON object, found {type(plan).__name__}.")
    rules = RULES | OPTIONAL
    for key in plan:
        if key not in rules:
            hint = f"Did you mean {near!r}?" if (near := nearest(key, rules)) else "Remove it."
            raise ConfigError(f"{source}: the key {key!r} is not known. {hint}")
    if missing := [key for key in RULES if key not in plan]:
        raise ConfigError(f"{source}: the key {missing[0]!r} is missing. Add it, or make a new plan.")

    def need(key: str, fits: bool, what: str) -> None:
        if not fits:
            found = json.dumps(plan[key], default=str)[:80]
            raise ConfigError(f'{source}: "{key}" must be {what}, found {found}.')

    for key in plan:
        try:
            TypeAdapter(rules[key][1]).validate_python(plan[key], strict=True)
        except ValidationError:
            need(key, False, rules[key][0])
    labels, patch = plan["labels"], plan["patch_size"]
    need("labels", 2 <= len(labels) == len(set(labels.values())), RULES["labels"][0])
    need("orientation", plan["orientation"] in ORIENTATIONS, RULES["orientation"][0])
    need("ignore_label", plan["ignore_label"] not in labels.values(), RULES["ignore_label"][0])
    for key in ("class_frequencies", "class_weights"):
        fits_classes = len(plan[key]) == len(labels) and min(plan[key]) >= 0
        need(key, fits_classes, f"{len(labels)} numbers of at least 0, one for each class")
    if ("regions" in plan) != ("regions_class_order" in plan):
        raise ConfigError(f'{source}: "regions" and "regions_class_order" belong together. Add the other one.')
    if "regions" in plan:
        regions, foreground = plan["regions"].values(), set(list(labels.values())[1:])
        sets = {frozenset(region) for region in regions}
        need("regions", all(regions) and set().union(*regions) == foreground and len(sets) == len(regions), REGIONS)
        order = plan["regions_class_order"]
        need("regions_class_order", len(order) == len(regions) and set(order) <= foreground, ORDER)
    targets = target_names(plan)
    known = targets if "regions" in plan else list(labels)
    need("keep_largest", set(plan["keep_largest"]) <= set(known), f"a list of classes or regions among {known}")
    need("smallest_mm3", set(plan.get("smallest_mm3", ())) <= set(targets), OPTIONAL["smallest_mm3"][0])
    segments = plan.get("segments", {})
    need("segments", are_segments(segments) and set(segments) <= set(targets), SEGMENTS)
    if divisor is not None:
        rounded = [math.ceil(n / d) * d for n, d in zip(patch, divisor, strict=True)]
        need("patch_size", rounded == list(patch), f"divisible by {list(divisor)} for this network (such as {rounded})")


def plan_warnings(plan: Mapping[str, Any]) -> list[str]:
    """Warnings on structures that may vanish at the plan's spacing: below two voxels, as nearest neighbour resamples."""
    warnings = []
    spacing = " x ".join(f"{mm:.3g}" for mm in plan["spacing"])
    for name, least in plan["fingerprint"].get("smallest", {}).items():
        left = least["mm3"] / math.prod(plan["spacing"])
        if left < 2 and left < 0.99 * least["voxels"]:
            warnings.append(
                f"the smallest {name!r} (case {least['case']}: {counted(least['voxels'], 'voxel')}, {least['mm3']:.3g} "
                f"mm3) has about {left:.2g} voxels at the plan's spacing of {spacing} mm and may vanish. Plan with a "
                "finer spacing: --set plan::spacing=[X,Y,Z]."
            )
    return warnings
