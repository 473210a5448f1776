"""Training a planned run, the checks before it, and what follows it: evaluation, curves, model card."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
    plain_text,
    read_config,
    record_run,
    settings_at_fault,
    write_network,
    write_twins,
)
from medseg_supcon.datasets import Case, Report, load_items, output_channels, read_datalist, read_dataset
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.inference import evaluate_validation
from medseg_supcon.networks import build_network, size_divisor
from medseg_supcon.plan import literal, read_plan, validate_plan, write_plan
from medseg_supcon.training.checkpoint import read_checkpoint
from medseg_supcon.training.prepare import Request, refresh_documents, refuse_errors
from medseg_supcon.training.quality import fit_quality
from medseg_supcon.training.ranks import PATIENCE, meet
from medseg_supcon.training.speed import check_device, free_memory

HIGHEST_RATE = 1e3  # far above any that trains
WRITTEN_LAST = ("eval/metrics.json", "docs/curves.png")
OF_EARLIER_WEIGHTS = ("eval/metrics.csv", "eval/review.html", "eval/example.png", "models/quality.npz", *WRITTEN_LAST)


def check_planned(
    path: Path, run: Path, request: Request, *, resume: bool, show: Callable[[Report], None], trust: bool
) -> None:
    """Refuse to train a planned run on another data set, with options that it would ignore, or with errors in its cases."""
    check_configs_trusted(run, trust)
    config = run / "configs" / "train.yaml"
    folder = plain_text(read_config(config).get("dataset_dir"))
    if folder is None:
        raise RunError(f"{config}: dataset_dir must be the path of a folder.")
    dataset = read_dataset(path)
    root = dataset.root.resolve()
    if root != Path(folder).resolve():
        raise RunError(f"{run} is planned for {folder}, not for {root}. Choose another --out, or pass {folder}.")
    if (options := request.options()) and not resume:
        raise RunError(
            f"{run} is already planned, so {', '.join(options)} would be ignored. Leave "
            f"{'it' if len(options) == 1 else 'them'} out, edit the run's configs, or choose another --out."
        )
    cases: dict[str, list[Case]] = {}
    for section, entries in read_datalist(run / "configs" / "datalist.json").items():
        for item in load_items(entries, dataset.root) if entries else []:
            images = [item["image"]] if isinstance(item["image"], str) else item["image"]
            label = Path(item["label"]) if item.get("label") else None
            case = Case(str(item.get("name", images[0])), tuple(map(Path, images)), label)
            cases.setdefault(section, []).append(case)
    trusted = read_plan(run / "configs" / "plan.json").get("trust_scan_affine", False)
    every = [case for listed in cases.values() for case in listed]
    refuse_errors(dataset, every, cases.get("training", []), path, show, trusted)


def begin_training(run: str | Path, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse to train over a trained run, and remove the scores of its earlier weights; every rank calls it."""
    run = Path(run).resolve()
    if is_started(run) and not (resume or overwrite):
        raise RunError(f"{run} already contains a trained run. Use --resume true, --overwrite true, or another folder.")
    if idist.get_rank() > 0 or (resume and is_finished(run)):
        return
    names = OF_EARLIER_WEIGHTS if resume else (*OF_EARLIER_WEIGHTS, "logs/history.csv")
    stale = [run / name for name in names if (run / name).exists()]
    for file in stale:
        file.unlink()
    if stale:
        with torch.random.fork_rng(devices=[]):  # the card builds a network; the run's own is drawn after this
            refresh_documents(run)


def evaluate_and_document(
    run: str | Path, device: str | torch.device | None = None, quality: bool | None = None
) -> None:
    """Fit a trained run's quality model, score the run on its validation cases, then write curves, metadata and model card.

    `quality`: whether the quality model is fitted; None: as ``train.yaml`` says. Other ranks wait for rank 0.
    """
    from medseg_supcon.evaluation import curves_figure  # matplotlib: loaded only to draw

    run, alone = Path(run).resolve(), idist.get_world_size() == 1
    free_memory()  # the training's
    if idist.get_rank() == 0:
        name = None if device is None else str(device)
        try:
            try:
                if quality if quality is not None else read_config(run / "configs" / "train.yaml").get("quality", True):
                    fit_quality(run, name)
            except MedsegError as error:  # the run is as good without
                logging.getLogger(__name__).warning("The run has no quality model: %s", error)
            evaluate_validation(run, device=name, trust=True)
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
    return bool(saved["finished"]) and saved["max_epochs"] >= read_plan(run / "configs" / "plan.json")["epochs"]


def is_complete(run: Path) -> bool:
    """The run is finished, and its model is scored and described."""
    return is_finished(run) and all((run / name).exists() for name in WRITTEN_LAST)


def extend_training(run: Path, epochs: int) -> None:
    """Plan a longer training, on whose schedule the next ``--resume`` goes on; `RunError` if it would be shorter."""
    with at_work_in(run):
        path = run / "configs" / "plan.json"
        plan = read_plan(path)
        if epochs < plan["epochs"]:
            raise RunError(
                f"{run} is planned for {plan['epochs']} epochs; a resumed training cannot be shorter than that (--epochs "
                f"{epochs}). Leave --epochs out, or choose another --out."
            )
        if epochs > plan["epochs"]:
            plan["epochs"] = epochs
            plan.pop("minutes", None)  # its length is no longer what fitted into them
            write_plan(plan, path)


class _Workflow(ConfigWorkflow):  # type: ignore[misc]
    """Does not put the bundle's folder on Python's path: a file there, such as json.py, would replace a module."""

    def run(self) -> Any:
        return self._run_expr(id=self.run_id)


def run_config(run: Path, trust: bool = False, **overrides: Any) -> ConfigWorkflow:
    """Run a run's ``train.yaml``, as ``python -m monai.bundle run`` does; `overrides`: its keys, the device by name."""
    if not is_planned(run):
        raise RunError(f"{run} is not a run: it has no configs/plan.json. Create one with medseg plan or medseg train.")
    check_configs_trusted(run, trust)
    device = overrides.pop("device", None)
    if device is not None:
        overrides["device"] = f"$torch.device('{check_device(device)}')"
    file = run / "configs" / "train.yaml"
    read_config(file)  # raises a sentence if it is not YAML
    root = literal(str(run.resolve()))
    # logging_file: the command line has its own display
    workflow = _Workflow(
        config_file=str(file), workflow_type="train", bundle_root=root, logging_file=False, **overrides
    )
    with settings_at_fault():
        workflow.initialize()
        engine = workflow.parser.get_parsed_content("train::trainer")
        if engine.state.max_epochs < 1:
            raise ConfigError(f"train::trainer::max_epochs must be at least 1, got {engine.state.max_epochs}.")
        if any(group["lr"] > HIGHEST_RATE for group in engine.optimizer.param_groups):
            raise ConfigError(f"learning_rate must be at most {HIGHEST_RATE:g}. Usual are 1e-4 to 1e-2.")
    try:
        workflow.run()
        workflow.finalize()
    except Exception as error:  # MONAI wraps errors: unwrap ours, and those of disk and memory
        cause = innermost(error)
        if isinstance(cause, OSError) and cause.errno is not None:
            raise RunError(
                f"{cause.filename2 or cause.filename or run}: {cause.strerror}. Check the disk and permissions. Finished "
                "work is kept, and medseg train --resume continues from it."
            ) from error
        if isinstance(cause, MedsegError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise
    return workflow


def train_run(
    run: str | Path, device: str | None = None, resume: bool = False, quiet: bool = False, trust: bool = False,
    **overrides: Any,
) -> None:  # fmt: skip
    """Train a planned run to its end, evaluate it on its validation cases and write its documents.

    `resume`: continue from ``models/checkpoint.pt``, or start if there is none. `trust`: run code in its configs that
    medseg did not write on this computer. `overrides`: of train.yaml's keys, for this call alone.
    """
    run = Path(run)
    with at_work_in(run):
        check_configs_trusted(run, trust)
        if resume and is_finished(run):
            evaluate_and_document(run, device)
            return
        path = run / "configs" / "plan.json"  # may have been edited
        plan = read_plan(path)
        channels, outputs = len(plan["channels"]), output_channels(plan)
        network = build_network(plan["network_def"], in_channels=channels, num_classes=outputs, trust=True)
        divisor = size_divisor(network, in_channels=channels, definition=plan["network_def"])
        validate_plan(plan, divisor=divisor, source=path)
        write_network(run)
        write_twins(run)
        record_run(run)
        overrides["resume"] = resume
        if resume and (run / "models" / "checkpoint.pt").exists():
            overrides["init_weights"] = None  # the earlier run may be gone by now
        if quiet:
            overrides["quiet"] = True
        run_config(run, trust=True, device=device, **overrides)
