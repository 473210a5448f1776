"""``medseg embed``: what a run's network makes of voxels, before training and after."""

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

from medseg_supcon.bundle import is_planned, is_started
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
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.plan import literal, read_plan
from medseg_supcon.training import load_tensors

BEFORE, AFTER = "before training", "after training"
HEAD = "projection."  # its part of the names in checkpoint.pt


def networks_of(run: Path, device: torch.device) -> dict[str, ContrastiveNetwork]:
    """The run's network as its seed (and its ``--init``) made it, and as training left it; in evaluation mode.

    Raises:
        RunError: the weights do not fit the plan's network.
    """
    before = _begun(run, "network")
    after = _config(run).get_parsed_content("network_def")
    try:
        after.load_state_dict(load_tensors(run / "models" / "model.pt"))
    except RuntimeError as error:
        raise RunError(
            f"{run}: models/model.pt does not fit network_def of the plan ({str(error).splitlines()[0]})."
        ) from None
    made = {BEFORE: before, AFTER: after}
    return {when: ContrastiveNetwork(network).to(device).eval() for when, network in made.items()}


def heads_of(run: Path) -> tuple[dict[str, nn.Module], str]:
    """The projection head before and after training, or none and a sentence that says why."""
    parser = _config(run)
    checkpoint = run / "models" / "checkpoint.pt"
    if parser.get("projection") is None:
        return {}, "The run has no projection head: features only."
    if "contrast_weight" in parser and parser.get_parsed_content("contrast_weight") == 0:
        return {}, "The run's contrast weight is 0, its projection head was not trained: features only."
    if not checkpoint.exists():
        return {}, "The run has no models/checkpoint.pt, which holds the projection head: features only."
    saved = load_tensors(checkpoint)["state"]["loss"]
    prefixes = sorted({key.split(HEAD, 1)[0] for key in saved if HEAD in key}, key=len)
    if not prefixes:
        return {}, "The run has not kept its projection head: features only."
    prefix = prefixes[0] + HEAD
    heads: dict[str, nn.Module] = {when: _begun(run, "projection").eval() for when in (BEFORE, AFTER)}
    heads[AFTER].load_state_dict(
        {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    )
    return heads, ""


def _config(run: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = literal(str(run))
    parser["device"] = (
        "$torch.device('cpu')"  # what a run began from does not depend on where it is looked at
    )
    return parser


def _begun(run: Path, key: str) -> Any:
    """``network`` or ``projection`` as the run's seed makes it; the head is drawn after the network."""
    parser = _config(run)
    set_determinism(seed=int(parser.get_parsed_content("seed")))
    network = parser.get_parsed_content("network")
    made = network if key == "network" else parser.get_parsed_content(key)
    set_determinism(seed=None)
    return made


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
) -> dict[str, Any]:
    """Dense and projected features of sampled voxels before and after training: pictures and class separation.

    Before training is the run's network as its seed (and its ``--init``) made it. Voxels are drawn once, evenly
    over classes, and are the same in all sets.

    Args:
        run: a trained run.
        dataset: scans with label maps.
        out: folder for ``pca.png``, ``tsne.png``, ``separation.csv``, ``separation.json`` and ``projector/``.
        cases: names; by default up to 8 labelled cases that the run did not train on.
        voxels: over all cases.
        seed: of the draw and of t-SNE.
        device: where the network runs.

    Returns:
        what ``separation.json`` holds.

    Raises:
        RunError: not a trained run. DataError: no labelled case, or other channels than the run's.
    """
    if not (is_planned(run) and is_started(run)):
        raise RunError(f"{run} is not a trained run. Train it first: medseg train DATASET --out {run}.")
    plan = read_plan(run / "configs" / "plan.json")
    chosen, told = _choose(run, dataset, cases)
    if len(dataset.channels) != len(plan["channels"]):
        raise DataError(
            f"{dataset.root} has {len(dataset.channels)} channel(s) per scan, the run {len(plan['channels'])}."
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    networks = networks_of(run, where)
    features, labels, scans = sample_features(run, plan, dataset, chosen, networks, voxels, seed, where)
    classes = list(plan["labels"])
    sets = [Embedding(f"{FEATURES}, {when}", rows.numpy()) for when, rows in features.items()]
    heads, note = heads_of(run)
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
    found = {
        "run": str(run),
        "cases": [case.name for case in chosen],
        "voxels": {name: int((labels == c).sum()) for c, name in enumerate(classes)},
        "separation": rows,
        "sentences": [told, *([note] if note else []), *(_sentence(row) for row in rows)],
    }
    write_text(out / "separation.json", json.dumps(found, indent=1) + "\n")
    write_csv(out / "separation.csv", list(rows[0]), rows)
    return found


def _choose(run: Path, dataset: Dataset, names: Iterable[str] | None) -> tuple[list[Case], str]:
    if names is not None:
        labelled = dataset.select(names).labelled
        told = f"{_scans(labelled)}, as named."
    else:
        lists = json.loads((run / "configs" / "datalist.json").read_text())
        trained = {item["name"] for item in lists["training"]}
        unseen = tuple(case for case in dataset.labelled if case.name not in trained)
        labelled = (unseen or dataset.labelled)[:DEFAULT_CASES]
        told = f"{_scans(labelled)} that the run {'did not train' if unseen else 'trained'} on."
    if not labelled:
        raise DataError(
            f"{dataset.root}: none of the cases has a label map. Classes are needed to tell voxels apart."
        )
    return list(labelled), told


def _scans(cases: Sequence[Case]) -> str:
    return f"{len(cases)} scan{'' if len(cases) == 1 else 's'}"


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
