"""Files that are derived from the rest of a run: metadata.json, the model card, the network in the configs, JSON twins."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from medseg_supcon import __version__
from medseg_supcon.bundle.folder import TEMPLATE, cases_of, read_config, shared_folder
from medseg_supcon.datasets import label_type, mask_labels, output_channels, target_names, values_of
from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.networks import build_network, size_divisor
from medseg_supcon.text import counted, markdown_text

# What MONAI needs beyond its own requirements; train.yaml and evaluate.yaml also need this package.
REQUIRED = ("nibabel", "pytorch-ignite")
OF_COMPONENTS = {"keep_largest": "scikit-image", "smallest_mm3": "scipy"}  # key of the plan -> what applies it
EINOPS = ("SwinUNETR", "UNETR", "ViT")  # stock networks that import it
# Keys of metadata.json that a user may edit; writing the file again keeps them.
KEPT = (
    "version", "changelog", "name", "task", "description", "authors", "copyright", "data_source", "intended_use",
    "references",
)  # fmt: skip
METRICS = ("dice", "hd95_mm", "surface_dice")
SHOWN = ("recipe", "seed", "learning_rate", "contrast_weight", "temperature", "contrast_samples")  # in the card
LOSSES = {  # of train.yaml's loss, in words
    "DiceSupConLoss": "Dice, cross-entropy and a supervised contrastive loss per voxel",
    "SemiSupervisedLoss": "Dice, cross-entropy and a contrastive loss per voxel, with pseudo-labels of unlabelled scans,",
    "StagedLoss": "a contrastive loss per voxel, then cross-entropy, then Dice and cross-entropy,",
}


def write_metadata(run: Path) -> None:
    """Write ``configs/metadata.json``, valid against MONAI's ``meta_schema_20240725``: the template's, for this run.

    Keys that a user may have edited in an earlier one (version, changelog, authors, references, ...) are kept.
    """
    plan = read_json(run / "configs" / "plan.json")
    earlier, metrics = run / "configs" / "metadata.json", run / "eval" / "metrics.json"
    targets, outputs, modality = target_names(plan), _outputs(plan), " + ".join(plan["channels"])
    meaning = mask_labels(plan).items()
    values = [f"{' and '.join(map(str, values_of(entry)))} is {name}" for name, entry in meaning]
    einops = ["einops"] if any(network in str(plan["network_def"]) for network in EINOPS) else []
    components = [package for key, package in OF_COMPONENTS.items() if plan.get(key)]
    components = ["scipy"] if components and plan.get("regions") else components
    fresh = read_json(shared_folder("bundles") / TEMPLATE / "configs" / "metadata.json") | {
        "changelog": {"0.1.0": f"trained with medseg-supcon {__version__}"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {name: _version(name) for name in (*REQUIRED, *einops, *components)}
        | {"medseg-supcon": __version__},
        "name": f"{plan['name']} segmentation",
        "task": f"Segmentation of {', '.join(targets)} in 3-D {'' if modality == 'scan' else f'{modality} '}scans",
        "description": f"Assigns every voxel of a 3-D scan ({modality}) to {_what_is_assigned(plan)} "
        f"({', '.join(outputs)}). Trained on {plan['name']} with {_loss_in_words(_train_config(run), plan)} on two "
        "augmented views of each scan.",
        "data_source": plan["name"],
        "image_classes": f"{len(plan['channels'])} channel(s), {modality}, normalised as described in plan.json",
        "label_classes": "one channel, " + ", ".join(values),
        "pred_classes": f"{len(outputs)} channels of logits: "
        + ", ".join(f"channel {i} is {name}" for i, name in enumerate(outputs)),
        "eval_metrics": _scores(read_json(metrics) if metrics.is_file() else {}),
        "network_data_format": _data_format(plan),
    }
    kept = read_json(earlier) if earlier.is_file() else {}
    write_text(earlier, _json(fresh | {key: kept[key] for key in KEPT if key in kept}))


def _outputs(plan: Mapping[str, Any]) -> list[str]:
    """Names of the network's output channels: the classes with the background, or the regions."""
    return target_names(plan) if plan.get("regions") else list(plan["labels"])


def _what_is_assigned(plan: Mapping[str, Any]) -> str:
    number = len(_outputs(plan))
    return f"any of {number} regions, which may overlap" if plan.get("regions") else f"one of {number} classes"


def _train_config(run: Path) -> dict[str, Any]:
    path = run / "configs" / "train.yaml"
    return read_config(path) if path.is_file() else {}


def _loss_in_words(config: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """What ``train.yaml`` trains with."""
    words = _loss_of(config)
    return words.replace("cross-entropy", "binary cross-entropy per region") if plan.get("regions") else words


def _loss_of(config: Mapping[str, Any]) -> str:
    name = str(config.get("loss", {}).get("_target_", "DiceSupConLoss")).rpartition(".")[2]
    if name == "DiceSupConLoss" and config.get("contrast_weight") == 0:
        return "Dice and cross-entropy"
    return LOSSES.get(name, name)


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The means of ``eval/metrics.json`` in one flat mapping, without missing scores."""
    summary = metrics.get("summary", {})
    means = {"cases": summary.get("cases")}
    for label, of in {"mean": summary.get("mean", {}), **summary.get("classes", {})}.items():
        means |= {f"{label}_{name}".replace(" ", "_"): of.get(name) for name in METRICS}
    return {name: round(value, 4) for name, value in means.items() if value is not None}


def _value_range(intensity: Sequence[Mapping[str, Any]]) -> list[float]:
    """The range that the intensity transforms clip to; ``[]`` (MONAI's "not known") if they do not clip."""
    windows = [step for step in intensity if step["_target_"] == "ScaleIntensityRanged" and step.get("clip")]
    if not intensity or len(windows) != len(intensity):
        return []
    return [min(float(w["b_min"]) for w in windows), max(float(w["b_max"]) for w in windows)]


def _data_format(plan: Mapping[str, Any]) -> dict[str, Any]:
    channels, values = plan["channels"], [float(value) for value in plan["labels"].values()]
    network = build_network(plan["network_def"], trust=True)  # of a run that passed the gate
    dims, definition = len(plan["patch_size"]), plan["network_def"]
    divisors = size_divisor(network, in_channels=len(channels), spatial_dims=dims, definition=definition)
    pairs = zip(divisors, plan["patch_size"], strict=True)
    shape = [f"{d}*n" if size == d else f"{d}*(n+{size // d - 1})" for d, size in pairs]  # the patch, for n = 1
    patch = {"type": "image", "dtype": "float32", "spatial_shape": shape, "is_patch_data": True}
    image = {
        "format": "hounsfield" if channels == ["CT"] else "magnitude",
        "modality": channels[0],
        "num_channels": len(channels),
        "value_range": _value_range(plan["intensity"]),
        "channel_def": {str(i): name for i, name in enumerate(channels)},
    }
    logits = {
        "format": "segmentation",
        "num_channels": output_channels(plan),
        "value_range": [],
        "channel_def": {str(i): name for i, name in enumerate(_outputs(plan))},
    }
    mask = {
        "type": "image",
        "format": "segmentation",
        "num_channels": 1,
        "spatial_shape": ["*", "*", "*"],
        "dtype": str(label_type(values)),
        "value_range": [min(values), max(values)],
        "is_patch_data": False,
        "channel_def": {"0": "label values"},
    }
    return {
        "inputs": {"image": patch | image},
        "outputs": {"pred": patch | logits},
        "post_processed_outputs": {"pred": mask},
    }


def _version(package: str) -> str:
    """The installed version without a build's suffix: package indexes do not know 2.8.0+cpu."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=1)  # a training writes the card several times
def _card_template() -> Template:
    text = (shared_folder("bundles") / TEMPLATE / "docs" / "README.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=markdown_text
    )  # fmt: skip
    return environment.from_string(text)


def write_model_card(run: Path) -> None:
    """Write ``docs/README.md`` from the plan, the lists of cases, the history and the evaluation."""
    plan = read_json(run / "configs" / "plan.json")
    metrics = run / "eval" / "metrics.json"
    config, cases = _train_config(run), cases_of(run)
    card = _card_template().render(
        plan=plan,
        counted=counted,
        assigned=_what_is_assigned(plan),
        version=__version__,
        cases={name: len(items) for name, items in cases.items()},
        seen=sum(item in cases.get("training", ()) for item in cases.get("validation", ())),
        recipe=_recipe(config),
        loss=_loss_in_words(config, plan),
        network=_network_name(plan["network_def"]),
        parameters=sum(p.numel() for p in build_network(plan["network_def"], trust=True).parameters()),
        history=_history(run / "logs" / "history.csv"),
        metrics=read_json(metrics) if metrics.is_file() else {},
        curves=(run / "docs" / "curves.png").is_file(),
        example=(run / "eval" / "example.png").is_file(),
        quality=(run / "models" / "quality.npz").is_file(),
    )
    write_text(run / "docs" / "README.md", card)


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of train.yaml that readers of the card want; without expressions and keys that nothing uses."""
    used = {"recipe", *re.findall(r"@(\w+)", repr(config))}  # two_stage does not use the contrast's weight
    if "contrast_weight" in used and config.get("contrast_weight") == 0:
        used -= {"temperature", "contrast_samples"}
    return {k: config[k] for k in SHOWN if k in used and not str(config.get(k, "$")).startswith(("$", "@"))}


def _network_name(network_def: Mapping[str, Any] | str) -> str:
    names = re.findall(r"\bnets\.(\w+)", str(network_def))
    if not names and isinstance(network_def, Mapping):
        names = [str(network_def["_target_"]).rsplit(".", 1)[-1]]
    return " and ".join(names) if names else "see network_def in configs/plan.json"


def _history(path: Path) -> dict[str, Any]:
    """Length, time and best validation Dice of the training so far; empty before training."""
    if not path.is_file():
        return {}
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        dice = {int(row["epoch"]): float(row["val_mean_dice"]) for row in rows if row.get("val_mean_dice")}
        best = max((epoch for epoch in dice if isfinite(dice[epoch])), key=dice.__getitem__, default=None)
        minutes = round(sum(float(row["seconds"]) for row in rows) / 60, 1)
        length = {"epochs": int(rows[-1]["epoch"]), "steps": int(rows[-1]["step"]), "minutes": minutes} if rows else {}
        return length and {**length, "best_dice": best and dice[best], "best_epoch": best}
    except (KeyError, ValueError, TypeError, csv.Error):
        raise RunError(f"{path} is damaged. Copy it again, or delete it: only its curves are lost.") from None


def write_network(run: Path) -> None:
    """Write the plan's network into the configs that repeat it (``network_def``); comments stay."""
    text = json.dumps(read_json(run / "configs" / "plan.json")["network_def"])  # JSON is YAML
    for path in sorted((run / "configs").glob("*.yaml")):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"(?m)^network_def:.*(\n[ -].*)*$", lambda _: f"network_def: {text}", old)
        if new != old:
            write_text(path, new)


def write_twins(run: Path) -> None:
    """Write a ``.json`` of equal content for every ``.yaml`` of ``configs``, for tools that read JSON."""
    for path in sorted((run / "configs").glob("*.yaml")):
        write_text(path.with_suffix(".json"), _json(read_config(path)))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
