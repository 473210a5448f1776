"""What a run says about itself: metadata.json, the model card, and the JSON twins of its configs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_supcon.files import write_text
from medseg_supcon.training._metadata import metadata_of, read_config, read_json
from medseg_supcon.training._model_card import model_card


def write_metadata(run: Path, metrics: Mapping[str, Any] | None = None) -> None:
    """Write ``configs/metadata.json``, valid against MONAI's ``meta_schema_20240725``.

    What a person put into an earlier one (version, changelog, authors, references, ...) is kept.

    Args:
        run: a planned run.
        metrics: scores for ``eval_metrics``; by default those of ``eval/metrics.json``, where there is one.

    Raises:
        RunError: ``configs/plan.json`` is missing or broken.
    """
    write_text(run / "configs" / "metadata.json", _json(metadata_of(run, metrics)))


def write_model_card(run: Path) -> None:
    """Write ``docs/README.md`` from the plan, the lists of cases, the history and the evaluation.

    Raises:
        RunError: ``configs/plan.json`` is missing or broken.
    """
    write_text(run / "docs" / "README.md", model_card(run))


def write_network(run: Path) -> None:
    """Write the plan's network into the configs that carry it (``network_json``), comments left as they are.

    Raises:
        RunError: ``configs/plan.json`` is missing or broken.
    """
    text = json.dumps(read_json(run / "configs" / "plan.json")["network_def"]).replace("'", "''")
    for path in sorted((run / "configs").glob("*.yaml")):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"(?m)^network_json:.*$", lambda _: f"network_json: '{text}'", old)
        if new != old:
            write_text(path, new)


def write_twins(run: Path) -> None:
    """Write a ``.json`` of equal content beside every ``.yaml`` of ``configs``, for tools that read JSON.

    Raises:
        ConfigError: a config is not YAML.
    """
    for path in sorted((run / "configs").glob("*.yaml")):
        write_text(path.with_suffix(".json"), _json(read_config(path)))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
