"""What follows from the rest of a run: metadata.json, the model card, the network in the configs, JSON twins."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from medseg_supcon import __version__
from medseg_supcon.bundle.configs import cases_of, read_config
from medseg_supcon.bundle.folder import shared_folder
from medseg_supcon.bundle.metadata import loss_in_words, metadata_of, train_config
from medseg_supcon.errors import RunError
from medseg_supcon.files import read_json, write_text
from medseg_supcon.networks import build_network
from medseg_supcon.text import counted, markdown_text

TEMPLATE = "segmentation/docs/README.md.j2"


def write_metadata(run: Path) -> None:
    """Write ``configs/metadata.json``, valid against MONAI's ``meta_schema_20240725``.

    Keys that a user may have edited in an earlier one (version, changelog, authors, references, ...) are kept.

    Raises:
        RunError: ``configs/plan.json`` is missing or damaged.
    """
    write_text(run / "configs" / "metadata.json", _json(metadata_of(run)))


def write_model_card(run: Path) -> None:
    """Write ``docs/README.md`` from the plan, the lists of cases, the history and the evaluation.

    Raises:
        RunError: ``configs/plan.json`` is missing or damaged.
    """
    text = (shared_folder("bundles") / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=markdown_text,
    )
    plan = read_json(run / "configs" / "plan.json")
    metrics = run / "eval" / "metrics.json"
    config, cases = train_config(run), cases_of(run)
    card = environment.from_string(text).render(
        plan=plan,
        counted=counted,
        version=__version__,
        cases={name: len(items) for name, items in cases.items()},
        seen=sum(item in cases.get("training", ()) for item in cases.get("validation", ())),
        recipe=_recipe(config),
        loss=loss_in_words(config),
        network=_network_name(plan["network_def"]),
        parameters=sum(p.numel() for p in build_network(plan["network_def"], trust=True).parameters()),
        history=_history(run / "logs" / "history.csv"),
        metrics=read_json(metrics) if metrics.is_file() else {},
        curves=(run / "docs" / "curves.png").is_file(),
    )
    write_text(run / "docs" / "README.md", card)


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of train.yaml that readers of the card want; without expressions and keys that nothing uses."""
    wanted = ("recipe", "seed", "learning_rate", "contrast_weight", "temperature", "contrast_samples")
    used = {"recipe", *re.findall(r"@(\w+)", repr(config))}  # two_stage does not use the contrast's weight
    if "contrast_weight" in used and config.get("contrast_weight") == 0:
        used -= {"temperature", "contrast_samples"}
    return {k: config[k] for k in wanted if k in used and not str(config.get(k, "$")).startswith(("$", "@"))}


def _network_name(network_def: Mapping[str, Any] | str) -> str:
    named = re.findall(r"\bnets\.(\w+)", str(network_def))
    if not named and isinstance(network_def, Mapping):
        named = [str(network_def["_target_"]).rsplit(".", 1)[-1]]
    return " and ".join(named) if named else "see network_def in configs/plan.json"


def _history(path: Path) -> dict[str, Any]:
    """Length, time and best validation Dice of the training so far; empty before training."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        validated = [(float(r["val_mean_dice"]), int(r["epoch"])) for r in rows if r.get("val_mean_dice")]
        dice, epoch = max((v for v in validated if isfinite(v[0])), default=(None, None), key=itemgetter(0))
        if not rows:
            return {}
        return {
            "epochs": int(rows[-1]["epoch"]),
            "steps": int(rows[-1]["step"]),
            "minutes": round(sum(float(r["seconds"]) for r in rows) / 60, 1),
            "best_dice": dice,
            "best_epoch": epoch,
        }
    except (KeyError, ValueError, TypeError, csv.Error):
        raise RunError(f"{path} is damaged. Copy it again, or delete it: only its curves are lost.") from None


def write_network(run: Path) -> None:
    """Write the plan's network into the configs that repeat it (``network_def``); comments stay.

    Raises:
        RunError: ``configs/plan.json`` is missing or damaged.
    """
    text = json.dumps(read_json(run / "configs" / "plan.json")["network_def"])  # JSON is YAML
    for path in sorted((run / "configs").glob("*.yaml")):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"(?m)^network_def:.*(\n[ -].*)*$", lambda _: f"network_def: {text}", old)
        if new != old:
            write_text(path, new)


def write_twins(run: Path) -> None:
    """Write a ``.json`` of equal content for every ``.yaml`` of ``configs``, for tools that read JSON.

    Raises:
        RunError: a config is not YAML.
    """
    for path in sorted((run / "configs").glob("*.yaml")):
        write_text(path.with_suffix(".json"), _json(read_config(path)))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
