"""The gate: a run from elsewhere is data until it is trusted.

A run's configs and plan are code if they contain more than plain values. They may be evaluated if the user passed
``--trust``, or if every piece of code in them is the shipped template's, a shipped recipe's, or was written by this
user's medseg on this machine, which keeps a record outside the run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from medseg_supcon.bundle.folder import TEMPLATE, read_config, shared_folder
from medseg_supcon.bundle.settings import SEPARATOR, merge, read_recipe, recipe_names
from medseg_supcon.errors import RunError
from medseg_supcon.files import write_text
from medseg_supcon.networks import definition_problem
from medseg_supcon.plan import intensity_problem, read_plan

CODE_SIGNS = ("$", "@", "%")  # MONAI's expressions, references and macros
PATHS = ("dataset_dir", "output_dir", "init_weights")  # the user's paths, which may contain such signs
CONFIGS = ("train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate")
FREE = ("bundle_root", "dataset_dir", "output_dir", "device", "amp")  # what a run's inference.yaml may set
NETWORK = "network_def"
ABSENT = object()
CURE = "It may run any code on this computer. Read it, and pass --trust (trust=True) if you trust its author."
_written: set[str] = set()  # by this process: where the record cannot be written
Code = tuple[str, str, Any]  # file below configs/, key, value


def code_in(config: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of each leaf of a config that makes MONAI call, evaluate or look up something.

    >>> list(code_in({"seed": 1, "amp": "$1/0", "view_1": [{"_target_": "os.system"}]}))
    [('amp', '$1/0'), ('view_1::0::_target_', 'os.system')]
    """
    return ((key, value) for key, value in _leaves(config) if _is_code(key, value))


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a container, or is an empty one, with its key in MONAI's notation."""
    if not (node and isinstance(node, Mapping | list)):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        part = str(name).replace("#", SEPARATOR)
        yield from _leaves(value, f"{key}{SEPARATOR}{part}" if key else part)


def _is_code(key: str, value: Any) -> bool:
    if any(part.startswith(("_", "+", "~", *CODE_SIGNS)) for part in key.split(SEPARATOR)):
        return True
    if not (isinstance(value, str) and value.startswith(CODE_SIGNS)):
        return False
    return key not in PATHS or plain_text(value) is None


def plain_text(value: Any) -> str | None:
    """A text as it is, or the one that `medseg_supcon.plan.literal` wrote as an expression; None for all else.

    >>> plain_text("/data"), plain_text("$'/data/site\\x232'"), plain_text("$open('x')")
    ('/data', '/data/site#2', None)
    """
    if not isinstance(value, str) or not value.startswith(CODE_SIGNS):
        return value if isinstance(value, str) else None
    try:
        text = ast.literal_eval(value[1:]) if value.startswith("$") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def is_plain_run(run: Path, plan: Mapping[str, Any], trust: bool) -> bool:
    """Whether a run predicts by its plan alone: plan.json is plain data, and inference.yaml is the shipped one.

    False: its inference.yaml may be evaluated. RunError: it may not, since it is neither recorded nor trusted. Plain
    values of ``bundle_root``, ``dataset_dir``, ``output_dir``, ``device`` and ``amp`` may differ from the shipped ones.
    """
    if trust:
        return next(_unlike_shipped(run, plan), None) is None
    unlike = list(_unlike_shipped(run, plan))
    known = known_code() if unlike else set()
    for name, key, value in unlike:
        if name != "plan.json" and not _is_code(key, value):
            file = run / "configs" / name
            raise RunError(f"{file}: {key} differs from the inference config that medseg writes. {CURE}")
        _refuse_unknown(run / "configs" / name, (name, key, value), known)
    if unlike:  # the configs are evaluated, and may call the scripts
        _check_files(run)
    return not unlike


def check_configs_trusted(run: Path, trust: bool) -> None:
    """Passes if all configs of a run may be evaluated; called before any of them is.

    RunError, with file and key, if the user did not pass ``--trust``, and a config, the plan, metadata.json,
    logging.conf or a script holds code that is neither shipped nor written by this user's medseg.
    """
    if trust:
        return
    known = known_code()
    for code, shipped in _code_of(run):
        if not shipped:
            _refuse_unknown(run / "configs" / code[0], code, known)
    _check_files(run)


def check_network_trusted(source: Path, plan: Mapping[str, Any], trust: bool) -> None:
    """Passes if the network and intensity transforms of a plan alone, read from ``source``, may be built."""
    for code in () if trust else _code_of_plan(plan):
        _refuse_unknown(source, code, known_code())


def _refuse_unknown(file: Path, code: Code, known: set[str]) -> None:
    if _digest(*code) not in known:
        shown = repr(code[2])
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise RunError(f"{file}: {code[1]} is {shown}, which medseg did not write on this computer. {CURE}")


def record_run(run: Path) -> None:
    """Remember the code in a run's configs as written by this user's medseg on this machine.

    The record is a file of digests under ``$XDG_STATE_HOME/medseg`` (by default ``~/.local/state/medseg``), named by
    its content, so that runs may be moved and several processes may write. That it cannot be written is no error.
    """
    digests = sorted({_digest(*code) for code, _ in _code_of(run)})
    text = json.dumps(digests, indent=0) + "\n"
    _written.update(digests)
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        path = _records() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if not path.exists():
            write_text(path, text)


def known_code() -> set[str]:
    """The digests of all code that was recorded."""
    known = set(_written)
    with suppress(OSError, RuntimeError):
        for path in _records().glob("*.json"):
            with suppress(OSError, ValueError):
                known.update(json.loads(path.read_text(encoding="utf-8")))
    return known


def _records() -> Path:
    folder = os.environ.get("XDG_STATE_HOME")
    return (Path(folder) if folder else Path.home() / ".local" / "state") / "medseg" / "runs"


def _digest(name: str, key: str, value: Any) -> str:
    """Of the file's name without its ending: YAML and JSON twin hold the same code."""
    text = json.dumps([name.partition(".")[0], key, value], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _code_of(run: Path) -> Iterator[tuple[Code, bool]]:
    """Every piece of code in a run's configs and plan, and whether it is a shipped one."""
    configs = run / "configs"
    for stem in CONFIGS:
        twins = _twins(configs, stem)
        shipped = _shipped(stem, next(iter(twins.values()), {}).get("recipe"))
        for name, content in twins.items():
            network = content.pop(NETWORK, None)
            if network is not None and definition_problem(network) is not None:
                yield (name, NETWORK, network), False
            yield from (((name, *code), shipped.get(code[0], ABSENT) == code[1]) for code in code_in(content))
    if (configs / "metadata.json").is_file():
        metadata = read_config(configs / "metadata.json")
        yield from ((("metadata.json", *code), False) for code in code_in(metadata))
    yield from ((code, False) for code in _code_of_plan(read_plan(configs / "plan.json")))


def _code_of_plan(plan: Mapping[str, Any]) -> Iterator[Code]:
    for key, problem_of in ((NETWORK, definition_problem), ("intensity", intensity_problem)):
        if problem_of(plan[key]) is not None:
            yield "plan.json", key, plan[key]


def _unlike_shipped(run: Path, plan: Mapping[str, Any]) -> Iterator[Code]:
    """What keeps a run from being built from its plan as plain data."""
    yield from _code_of_plan(plan)
    shipped = _shipped("inference", None)
    for name, content in _twins(run / "configs", "inference").items():
        network = content.pop(NETWORK, ABSENT)
        if network != plan[NETWORK]:
            yield name, NETWORK, network
        given = dict(_leaves(content))
        for key in {**shipped, **given}:
            value = given.get(key)
            same = shipped.get(key, ABSENT) == given.get(key, ABSENT)
            if not same and (key.split(SEPARATOR)[0] not in FREE or _is_code(key, value)):
                yield name, key, value


def _twins(configs: Path, stem: str) -> dict[str, dict[str, Any]]:
    """File name -> content of a config and of its JSON twin, of those that exist."""
    paths = (configs / f"{stem}.yaml", configs / f"{stem}.json")
    return {path.name: read_config(path) for path in paths if path.is_file()}


def _shipped(stem: str, recipe: Any) -> dict[str, Any]:
    """The leaves of a template's config; of train.yaml with a shipped recipe laid over it."""
    tree = read_config(shared_folder("bundles") / TEMPLATE / "configs" / f"{stem}.yaml")
    if stem == "train" and isinstance(recipe, str) and recipe in recipe_names():
        merge(tree, read_recipe(recipe), "train.yaml")
    tree.pop(NETWORK, None)  # the plan's, not the template's
    return dict(_leaves(tree))


def _check_files(run: Path) -> None:
    """Refuse a logging.conf or a file of scripts/, which Python may run, that differs from the shipped one."""
    template = shared_folder("bundles") / TEMPLATE
    for path in (run / "configs" / "logging.conf", *sorted((run / "scripts").rglob("*"))):
        shipped = template / path.relative_to(run)
        if path.is_file() and not (shipped.is_file() and shipped.read_bytes() == path.read_bytes()):
            raise RunError(f"medseg did not write {path}. {CURE}")
