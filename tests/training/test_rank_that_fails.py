"""What several processes do at the end of a training where one of them cannot go on."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
from forked_ranks import start_ranks

from medseg_supcon.errors import MedsegError
from medseg_supcon.training import evaluate_and_document, join_ranks, ranks, train


def lost(run: Path, **_: Any) -> None:
    raise MedsegError(f"{run}: there is no such file.")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
def test_nobody_waits_for_a_rank_that_cannot_go_on(trained_run: Path, tmp_path: Path) -> None:
    """First rank 0 cannot evaluate, and the others wait for it; then rank 1 is stuck."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (run / "docs" / "curves.png").unlink()

    def work() -> None:
        join_ranks("cpu")
        train.evaluate_validation = lost  # rank 0, which alone evaluates, does not see the scans
        evaluate_and_document(run)
        if idist.get_rank() == 1:
            time.sleep(600)
        try:
            ranks.meet(timedelta(seconds=2))
        except RuntimeError as error:
            print("alone:", error)  # noqa: T201

    both = start_ranks(work, tmp_path)
    try:
        both[0].join(300)
    finally:
        both[1].kill()
        both[1].join()
    said, told = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert both[0].exitcode == 0, said + told
    assert "The run is trained, but not evaluated" in said and "there is no such file" in said
    assert (run / "docs" / "curves.png").stat().st_size > 0
    assert "alone:" in said and "1" in said.split("alone:")[1]  # who did not come
