"""A run's folder: for one command at a time, and written whole or not at all; the folders that ship."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.files import folder_lock

TEMPLATE = "segmentation"
DRAFT = ".planning"  # where a run is written until it is whole
PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(name: str) -> Path:
    """``bundles`` or ``configs``: under ``_share`` in the wheel, beside the package in a checkout."""
    for root in (PACKAGE / "_share", PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"The folder {name!r} is missing from this installation. Install medseg-supcon again.")


def is_planned(run: Path) -> bool:
    """Whether a folder contains a planned run."""
    # not Path.is_file, which raises for a name that is too long and a folder without permission
    return all(os.path.isfile(run / "configs" / name) for name in ("plan.json", "train.yaml"))  # noqa: PTH113


def is_started(run: Path) -> bool:
    """Whether training has written weights or a checkpoint."""
    return (run / "models" / "model.pt").exists() or (run / "models" / "checkpoint.pt").exists()


@contextmanager
def at_work_in(run: Path) -> Iterator[None]:
    """Refuse other commands in the folder meanwhile. The ranks of torchrun, which share a run, do not call this.

    Raises:
        RunError: another command is working in the folder.
    """
    with folder_lock(run, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg is working in {run}. Wait until it has finished, or choose another --out.")
        yield


@contextmanager
def drafted(run: Path) -> Iterator[Path]:
    """A folder with the bundle's template, which becomes the run at the end; after an error nothing is left.

    Raises:
        RunError: the folder already contains a run, or files that one would replace, or another command is working
            in it.
    """
    fresh, draft = not run.exists(), run / DRAFT
    run.mkdir(parents=True, exist_ok=True)
    with at_work_in(run):
        refuse_others(run)  # what came meanwhile
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        try:
            _write_template(draft)
            yield draft
            for part in sorted(draft.iterdir(), key=lambda part: part.name == "configs"):  # makes it a run
                part.rename(run / part.name)
            draft.rmdir()
        except BaseException:
            shutil.rmtree(run if fresh else draft, ignore_errors=True)
            raise


def refuse_others(run: Path) -> None:
    """Refuse a folder that contains a run, or files that one would replace."""
    if is_planned(run):
        raise RunError(
            f"{run} already contains a run. Choose another --out, or continue it with medseg train --resume."
        )
    there = [p.name for p in sorted((shared_folder("bundles") / TEMPLATE).iterdir()) if (run / p.name).exists()]
    if there:
        raise RunError(f"{run} contains {' and '.join(there)} that medseg did not write. Choose another --out.")


def _write_template(run: Path) -> None:
    template = shared_folder("bundles") / TEMPLATE
    run.mkdir(parents=True)
    for source in sorted(template.rglob("*")):
        target = run / source.relative_to(template)
        left_out = source.suffix in (".j2", ".pyc") or source.name in ("train.yaml", "metadata.json")
        if source.is_file() and not left_out:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
