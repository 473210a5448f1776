"""What follows a training: the scores of its model, the curves, the documents."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

from medseg_supcon.data import literal, read_header
from medseg_supcon.errors import DataError, MedsegError
from medseg_supcon.training._faults import innermost
from medseg_supcon.training._ranks import meet, on_any_rank, rank, rank_device
from medseg_supcon.training._run import refresh_documents


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
    from medseg_supcon.evaluation import curves_figure  # matplotlib: only where a picture is drawn

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
