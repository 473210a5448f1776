"""``medseg embed``: the features that a run's network computes for voxels, before and after training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data.utils import dense_patch_slices
from monai.transforms import Compose, SpatialPadd
from monai.utils import set_determinism
from torch import Tensor, nn

from medseg_supcon.bundle import (
    cases_of,
    check_configs_trusted,
    find_run,
    is_planned,
    load_model,
    load_tensors,
    read_config,
    scan_preprocessing,
    settings_at_fault,
)
from medseg_supcon.datasets import Case, Dataset, items, load_items
from medseg_supcon.embedding.separation import class_separation, principal_components, scatter_figure, t_sne
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.losses import IGNORE_INDEX, VoxelSampler
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.plan import LabelPreprocessingd, literal, read_plan
from medseg_supcon.text import counted
from medseg_supcon.training import prepare_case

BEFORE, AFTER = "before training", "after training"
HEAD = "projection."  # its part of the names in checkpoint.pt
DEFAULT_CASES = 8

Networks = Mapping[str, ContrastiveNetwork]


def networks_of(run: Path, device: torch.device, trust: bool = False) -> dict[str, ContrastiveNetwork]:
    """The run's network as its seed (and its ``--init``) made it, and as training left it; in evaluation mode."""
    made = {BEFORE: _begun(run, trust)[0], AFTER: load_model(run, trust).network}
    return {when: ContrastiveNetwork(network).to(device).eval() for when, network in made.items()}


def heads_of(run: Path, trust: bool = False) -> tuple[dict[str, nn.Module], str]:
    """The projection head before and after training, or none and a sentence that says why."""
    config, checkpoint = read_config(run / "configs" / "train.yaml"), run / "models" / "checkpoint.pt"
    reasons = {
        "has no projection head": config.get("projection") is None,
        "has a contrast weight of 0, so its projection head was not trained": config.get("contrast_weight") == 0,
        "has no models/checkpoint.pt, which contains the projection head": not checkpoint.exists(),
    }
    if why := next((reason for reason, applies in reasons.items() if applies), None):
        return {}, f"The run {why}. Only the network's features are shown."
    try:
        saved = load_tensors(checkpoint)["state"]["loss"]
        prefix = min((key.split(HEAD, 1)[0] + HEAD for key in saved if HEAD in key), key=len, default=None)
    except (KeyError, TypeError, AttributeError):
        raise RunError(f"{checkpoint} is not a training checkpoint. Copy it again.") from None
    if prefix is None:
        return {}, "The run's checkpoint does not contain its projection head. Only the network's features are shown."
    head = _begun(run, trust)[1]
    if head is None:  # an expression that gives None
        return {}, "The run has no projection head. Only the network's features are shown."
    heads = {BEFORE: head.eval(), AFTER: deepcopy(head)}
    try:
        heads[AFTER].load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{checkpoint} does not fit the projection head of train.yaml: {reason}") from None
    return heads, ""


def _begun(run: Path, trust: bool) -> tuple[nn.Module, nn.Module | None]:
    """Network and projection head (None: the run has none) as the run's seed makes them, one after the other."""
    check_configs_trusted(run, trust)
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = literal(str(run))
    parser["device"] = "$torch.device('cpu')"  # the start of a run does not depend on the device
    with settings_at_fault():
        set_determinism(seed=int(parser.get_parsed_content("seed")))
        network, head = parser.get_parsed_content("network"), parser.get_parsed_content("projection")
    set_determinism(seed=None)
    if not (isinstance(network, nn.Module) and isinstance(head, nn.Module | None)):
        raise RunError(f"{run / 'configs' / 'train.yaml'}: network and projection must be torch modules.")
    return network, head


def _sample_features(
    prepare: Compose, cases: Sequence[Case], root: Path, networks: Networks, sampler: VoxelSampler, patch: Sequence[int]
) -> tuple[dict[str, Tensor], Any, Any]:
    """Features (N, F) of the sampled voxels by each network, their class indices (N,) and scans' numbers (N,)."""
    features, labels, scans = [], [], []
    for number, case in enumerate(prepare_case(prepare, item) for item in load_items(items(cases, root), root)):
        label = torch.as_tensor(case["label"]).long()
        indices = sampler(label).indices
        where = torch.stack(torch.unravel_index(indices, label.shape[1:]), 1)
        features.append(voxel_features(networks, torch.as_tensor(case["image"]), where, patch))
        labels.append(label.flatten()[indices])
        scans.append(torch.full_like(indices, number))
    if not any(map(len, labels)):
        raise DataError(f"{root}: no labelled voxel in the chosen cases. Choose others with --cases.")
    joined = {name: torch.cat([of[name] for of in features if name in of]) for name in networks}
    return joined, torch.cat(labels).numpy(), torch.cat(scans).numpy()


@torch.no_grad()
def voxel_features(networks: Networks, image: Tensor, where: Tensor, patch: Sequence[int]) -> dict[str, Tensor]:
    """Features of single voxels, name -> (N, F) float32 on the CPU; needs the memory of one patch at any size of the scan.

    ``image`` is (C, X, Y, Z), no smaller than a patch; ``where`` (N, 3) voxel indices. A voxel's features come from the
    window whose centre is nearest, of windows that overlap by half.
    """
    windows = dense_patch_slices(tuple(image.shape[1:]), tuple(patch), tuple(max(1, p // 2) for p in patch))
    starts = torch.tensor([[s.start for s in window] for window in windows])
    size = torch.tensor(list(patch))
    nearest = ((where[:, None].double() + 0.5 - starts - size / 2) / size).abs().amax(2).argmin(1)
    result: dict[str, Tensor] = {}
    for number in torch.unique(nearest).tolist():
        mine = nearest == number
        x, y, z = (where[mine] - starts[number]).T
        part = image[(slice(None), *windows[number])][None]
        for name, network in networks.items():
            features = network.forward_features(part.to(next(network.parameters()).device))[1][0]
            rows = features.float().cpu()[:, x, y, z].T
            result.setdefault(name, rows.new_zeros(len(where), rows.shape[1]))[mine] = rows
    return result


def embed_run(
    run: Path,
    dataset: Dataset,
    out: Path,
    *,
    cases: Iterable[str] | None = None,
    voxels: int = 1500,
    seed: int = 0,
    device: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Class separation and pictures of features of sampled voxels; returns the content of ``separation.json``.

    The network before training is as the run's seed (and its ``--init``) made it. ``voxels`` over all cases are drawn once,
    evenly over classes, and are the same in all sets; ``seed`` is that of the draw and of t-SNE. ``cases`` are names, by
    default up to 8 labelled ones that the run did not train on. ``trust``: run code in the run's configs that medseg did
    not write on this computer. A RunError if it is not a trained run or needs trust; a DataError if no case has a label, or
    the data set has other channels than the run.
    """
    from torch.utils.tensorboard import SummaryWriter

    run = find_run(run)
    if not is_planned(run):
        raise RunError(f"{run} is not a trained run. Train it first: medseg train DATASET --out {run}.")
    plan = read_plan(run / "configs" / "plan.json")
    chosen, chosen_how = _choose(run, dataset, cases)
    if len(dataset.channels) != len(plan["channels"]):
        channels = f"{len(dataset.channels)} channel(s) per scan, but the run has {len(plan['channels'])}"
        raise DataError(f"{dataset.root} has {channels}. Choose a data set with the run's channels.")
    networks = networks_of(run, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), trust)
    classes, patch = list(plan["labels"]), plan["patch_size"]
    padding = [SpatialPadd("image", patch), SpatialPadd("label", patch, value=IGNORE_INDEX)]
    prepare = Compose([scan_preprocessing(run, trust), LabelPreprocessingd(plan), *padding])
    sampler = VoxelSampler("stratified", max(len(classes), -(-voxels // len(chosen))), seed=seed)
    features, labels, scans = _sample_features(prepare, chosen, dataset.root, networks, sampler, patch)
    heads, note = heads_of(run, trust)
    sets = {f"encoder features, {when}": rows.numpy() for when, rows in features.items()}
    with torch.no_grad():
        sets |= {f"projected features, {when}": head(features[when]).float().numpy() for when, head in heads.items()}
    if wrong := next((name for name, vectors in sets.items() if not np.isfinite(vectors).all()), None):
        raise RunError(f"{run}: its {wrong}, contain NaN or infinity, so its weights cannot be used. Train again.")
    rows = [{"vectors": k, "width": x.shape[1]} | class_separation(x, labels, scans, seed) for k, x in sets.items()]
    components = {name: principal_components(vectors) for name, vectors in sets.items()}
    maps = [(f"{name} ({100 * sum(shares):.0f} % of the variance)", at) for name, (at, shares) in components.items()]
    scatter_figure(maps, labels, classes, "Voxels by their first two principal components", out / "pca.png")
    maps = [(name, t_sne(vectors, seed)) for name, vectors in sets.items()]
    scatter_figure(maps, labels, classes, "Voxels by t-SNE", out / "tsne.png")
    metadata = [[classes[int(c)], chosen[int(scan)].name] for c, scan in zip(labels, scans, strict=True)]
    shutil.rmtree(out / "projector", ignore_errors=True)  # a projector appends
    with SummaryWriter(str(out / "projector")) as writer:
        for name, vectors in sets.items():
            tag = name.replace(", ", "_").replace(" ", "_")
            writer.add_embedding(torch.from_numpy(vectors), metadata, tag=tag, metadata_header=["class", "case"])
    result = {
        "run": str(run),
        "cases": [case.name for case in chosen],
        "voxels": {name: int((labels == c).sum()) for c, name in enumerate(classes)},
        "separation": rows,
        "sentences": [chosen_how, *([note] if note else []), *map(_sentence, rows)],
    }
    write_text(out / "separation.json", json.dumps(result, indent=1) + "\n")
    write_csv(out / "separation.csv", list(rows[0]), rows)
    return result


def _choose(run: Path, dataset: Dataset, names: Iterable[str] | None) -> tuple[Sequence[Case], str]:
    """Labelled cases, and a sentence that says how they were chosen."""
    if names is not None:
        labelled, how = dataset.select(names).labelled, ", as named"
    else:
        trained = {item.get("name") for item in cases_of(run).get("training", ())}
        unseen = tuple(case for case in dataset.labelled if case.name not in trained)
        labelled = (unseen or dataset.labelled)[:DEFAULT_CASES]
        how = f" that the run {'did not train' if unseen else 'trained'} on"
    if not labelled:
        raise DataError(f"{dataset.root}: none of the cases has a label map, and the classes come from label maps.")
    return labelled, f"{counted(len(labelled), 'scan')}{how}."


def _sentence(row: dict[str, Any]) -> str:
    shown = {key: f"{value:.3f}" if isinstance(value, float) else "-" for key, value in row.items()}
    scores = f"silhouette {shown['silhouette']}, linear probe {shown['linear_probe']} (balanced accuracy)"
    return f"{row['vectors']}: {scores}, collapse {shown['collapse']}."
