"""A config that carries the plan in itself, for places where the run's folder is not at hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from medseg_supcon.data import literal
from medseg_supcon.errors import RunError

CONFIGS = ("inference", "evaluate", "train")


def self_contained(config: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle config whose ``plan`` is the plan's content instead of a file's.

    The plan becomes an expression, not a sub-tree: its ``_target_`` entries must stay data until the config
    builds them.

    Args:
        config: a config's content with a key ``plan``; one without is copied as it is.
        plan: the content of ``plan.json``.

    Example:
        >>> from monai.bundle import ConfigParser
        >>> config = self_contained({"plan": "$open('plan.json')"}, {"name": "import a@b#c"})
        >>> ConfigParser(config).get_parsed_content("plan")
        {'name': 'import a@b#c'}
    """
    whole = copy.deepcopy(dict(config))
    if "plan" in whole:
        whole["plan"] = literal(dict(plan))
        if "network_json" in whole:
            whole["network_json"] = json.dumps(plan["network_def"])
    return whole


def extra_files(run: Path, plan: Mapping[str, Any]) -> dict[str, str]:
    """name -> JSON text of a run's plan, metadata and configs, each config self-contained."""
    files = {"plan.json": json.dumps(plan)}
    metadata = run / "configs" / "metadata.json"
    if metadata.is_file():
        files["metadata.json"] = metadata.read_text(encoding="utf-8")
    for name in CONFIGS:
        path = run / "configs" / f"{name}.yaml"
        if path.is_file():
            files[f"{name}.json"] = json.dumps(self_contained(_config(path), plan))
    return files


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = ConfigParser.load_config_file(str(path))
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}). Restore it.") from error
    if not isinstance(config, Mapping):
        raise RunError(f"{path} holds no config, but {type(config).__name__}. Restore it.")
    return config
