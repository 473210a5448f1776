"""A run's folder: used by one command at a time, created completely or not at all, its configs read as plain data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from medseg_supcon.datasets import read_datalist
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.files import folder_lock, read_json

TEMPLATE = "segmentation"
FOLDS = "folds.json"  # in a folder of ``medseg train --folds``
DRAFT = ".planning"  # where a run is written until it is complete
NOT_COPIED = ("README.md.j2", "train.yaml", "metadata.json")  # of the template: what is written for each run
PACKAGE = Path(__file__).resolve().parents[1]
MOST_BYTES = 2**20
MOST_FOLDS = 1000


def shared_folder(name: str) -> Path:
    """``bundles`` or ``configs``: under ``_share`` in the wheel, beside the package in a checkout."""
    for root in (PACKAGE / "_share", PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"The folder {name!r} is missing from this installation. Install medseg-supcon again.")


def shipped_runs() -> list[str]:
    """Names of the trained bundles that come with this package."""
    return sorted(path.parents[1].name for path in shared_folder("bundles").glob("*/models/model.pt"))


def find_run(run: str | Path) -> Path:
    """The folder of a run: the path as it is, or that of a bundle that ships, by its name, such as ``"hippocampus"``.

    A run of that name in the working directory is used instead. If something else there has the name, this raises RunError.
    """
    path = Path(run)
    if path.name != str(run) or is_planned(path) or has_folds(path) or path.name not in shipped_runs():
        return path
    if os.path.lexists(path):
        raise RunError(
            f"{path} in the working directory is not a run: it has no configs/plan.json. It hides the bundle of that name, "
            "which comes with medseg. Rename it, or work in another folder."
        )
    return shared_folder("bundles") / path


def is_planned(run: Path) -> bool:
    """Whether a folder contains a planned run."""
    # not Path.is_file, which raises for a name that is too long and a folder without permission
    return all(os.path.isfile(run / "configs" / name) for name in ("plan.json", "train.yaml"))  # noqa: PTH113


def is_started(run: Path) -> bool:
    """Whether training has written weights or a checkpoint."""
    return (run / "models" / "model.pt").exists() or (run / "models" / "checkpoint.pt").exists()


def has_folds(folder: Path) -> bool:
    """Whether a folder is one of ``medseg train --folds``: its runs are fold_0, fold_1, ..."""
    return os.path.isfile(folder / FOLDS)  # noqa: PTH113 - as above


def member_runs(run: str | Path) -> list[Path]:
    """The folds of a folder of ``medseg train --folds``; any other run (`find_run`) alone."""
    path = find_run(run)
    if not has_folds(path):
        return [path]
    number = read_json(path / FOLDS).get("folds")
    if not isinstance(number, int) or not 2 <= number <= MOST_FOLDS:
        raise RunError(
            f'{path / FOLDS}: "folds" must be a number from 2 to {MOST_FOLDS}, found {number!r}. Restore it.'
        )
    return [path / f"fold_{index}" for index in range(number)]


@contextmanager
def at_work_in(run: Path) -> Iterator[None]:
    """Refuse other commands in the folder meanwhile. The ranks of torchrun, which share a run, do not call this."""
    with folder_lock(run, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg is working in {run}. Wait until it has finished, or choose another --out.")
        yield


@contextmanager
def drafted(run: Path) -> Iterator[Path]:
    """A folder with the bundle's template, which becomes the run at the end; after an error nothing is left."""
    fresh, draft, template = not run.exists(), run / DRAFT, shared_folder("bundles") / TEMPLATE
    run.mkdir(parents=True, exist_ok=True)
    with at_work_in(run):
        refuse_others(run)  # files that appeared meanwhile
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        try:
            for source in template.rglob("*"):
                if source.is_file() and source.suffix != ".pyc" and source.name not in NOT_COPIED:
                    target = draft / source.relative_to(template)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
            yield draft
            for part in sorted(draft.iterdir(), key=lambda part: part.name == "configs"):  # makes it a run
                part.rename(run / part.name)
            draft.rmdir()
        except BaseException:
            shutil.rmtree(run if fresh else draft, ignore_errors=True)
            raise


def refuse_others(run: Path) -> None:
    """Refuse a folder that contains a run, or files that one would replace."""
    if is_planned(run) or has_folds(run):
        raise RunError(f"{run} already contains a run. Choose another --out, or continue with medseg train --resume.")
    there = [p.name for p in sorted((shared_folder("bundles") / TEMPLATE).iterdir()) if (run / p.name).exists()]
    if there:
        raise RunError(f"{run} contains {' and '.join(there)} that medseg did not write. Choose another --out.")


class PlainLoader(yaml.SafeLoader):
    """Refuses aliases (nested ones expand a small file into billions of values) and keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains an alias (*name). Write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag in ("binary", "omap", "pairs", "set", "timestamp"):  # JSON, and so a config's twin, does not have them
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON config, as MONAI would read it, nothing evaluated; RunError if there is none."""
    content = parse(read_small(path, str(path)), str(path))
    if not isinstance(content, dict):
        raise RunError(f"{path} must map keys to values, found {type(content).__name__}. Restore the file.")
    return content


def read_small(path: Path, source: str, error: type[MedsegError] = RunError) -> str:
    """The text of a config; ``source`` is its name in the error."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise error(f"{source} is larger than 1 MiB, so it is not a config. Restore or replace it.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{source} is not in UTF-8 (byte {fault.start + 1}). Save it in UTF-8.") from None
    except OSError as fault:
        raise error(f"{source} cannot be read ({fault.strerror}).") from None


def parse(text: str, source: str, error: type[MedsegError] = RunError, loader: Any = PlainLoader) -> Any:
    """The value of a YAML text, or of a JSON text if ``source``, its name in the error, ends so."""
    kind = "JSON" if source.endswith(".json") else "YAML"
    try:
        return json.loads(text) if kind == "JSON" else deepcopy(_load_yaml(text, loader))
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise error(f"{source} is not valid {kind}: {' '.join(str(fault).split())[:300]}.") from None


@lru_cache(maxsize=32)  # a training reads a dozen texts fifty times, and PyYAML takes a tenth of a second for each
def _load_yaml(text: str, loader: Any) -> Any:
    return yaml.load(text, loader)


def cases_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases in ``configs/datalist.json`` of a run: section -> items; empty if the file does not exist."""
    path = run / "configs" / "datalist.json"
    return read_datalist(path) if path.is_file() else {}
