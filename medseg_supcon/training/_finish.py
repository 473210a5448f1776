"""What follows a training: the scores of its model, the curves, the documents."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from monai.bundle import ConfigWorkflow

from medseg_supcon.data import literal
from medseg_supcon.errors import MedsegError
from medseg_supcon.training._faults import innermost
from medseg_supcon.training._ranks import rank
from medseg_supcon.training._run import refresh_documents


def finish_ranks(run: str | Path) -> None:
    """Evaluate a run that several processes trained, and write its documents; every rank calls it.

    Every rank evaluates its share of the validation cases, rank 0 writes. Cases that cannot be read (a run whose
    data lie elsewhere by now) are a warning: its weights are as good without.

    Args:
        run: the run's folder, which all machines see.
    """
    run = Path(run)
    dist.barrier()  # rank 0's model.pt is there
    try:
        _evaluate(run)
    except Exception as error:
        if not isinstance(innermost(error), MedsegError):
            raise
        logging.getLogger(__name__).warning("The run is trained, but not evaluated: %s", innermost(error))
    if rank() == 0:
        write_documents(run)
    dist.barrier()


def write_documents(run: Path) -> None:
    """The curves of ``logs/history.csv``, then everything that follows from the rest of the run."""
    from medseg_supcon.evaluation import curves_figure  # matplotlib: only where a picture is drawn

    curves_figure(run / "logs" / "history.csv", run / "docs" / "curves.png")
    refresh_documents(run)


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
