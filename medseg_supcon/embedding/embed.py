"""``medseg embed``: the features of voxels before and after training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import nn

from medseg_supcon.bundle import (
    check_configs_trusted,
    is_code,
    is_planned,
    is_started,
    leaves,
    load_model,
    load_tensors,
    plain_text,
    read_config,
    scan_preprocessing,
)
from medseg_supcon.datasets import Case, Dataset
from medseg_supcon.embedding.separation import (
    Embedding,
    class_separation,
    principal_components,
    scatter_figure,
    t_sne,
)
from medseg_supcon.embedding.voxels import sample_features
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.inference import trained_on
from medseg_supcon.networks import ContrastiveNetwork, ProjectionHead, build_network, definition_problem
from medseg_supcon.plan import literal, read_plan
from medseg_supcon.text import counted
from medseg_supcon.training import load_initial

BEFORE, AFTER = "before training", "after training"
HEAD = "projection."  # in the names of checkpoint.pt
# The projection head in train.yaml, apart from plain values.
HEAD_CODE = {
    "_target_": "medseg_supcon.networks.ProjectionHead",
    "in_channels": "$@train::network.in_channels",
}


def networks_of(run: Path, device: torch.device, trust: bool = False) -> dict[str, ContrastiveNetwork]:
    """The run's network before training (from its seed and ``--init``) and after it, in evaluation mode.

    Raises:
        RunError: the weights do not match the plan's network, or the run needs trust.
    """
    made = {BEFORE: _begun(run, trust)[0], AFTER: load_model(run, trust).network}
    return {when: ContrastiveNetwork(network).to(device).eval() for when, network in made.items()}


def heads_of(run: Path, trust: bool = False) -> tuple[dict[str, nn.Module], str]:
    """The projection head before and after training, or nothing and a sentence that says why."""
    config = read_config(run / "configs" / "train.yaml")
    checkpoint = run / "models" / "checkpoint.pt"
    if config.get("projection") is None:
        return {}, "The run has no projection head: only features are shown."
    if config.get("contrast_weight") == 0:
        return (
            {},
            "The run's contrast weight is 0, so its projection head was not trained: only features are shown.",
        )
    if not checkpoint.exists():
        return (
            {},
            "The run has no models/checkpoint.pt, which contains the projection head: only features are shown.",
        )
    try:
        saved = load_tensors(checkpoint)["state"]["loss"]
        prefixes = sorted({key.split(HEAD, 1)[0] for key in saved if HEAD in key}, key=len)
    except (KeyError, TypeError, AttributeError):
        raise RunError(f"{checkpoint} is not a checkpoint of a training. Copy it again.") from None
    if not prefixes:
        return {}, "The checkpoint does not contain the projection head: only features are shown."
    prefix = prefixes[0] + HEAD
    made = {when: _begun(run, trust)[1] for when in (BEFORE, AFTER)}
    heads = {when: head.eval() for when, head in made.items() if head is not None}
    if not heads:  # an expression that gives None
        return {}, "The run has no projection head: only features are shown."
    try:
        heads[AFTER].load_state_dict(
            {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{checkpoint} does not match the projection head of train.yaml: {reason}") from None
    return heads, ""


def _begun(run: Path, trust: bool) -> tuple[nn.Module, nn.Module | None]:
    """Network and projection head (None: no head) as the run's seed makes them, one after the other."""
    config = read_config(run / "configs" / "train.yaml")
    plan = read_plan(run / "configs" / "plan.json")
    head, seed = config.get("projection"), config.get("seed")
    begins = config.get("init_weights")
    weights = None if begins is None else plain_text(begins)
    plain_start = isinstance(seed, int) and (begins is None or weights is not None)
    if not (plain_start and _is_plain_head(head) and definition_problem(plan["network_def"]) is None):
        return _evaluated(run, trust)
    set_determinism(seed=seed)
    try:
        network = load_initial(build_network(plan["network_def"]), weights)
        if head is None:
            return network, None
        options = {key: value for key, value in head.items() if key not in HEAD_CODE}
        return network, ProjectionHead(ContrastiveNetwork(network).in_channels, **options)
    except (TypeError, ValueError) as error:  # an option that the head does not have, or of a wrong size
        raise RunError(
            f"{run / 'configs' / 'train.yaml'}: the projection head cannot be built ({error})."
        ) from None
    finally:
        set_determinism(seed=None)


def _is_plain_head(head: Any) -> bool:
    if head is None:
        return True
    if not isinstance(head, dict) or any(head.get(key) != value for key, value in HEAD_CODE.items()):
        return False
    return not any(is_code(key, value) for key, value in leaves(head) if key not in HEAD_CODE)


def _evaluated(run: Path, trust: bool) -> tuple[nn.Module, nn.Module | None]:
    """The same from train.yaml as MONAI evaluates it, for recipes with another start or head."""
    check_configs_trusted(run, trust)
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = literal(str(run))
    # The start of a run does not depend on the device.
    parser["device"] = "$torch.device('cpu')"
    set_determinism(seed=int(parser.get_parsed_content("seed")))
    network, head = parser.get_parsed_content("network"), parser.get_parsed_content("projection")
    set_determinism(seed=None)
    if not (isinstance(network, nn.Module) and isinstance(head, nn.Module | None)):
        raise RunError(f"{run / 'configs' / 'train.yaml'}: network and projection must be torch modules.")
    return network, head


DEFAULT_CASES = 8
FEATURES, PROJECTED = "encoder features", "projected features"


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
    """Dense and projected features of sampled voxels before and after training: plots and class separation.

    Before training the network is as its seed (and ``--init``) made it. Voxels are drawn once, evenly over the
    classes, and are the same in all sets.

    Args:
        run: a trained run.
        dataset: scans with label maps.
        out: folder for ``pca.png``, ``tsne.png``, ``separation.csv``, ``separation.json`` and ``projector/``.
        cases: names; by default up to 8 labelled cases that the run did not train on.
        voxels: how many over all cases.
        seed: of the draw and of t-SNE.
        device: where the network runs.
        trust: run code in the run's configs that medseg did not write on this computer.

    Returns:
        the content of ``separation.json``.

    Raises:
        RunError: not a trained run, or one that needs trust. DataError: no labelled case, or other channels than the run's.
    """
    if not (is_planned(run) and is_started(run)):
        raise RunError(f"{run} is not a trained run. Train it first: medseg train DATASET --out {run}.")
    plan = read_plan(run / "configs" / "plan.json")
    chosen, sentence = _choose(run, dataset, cases)
    if len(dataset.channels) != len(plan["channels"]):
        raise DataError(
            f"{dataset.root} has {counted(len(dataset.channels), 'channel')} per scan, but the run was trained with "
            f"{len(plan['channels'])}."
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    networks = networks_of(run, where, trust)
    preprocessing = scan_preprocessing(run, trust)
    features, labels, scans = sample_features(
        preprocessing, plan, dataset, chosen, networks, voxels, seed, where
    )
    classes = [name.encode(errors="backslashreplace").decode() for name in plan["labels"]]
    sets = [Embedding(f"{FEATURES}, {when}", rows.numpy()) for when, rows in features.items()]
    heads, note = heads_of(run, trust)
    with torch.no_grad():
        for when, head in heads.items():
            sets.append(Embedding(f"{PROJECTED}, {when}", head(features[when]).float().numpy()))
    rows = [
        {"vectors": s.name, "width": s.vectors.shape[1]} | class_separation(s.vectors, labels, scans, seed)
        for s in sets
    ]
    out.mkdir(parents=True, exist_ok=True)
    _draw(sets, labels, classes, seed, out)
    _write_projector(sets, labels, [chosen[i].name for i in scans], classes, out / "projector")
    result = {
        "run": str(run),
        "cases": [case.name for case in chosen],
        "voxels": {name: int((labels == c).sum()) for c, name in enumerate(classes)},
        "separation": rows,
        "sentences": [sentence, *([note] if note else []), *(_sentence(row) for row in rows)],
    }
    write_text(out / "separation.json", json.dumps(result, indent=1) + "\n")
    write_csv(out / "separation.csv", list(rows[0]), rows)
    return result


def _choose(run: Path, dataset: Dataset, names: Iterable[str] | None) -> tuple[list[Case], str]:
    if names is not None:
        labelled = dataset.select(names).labelled
        sentence = f"{counted(len(labelled), 'scan')}, as named."
    else:
        trained = trained_on(run, dataset)
        unseen = tuple(case for case in dataset.labelled if case.name not in trained)
        labelled = (unseen or dataset.labelled)[:DEFAULT_CASES]
        sentence = (
            f"{counted(len(labelled), 'scan')} that the run {'did not train' if unseen else 'trained'} on."
        )
    if not labelled:
        raise DataError(
            f"{dataset.root}: none of the cases has a label map. Label maps are needed to compare classes."
        )
    return list(labelled), sentence


def _draw(sets: Sequence[Embedding], labels: Any, classes: Sequence[str], seed: int, out: Path) -> None:
    panels = []
    for name, vectors in sets:
        points, shares = principal_components(vectors)
        panels.append((f"{name} ({100 * sum(shares):.0f} % of the variance)", points))
    scatter_figure(panels, labels, classes, "Voxels by their first two principal components", out / "pca.png")
    maps = [(name, t_sne(vectors, seed)) for name, vectors in sets]
    scatter_figure(maps, labels, classes, "Voxels by t-SNE", out / "tsne.png")


def _write_projector(
    sets: Sequence[Embedding], labels: Any, cases: Sequence[str], classes: Sequence[str], folder: Path
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)  # a projector appends
    metadata = [[classes[int(c)], case] for c, case in zip(labels, cases, strict=True)]
    with SummaryWriter(str(folder)) as writer:
        for name, vectors in sets:
            tag = name.replace(", ", "_").replace(" ", "_")
            writer.add_embedding(
                torch.from_numpy(vectors), metadata, tag=tag, metadata_header=["class", "case"]
            )


def _sentence(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return (
        f"{row['vectors']}: silhouette {number(row['silhouette'])}, linear probe {number(row['linear_probe'])} "
        f"(balanced accuracy), collapse {number(row['collapse'])}."
    )
