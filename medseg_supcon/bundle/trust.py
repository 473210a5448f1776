"""The gate: a run from elsewhere is data until it is trusted.

A run's configs and plan are code if they contain more than plain values. They may be evaluated if the user passed
``--trust``, or if every piece of code in them is the shipped template's, a shipped recipe's, or was written by this
user's medseg on this machine, which keeps a record outside the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from medseg_supcon.bundle.configs import is_code, leaves, read_config
from medseg_supcon.bundle.folder import TEMPLATE, shared_folder
from medseg_supcon.bundle.settings import merge, read_recipe, recipe_names
from medseg_supcon.errors import RunError
from medseg_supcon.files import write_text
from medseg_supcon.networks import definition_problem
from medseg_supcon.plan import intensity_problem, read_plan

CONFIGS = ("train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate")
FREE = ("bundle_root", "dataset_dir", "output_dir", "device", "amp")  # what a run's inference.yaml may set
NETWORK = "network_def"
ABSENT = object()
CURE = "It may run any code on this computer. Read it, and pass --trust (trust=True) if you trust its author."
_written: set[str] = set()  # by this process: where the record cannot be written
Code = tuple[str, str, Any]  # file below configs/ without its ending, key, value


def is_plain_run(run: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a run predicts by its plan alone: plan.json is plain data, and inference.yaml is the shipped one.

    Only ``bundle_root``, ``dataset_dir``, ``output_dir``, ``device`` and ``amp`` may differ, if they are plain.

    Raises:
        RunError: inference.yaml or its JSON twin cannot be read.
    """
    return next(_unlike_shipped(run, plan), None) is None


def check_plan_trusted(run: Path, plan: Mapping[str, Any], trust: bool) -> None:
    """Passes if a network and preprocessing of a run may be built by evaluating its plan and inference.yaml.

    Raises:
        RunError: they are more than plain data, not recorded, and the run is not trusted.
    """
    if trust:
        return
    known = None
    for name, key, value in _unlike_shipped(run, plan):
        known = known_code() if known is None else known
        if not is_code(key, value) and name != "plan.json":
            raise RunError(
                f"{run / 'configs' / name}: {key} differs from the inference config that medseg writes. {CURE}"
            )
        if _digest(name, key, value) not in known:
            raise _refusal(run / "configs" / name, key, value)
    if known is not None:  # the configs are evaluated, and may call the scripts
        _check_files(run)


def check_configs_trusted(run: Path, trust: bool) -> None:
    """Passes if all configs of a run may be evaluated; called before any of them is.

    Args:
        run: the run's folder.
        trust: the user passed ``--trust``.

    Raises:
        RunError: a config, the plan, metadata.json, logging.conf or a script holds code that is neither shipped
            nor written by this user's medseg; the message names file and key.
    """
    if trust:
        return
    known = None
    for name, key, value, shipped in _code_of(run):
        if shipped:
            continue
        known = known_code() if known is None else known
        if _digest(name, key, value) not in known:
            raise _refusal(run / "configs" / name, key, value)
    _check_files(run)


def check_network_trusted(source: Path, plan: Mapping[str, Any], trust: bool) -> None:
    """Passes if the network and intensity transforms of a plan alone may be built.

    Args:
        source: the plan's file, for the message.
        plan: its content.
        trust: the user passed ``--trust``.

    Raises:
        RunError: they are code that is not recorded, and the run is not trusted.
    """
    if trust:
        return
    for name, key, value in _code_of_plan(plan):
        if _digest(name, key, value) not in known_code():
            raise _refusal(source, key, value)


def record_run(run: Path) -> None:
    """Remember the code in a run's configs as written by this user's medseg on this machine.

    The record is a file of digests under ``$XDG_STATE_HOME/medseg`` (by default ``~/.local/state/medseg``), named by
    its content, so that runs may be moved and several processes may write. A record that cannot be written is no
    error: shipped recipes need none.
    """
    digests = sorted({_digest(name, key, value) for name, key, value, _ in _code_of(run)})
    text = json.dumps(digests, indent=0) + "\n"
    _written.update(digests)
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        path = _records() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if not path.exists():
            write_text(path, text)


def known_code() -> set[str]:
    """The digests of all code that was recorded."""
    found = set(_written)
    with suppress(OSError, RuntimeError):
        for path in _records().glob("*.json"):
            with suppress(OSError, ValueError):
                found.update(json.loads(path.read_text(encoding="utf-8")))
    return found


def _records() -> Path:
    folder = os.environ.get("XDG_STATE_HOME")
    return (Path(folder) if folder else Path.home() / ".local" / "state") / "medseg" / "runs"


def _digest(name: str, key: str, value: Any) -> str:
    text = json.dumps([name.partition(".")[0], key, value], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _refusal(file: Path, key: str, value: Any) -> RunError:
    text = repr(value)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return RunError(f"{file}: {key} is {shown}, which medseg did not write on this computer. {CURE}")


def _code_of(run: Path) -> Iterator[tuple[str, str, Any, bool]]:
    """Every piece of code in a run's configs and plan: file, key, value, and whether it is a shipped one."""
    configs = run / "configs"
    for stem in CONFIGS:
        shipped: dict[str, Any] | None = None
        for path in (configs / f"{stem}.yaml", configs / f"{stem}.json"):
            if not path.is_file():
                continue
            content = read_config(path)
            if shipped is None:
                shipped = _shipped(stem, content.get("recipe"))
            network = content.pop(NETWORK, None)
            if network is not None and definition_problem(network) is not None:
                yield path.name, NETWORK, network, False
            for key, value in leaves(content):
                if is_code(key, value):
                    yield path.name, key, value, shipped.get(key, ABSENT) == value
    if (configs / "metadata.json").is_file():
        for key, value in leaves(read_config(configs / "metadata.json")):
            if is_code(key, value):
                yield "metadata.json", key, value, False
    for name, key, value in _code_of_plan(read_plan(configs / "plan.json")):
        yield name, key, value, False


def _code_of_plan(plan: Mapping[str, Any]) -> Iterator[Code]:
    if definition_problem(plan[NETWORK]) is not None:
        yield "plan.json", NETWORK, plan[NETWORK]
    if intensity_problem(plan["intensity"]) is not None:
        yield "plan.json", "intensity", plan["intensity"]


def _unlike_shipped(run: Path, plan: Mapping[str, Any]) -> Iterator[Code]:
    """What keeps a run from being built from its plan as plain data."""
    yield from _code_of_plan(plan)
    shipped = _shipped("inference", None)
    for path in (run / "configs" / "inference.yaml", run / "configs" / "inference.json"):
        if not path.is_file():
            continue
        content = read_config(path)
        network = content.pop(NETWORK, ABSENT)
        if network != plan[NETWORK]:
            yield path.name, NETWORK, network
        found = dict(leaves(content))
        for key in {**shipped, **found}:
            value = found.get(key)
            if shipped.get(key, ABSENT) == found.get(key, ABSENT):
                continue
            if key.split("::")[0] in FREE and not is_code(key, value):
                continue
            yield path.name, key, value


def _shipped(stem: str, recipe: Any) -> dict[str, Any]:
    """The leaves of a template's config; of train.yaml with a shipped recipe laid over it."""
    tree = read_config(shared_folder("bundles") / TEMPLATE / "configs" / f"{stem}.yaml")
    if stem == "train" and isinstance(recipe, str) and recipe in recipe_names():
        merge(tree, read_recipe(recipe), "train.yaml")
    tree.pop(NETWORK, None)  # the plan's, not the template's
    return dict(leaves(tree))


def _check_files(run: Path) -> None:
    """Refuse a logging.conf or a file of scripts/, which Python may run, that differs from the shipped one."""
    template = shared_folder("bundles") / TEMPLATE
    for path in (run / "configs" / "logging.conf", *sorted((run / "scripts").rglob("*"))):
        shipped = template / path.relative_to(run)
        if path.is_file() and not (shipped.is_file() and shipped.read_bytes() == path.read_bytes()):
            raise RunError(f"medseg did not write {path}. {CURE}")
