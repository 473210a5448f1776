"""A run's folder: for one command at a time, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg_supcon.bundle.recipes import shared_folder
from medseg_supcon.errors import RunError
from medseg_supcon.files import folder_lock

TEMPLATE = "segmentation"
DRAFT = ".planning"  # where a run is written until it is whole


def is_planned(run: Path) -> bool:
    """The folder holds a plan."""
    # not Path.is_file, which raises where a name is too long or a folder may not be looked into
    return all(os.path.isfile(run / "configs" / name) for name in ("plan.json", "train.yaml"))  # noqa: PTH113


def is_started(run: Path) -> bool:
    """Training has left something in the folder."""
    return (run / "models" / "model.pt").exists() or (run / "models" / "checkpoint.pt").exists()


@contextmanager
def at_work_in(run: Path) -> Iterator[None]:
    """Other commands are refused meanwhile. The ranks of torchrun, which share a run, do not come through here.

    Raises:
        RunError: another command is at work in the folder.
    """
    with folder_lock(run, wait=False) as free:
        if not free:
            raise RunError(f"Another medseg is at work in {run}. Wait for it, or choose another --out.")
        yield


@contextmanager
def drafted(run: Path) -> Iterator[Path]:
    """A folder with the bundle's template, which becomes the run in the end; where that fails, nothing stays.

    Raises:
        RunError: the folder already holds a run, or what one would replace, or another command is at work in it.
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
    """A folder may hold anything but a run, and what one would replace."""
    if is_planned(run):
        raise RunError(
            f"{run} already holds a run. Choose another --out, or go on with medseg train --resume."
        )
    there = [
        p.name for p in sorted((shared_folder("bundles") / TEMPLATE).iterdir()) if (run / p.name).exists()
    ]
    if there:
        raise RunError(f"{run} holds {' and '.join(there)} of something else. Choose another --out.")


def _write_template(run: Path) -> None:
    template = shared_folder("bundles") / TEMPLATE
    run.mkdir(parents=True)
    for source in sorted(template.rglob("*")):
        target = run / source.relative_to(template)
        if source.is_file() and source.suffix != ".j2" and source.name not in ("train.yaml", "metadata.json"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
