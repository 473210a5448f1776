"""metadata.json of a run: what the bundle is for, its inputs and outputs, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medseg_supcon import __version__
from medseg_supcon.bundle.configs import read_config
from medseg_supcon.datasets import label_type
from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json
from medseg_supcon.networks import build_network, size_divisor

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
# What MONAI needs beyond its own requirements; train.yaml and evaluate.yaml also need this package.
REQUIRED = ("nibabel", "pytorch-ignite")
# Packages that some stock networks import.
OF_NETWORKS = {"SwinUNETR": "einops", "UNETR": "einops", "ViT": "einops"}
# Keys that a user may edit; writing the file again keeps them.
KEPT = (
    "version", "changelog", "name", "task", "description", "authors", "copyright", "data_source", "intended_use",
    "references",
)  # fmt: skip
METRICS = ("dice", "hd95_mm", "surface_dice")
LOSSES = {  # of train.yaml's loss, in words
    "DiceSupConLoss": "Dice, cross-entropy and a supervised contrastive loss per voxel",
    "SemiSupervisedLoss": "Dice, cross-entropy and a contrastive loss per voxel, with pseudo-labels of unlabelled scans,",
    "StagedLoss": "a contrastive loss per voxel, then cross-entropy, then Dice and cross-entropy,",
}
INTENDED_USE = (
    "Research. Not a medical device: not cleared or certified for diagnosis or treatment. A qualified person must "
    "check the masks."
)
REFERENCES = [
    "Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, https://arxiv.org/abs/2004.11362",
    "Cardoso et al., MONAI: An open-source framework for deep learning in healthcare, 2022, "
    "https://arxiv.org/abs/2211.02701",
]


def metadata_of(run: Path) -> dict[str, Any]:
    """The content of ``configs/metadata.json``, see `write_metadata`."""
    plan = read_json(run / "configs" / "plan.json")
    path = run / "configs" / "metadata.json"
    earlier = read_json(path) if path.is_file() else {}
    if not isinstance(earlier, dict):
        raise RunError(f"{path} must contain a JSON object. Correct it, or delete it: it is written again.")
    metrics = run / "eval" / "metrics.json"
    structures = ", ".join(list(plan["labels"])[1:])
    modality = " + ".join(plan["channels"])
    fresh = {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"trained with medseg-supcon {__version__}"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": _required(plan),
        "name": f"{plan['name']} segmentation",
        "task": f"Segmentation of {structures} in 3-D {'' if modality == 'scan' else f'{modality} '}scans",
        "description": (
            f"Assigns every voxel of a 3-D scan ({modality}) to one of {len(plan['labels'])} classes "
            f"({', '.join(plan['labels'])}). Trained on {plan['name']} with {loss_in_words(train_config(run))} on two "
            "augmented views of each scan."
        ),
        "authors": "the person who trained this run",
        "copyright": "Apache License 2.0, see LICENSE; the training data has its own terms",
        "data_source": plan["name"],
        "data_type": "nibabel",
        "image_classes": f"{len(plan['channels'])} channel(s), {modality}, normalised as described in plan.json",
        "label_classes": "one channel, " + ", ".join(f"{value} is {name}" for name, value in plan["labels"].items()),
        "pred_classes": f"{len(plan['labels'])} channels of logits: "
        + ", ".join(f"channel {i} is {name}" for i, name in enumerate(plan["labels"])),
        "eval_metrics": scores(read_json(metrics) if metrics.is_file() else {}),
        "intended_use": INTENDED_USE,
        "references": REFERENCES,
        "network_data_format": _data_format(plan),
    }
    return fresh | {key: earlier[key] for key in KEPT if key in earlier}


def train_config(run: Path) -> dict[str, Any]:
    """The content of ``train.yaml``; empty if the file does not exist."""
    path = run / "configs" / "train.yaml"
    return read_config(path) if path.is_file() else {}


def loss_in_words(config: Mapping[str, Any]) -> str:
    """What ``train.yaml`` trains with.

    >>> loss_in_words({"loss": {"_target_": "medseg_supcon.losses.DiceSupConLoss"}, "contrast_weight": 0.0})
    'Dice and cross-entropy'
    """
    name = str(config.get("loss", {}).get("_target_", "DiceSupConLoss")).rpartition(".")[2]
    if name == "DiceSupConLoss" and config.get("contrast_weight") == 0:
        return "Dice and cross-entropy"
    return LOSSES.get(name, name)


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The means of ``eval/metrics.json`` in one flat mapping, without missing scores.

    >>> summary = {"cases": 2, "mean": {"dice": 0.9}, "classes": {"organ": {"dice": 0.9, "hd95_mm": None}}}
    >>> scores({"summary": summary})
    {'cases': 2, 'mean_dice': 0.9, 'organ_dice': 0.9}
    """
    summary = metrics.get("summary", {})
    found = {"cases": summary.get("cases")}
    for label, of in {"mean": summary.get("mean", {}), **summary.get("classes", {})}.items():
        found |= {f"{label}_{name}".replace(" ", "_"): of.get(name) for name in METRICS}
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def value_range(intensity: Sequence[Mapping[str, Any]]) -> list[float]:
    """The range that the intensity transforms clip to; ``[]`` (MONAI's "not known") if they do not clip.

    >>> value_range([{"_target_": "ScaleIntensityRanged", "b_min": -2.5, "b_max": 3, "clip": True}])
    [-2.5, 3.0]
    """
    windows = [step for step in intensity if step["_target_"] == "ScaleIntensityRanged" and step.get("clip")]
    if not intensity or len(windows) != len(intensity):
        return []
    return [min(float(w["b_min"]) for w in windows), max(float(w["b_max"]) for w in windows)]


def _data_format(plan: Mapping[str, Any]) -> dict[str, Any]:
    patch = {
        "type": "image",
        "dtype": "float32",
        "spatial_shape": _spatial_shape(plan),
        "is_patch_data": True,
    }
    values = [float(value) for value in plan["labels"].values()]
    image = {
        "format": "hounsfield" if plan["channels"] == ["CT"] else "magnitude",
        "modality": plan["channels"][0],
        "num_channels": len(plan["channels"]),
        "value_range": value_range(plan["intensity"]),
        "channel_def": {str(i): name for i, name in enumerate(plan["channels"])},
    }
    logits = {
        "format": "segmentation",
        "num_channels": len(plan["labels"]),
        "value_range": [],
        "channel_def": {str(i): name for i, name in enumerate(plan["labels"])},
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


def _spatial_shape(plan: Mapping[str, Any]) -> list[str]:
    """Sizes that the network takes, in MONAI's notation: n = 1 is the training patch."""
    network = build_network(plan["network_def"], trust=True)  # of a run that passed the gate
    divisors = size_divisor(network, in_channels=len(plan["channels"]), spatial_dims=len(plan["patch_size"]))
    return [
        f"{d}*n" if size == d else f"{d}*(n+{size // d - 1})"
        for d, size in zip(divisors, plan["patch_size"], strict=True)
    ]


def _required(plan: Mapping[str, Any]) -> dict[str, str]:
    packages = {name: _version(name) for name in REQUIRED}
    for network, package in OF_NETWORKS.items():
        if network in str(plan["network_def"]):
            packages[package] = _version(package)
    return packages | {"medseg-supcon": __version__}


def _version(package: str) -> str:
    """The installed version without a build's suffix: package indexes do not know 2.8.0+cpu."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return ""
