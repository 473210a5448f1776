"""Training a planned run, and what follows it: evaluation, curves, model card."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from medseg_supcon.bundle import (
    at_work_in,
    check_configs_trusted,
    innermost,
    is_planned,
    load_tensors,
    read_config,
    record_run,
    settings_at_fault,
    write_network,
    write_twins,
)
from medseg_supcon.errors import ConfigError, DataError, MedsegError, RunError
from medseg_supcon.files import read_json
from medseg_supcon.inference import evaluate_validation
from medseg_supcon.networks import build_network, size_divisor
from medseg_supcon.plan import literal, read_plan, validate_plan
from medseg_supcon.scans import read_header
from medseg_supcon.training.prepare import refresh_documents
from medseg_supcon.training.ranks import meet, on_any_rank, rank, rank_device
from medseg_supcon.training.throughput import free_memory


def finish_ranks(run: str | Path) -> None:
    """Evaluate a run that several processes trained, and write its documents; every rank calls it.

    Every rank evaluates its share of the validation cases, rank 0 writes. Cases that cannot be read (a run whose
    data lie elsewhere by now) are a warning: its weights are as good without.

    Args:
        run: the run's folder, which all machines see.
    """
    run = Path(run)
    problem = _unreadable(run)
    meet()  # rank 0's model.pt is there
    nccl = dist.get_backend() == "nccl"
    if not on_any_rank(
        problem is not None, rank_device() if nccl else None
    ):  # else one would wait for the other's scores
        try:
            _evaluate(run)
        except Exception as error:
            if not isinstance(innermost(error), MedsegError):
                raise
            problem = str(innermost(error))
    if problem is not None:
        logging.getLogger(__name__).warning("The run is trained, but not evaluated: %s", problem)
    if rank() == 0:
        write_documents(run)
    meet()


def write_documents(run: Path) -> None:
    """The curves of ``logs/history.csv``, then everything that follows from the rest of the run."""
    from medseg_supcon.evaluation import curves_figure

    curves_figure(run / "logs" / "history.csv", run / "docs" / "curves.png")
    refresh_documents(run)


def _unreadable(run: Path) -> str | None:
    """What is wrong with a validation case, as far as headers tell."""
    config = ConfigParser()
    config.read_config(str(run / "configs" / "evaluate.yaml"))
    config["bundle_root"] = literal(str(run.resolve()))
    try:
        for case in config.get_parsed_content("cases"):
            for file in (*ensure_tuple(case["image"]), case["label"]):
                read_header(Path(file))
    except DataError as error:
        return str(error)
    return None


def _evaluate(run: Path) -> None:
    """As ``torchrun`` does with the two files, in the group of processes that there is."""
    workflow = ConfigWorkflow(
        [str(run / "configs" / name) for name in ("evaluate.yaml", "multi_gpu_evaluate.yaml")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=literal(str(run.resolve())),
    )
    workflow.initialize()
    workflow.run()


WRITTEN_LAST = ("eval/metrics.json", "docs/curves.png")


def is_finished(run: Path) -> bool:
    """The run was trained to its planned end (or to its early stop)."""
    path = run / "models" / "checkpoint.pt"
    if not path.exists():
        return False
    saved = load_tensors(path)
    try:
        return bool(saved["finished"]) and saved["max_epochs"] >= _epochs(run)
    except (KeyError, TypeError, IndexError):
        raise RunError(
            f"{path} is not a checkpoint that medseg wrote. Copy it again, or delete it."
        ) from None


def is_complete(run: Path) -> bool:
    """The run is finished, and its model is scored and described."""
    return is_finished(run) and all((run / name).exists() for name in WRITTEN_LAST)


def _epochs(run: Path) -> int:
    return int(read_json(run / "configs" / "plan.json")["epochs"])


def check_device(device: str | None) -> str | None:
    """A device name that this machine has, else a sentence."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"--device {device!r} is no device. Use cpu, cuda, or cuda:0, cuda:1, ..."
        ) from None
    if found.type == "cuda" and not (
        torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()
    ):
        raise ConfigError(
            f"--device {device}: torch finds {torch.cuda.device_count()} CUDA device(s) here. Use --device cpu."
        )
    return device


class _Workflow(ConfigWorkflow):  # type: ignore[misc]
    """Runs without the bundle's folder on Python's path: a file there, json.py say, would be imported in place of ours."""

    def run(self) -> Any:
        return self._run_expr(id=self.run_id)


def run_config(
    run: Path, name: str, workflow_type: str, trust: bool = False, **overrides: Any
) -> ConfigWorkflow:
    """Run one of the bundle's configs, as ``python -m monai.bundle run`` does, and return its workflow.

    Args:
        run: the bundle's folder.
        name: ``train``, ``evaluate`` or ``inference``.
        workflow_type: ``"train"`` or ``"infer"``.
        trust: run code that medseg did not write on this computer.
        overrides: config keys and values.

    Raises:
        RunError: not a run, or one that needs trust.
    """
    if not is_planned(run):
        raise RunError(
            f"{run} is not a run: it has no configs/plan.json. Make one with medseg plan or medseg train."
        )
    check_configs_trusted(run, trust)
    device = overrides.pop("device", None)
    if device is not None:
        overrides["device"] = f"$torch.device('{check_device(device)}')"
    file = run / "configs" / f"{name}.yaml"
    read_config(file)  # what is wrong with it, in a sentence
    workflow = _Workflow(
        config_file=str(file),
        workflow_type=workflow_type,
        bundle_root=literal(str(run.resolve())),
        logging_file=False,  # the command line has its own display
        **overrides,
    )
    with settings_at_fault():
        workflow.initialize()
        workflow.parser.get_parsed_content("train::trainer" if workflow_type == "train" else "evaluator")
    with _own_errors(run):
        workflow.run()
        workflow.finalize()
    return workflow


@contextlib.contextmanager
def _own_errors(run: Path) -> Iterator[None]:
    """MONAI wraps errors raised while a config runs: bring ours back out, and those of disk and memory."""
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
    network = build_network(
        plan["network_def"], in_channels=channels, num_classes=len(plan["labels"]), trust=True
    )
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
        resume: go on from ``models/checkpoint.pt`` (afresh where there is none).
        quiet: no progress display.
        trust: run code in its configs that medseg did not write on this computer.
        overrides: of train.yaml's keys, for this call alone.

    Raises:
        RunError: another command is at work in the folder, or the run needs trust.
    """
    with at_work_in(run):
        check_configs_trusted(run, trust)
        if not (resume and is_finished(run)):
            _check_plan(run)
            write_network(run)  # the plan may have been edited
            write_twins(run)
            record_run(run)
            for name in WRITTEN_LAST:  # of earlier weights
                (run / name).unlink(missing_ok=True)
            overrides["resume"] = resume
            if resume and (run / "models" / "checkpoint.pt").exists():
                overrides["init_weights"] = None  # the earlier run may be gone by now
            if quiet:
                overrides["quiet"] = True
            run_config(run, "train", "train", trust=True, device=device, **overrides)
            free_memory()
        evaluate_validation(run, device=device, trust=True)
        write_documents(run)
