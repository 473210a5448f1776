"""Training a planned run, and what follows it: evaluation, curves, model card."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigWorkflow

from medseg_supcon.bundle import (
    at_work_in,
    check_configs_trusted,
    innermost,
    is_planned,
    is_started,
    read_config,
    record_run,
    settings_at_fault,
    write_network,
    write_twins,
)
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.inference import evaluate_validation
from medseg_supcon.networks import build_network, size_divisor
from medseg_supcon.plan import literal, read_plan, validate_plan, write_plan
from medseg_supcon.training.checkpoint import read_checkpoint
from medseg_supcon.training.prepare import refresh_documents
from medseg_supcon.training.ranks import PATIENCE, meet
from medseg_supcon.training.speed import check_device, free_memory

HIGHEST_RATE = 1e3  # far above any that trains
WRITTEN_LAST = ("eval/metrics.json", "docs/curves.png")
OF_EARLIER_WEIGHTS = ("eval/metrics.csv", *WRITTEN_LAST)


def begin_training(run: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse to train over a trained run, and remove the scores of its earlier weights; every rank calls it.

    Raises:
        RunError: the folder holds a trained run, and neither ``resume`` nor ``overwrite`` is set.
    """
    run = Path(run).resolve()
    if is_started(run) and not (resume or overwrite):
        raise RunError(
            f"{run} already holds a trained run. Go on with it (--resume true), train over it (--overwrite true), or "
            "choose another folder."
        )
    if idist.get_rank() > 0 or (resume and is_finished(run)):
        return
    names = OF_EARLIER_WEIGHTS if resume else (*OF_EARLIER_WEIGHTS, "logs/history.csv")
    stale = [run / name for name in names if (run / name).exists()]
    for file in stale:
        file.unlink()
    if stale:
        with torch.random.fork_rng(devices=[]):  # the card builds a network; the run's own is drawn after this
            refresh_documents(run)


def evaluate_and_document(run: str | Path, device: str | torch.device | None = None) -> None:
    """Score a trained run on its validation cases, then write curves, metadata and model card; every rank calls it.

    Of several ranks, rank 0 does it while the others wait; cases that it cannot read are then a warning.
    """
    from medseg_supcon.evaluation import curves_figure  # matplotlib: loaded only to draw

    run, alone = Path(run).resolve(), idist.get_world_size() == 1
    free_memory()  # the training's
    if idist.get_rank() == 0:
        try:
            evaluate_validation(run, device=device if device is None else str(device), trust=True)
        except MedsegError as error:
            if alone:
                raise
            logging.getLogger(__name__).warning("The run is trained, but not evaluated: %s", error)
        finally:  # also without scores, the documents describe the new weights
            curves_figure(run / "logs" / "history.csv", run / "docs" / "curves.png")
            refresh_documents(run)
    if not alone:
        meet(PATIENCE)


def is_finished(run: Path) -> bool:
    """The run was trained to its planned end, or to its early stop."""
    path = run / "models" / "checkpoint.pt"
    if not path.exists():
        return False
    saved = read_checkpoint(path)
    return bool(saved["finished"]) and saved["max_epochs"] >= _epochs(run)


def is_complete(run: Path) -> bool:
    """The run is finished, and its model is scored and described."""
    return is_finished(run) and all((run / name).exists() for name in WRITTEN_LAST)


def _epochs(run: Path) -> int:
    return int(read_plan(run / "configs" / "plan.json")["epochs"])


def extend_training(run: Path, epochs: int) -> None:
    """Give a run a longer training: the next ``--resume`` goes on to this epoch.

    From there on the learning rate follows the schedule of the longer training.

    Raises:
        RunError: ``epochs`` is less than the run's plan says, or another command is at work in the folder.
    """
    with at_work_in(run):
        path = run / "configs" / "plan.json"
        plan = read_plan(path)
        if epochs < plan["epochs"]:
            raise RunError(
                f"{run} is planned for {plan['epochs']} epochs; a resumed training cannot end earlier, at --epochs "
                f"{epochs}. Leave --epochs out, or choose another --out."
            )
        if epochs > plan["epochs"]:
            plan["epochs"] = epochs
            write_plan(plan, path)


class _Workflow(ConfigWorkflow):  # type: ignore[misc]
    """Does not put the bundle's folder on Python's path: a file there, such as json.py, would replace a module."""

    def run(self) -> Any:
        return self._run_expr(id=self.run_id)


def run_config(run: Path, name: str, workflow_type: str, trust: bool = False, **overrides: Any) -> ConfigWorkflow:
    """Run one of the bundle's configs, as ``python -m monai.bundle run`` does, and return its workflow.

    Args:
        run: the bundle's folder.
        name: ``train``, ``evaluate`` or ``inference``; ``workflow_type`` is ``"train"`` or ``"infer"``.
        trust: run code that medseg did not write on this computer.
        overrides: config keys and values.

    Raises:
        RunError: not a run, or one that needs trust.
    """
    if not is_planned(run):
        raise RunError(f"{run} is not a run: it has no configs/plan.json. Make one with medseg plan or medseg train.")
    check_configs_trusted(run, trust)
    device = overrides.pop("device", None)
    if device is not None:
        overrides["device"] = f"$torch.device('{check_device(device)}')"
    file = run / "configs" / f"{name}.yaml"
    read_config(file)  # raises a sentence if it is not YAML
    workflow = _Workflow(
        config_file=str(file),
        workflow_type=workflow_type,
        bundle_root=literal(str(run.resolve())),
        logging_file=False,  # the command line has its own display
        **overrides,
    )
    with settings_at_fault():
        workflow.initialize()
        engine = workflow.parser.get_parsed_content("train::trainer" if workflow_type == "train" else "evaluator")
        if workflow_type == "train" and engine.state.max_epochs < 1:
            raise ConfigError(f"train::trainer::max_epochs must be at least 1, got {engine.state.max_epochs}.")
        if workflow_type == "train" and any(group["lr"] > HIGHEST_RATE for group in engine.optimizer.param_groups):
            raise ConfigError(f"learning_rate must be at most {HIGHEST_RATE:g}. Usual are 1e-4 to 1e-2.")
    with _own_errors(run):
        workflow.run()
        workflow.finalize()
    return workflow


@contextlib.contextmanager
def _own_errors(run: Path) -> Iterator[None]:
    """MONAI wraps errors raised while a config runs: unwrap ours, and those of disk and memory."""
    try:
        yield
    except Exception as error:
        cause = innermost(error)
        if isinstance(cause, OSError) and cause.errno is not None:
            where = cause.filename2 or cause.filename or run
            raise RunError(
                f"{where}: {cause.strerror}. Check the disk and permissions; what is finished is kept, and medseg train "
                "--resume goes on from there."
            ) from error
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise


def _check_plan(run: Path) -> None:
    """A plan edited by hand must still be one that the network can train on."""
    path = run / "configs" / "plan.json"
    plan = read_plan(path)
    channels = len(plan["channels"])
    network = build_network(plan["network_def"], in_channels=channels, num_classes=len(plan["labels"]), trust=True)
    validate_plan(plan, divisor=size_divisor(network, in_channels=channels), source=path)


def train_run(
    run: Path,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    trust: bool = False,
    **overrides: Any,
) -> None:
    """Train a planned run to its end, evaluate it on its validation cases and write its documents.

    Args:
        run: the run's folder.
        device: overrides the config's.
        resume: go on from ``models/checkpoint.pt``, or start if there is none.
        quiet: no progress display.
        trust: run code in its configs that medseg did not write on this computer.
        overrides: of train.yaml's keys, for this call alone.

    Raises:
        RunError: another command is at work in the folder, it holds a trained run and ``resume`` is False, or the run
            needs trust.
    """
    with at_work_in(run):
        check_configs_trusted(run, trust)
        if resume and is_finished(run):
            evaluate_and_document(run, device)
            return
        _check_plan(run)
        write_network(run)  # the plan may have been edited
        write_twins(run)
        record_run(run)
        overrides["resume"] = resume
        if resume and (run / "models" / "checkpoint.pt").exists():
            overrides["init_weights"] = None  # the earlier run may be gone by now
        if quiet:
            overrides["quiet"] = True
        run_config(run, "train", "train", trust=True, device=device, **overrides)
