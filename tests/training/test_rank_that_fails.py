"""What several processes do at the end of a training where one of them cannot go on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import ignite.distributed as idist
from medseg_supcon.training import train, ranks

def lost(run, **_):
    raise train.MedsegError(f"{run}: there is no such file.")

ranks.join_ranks("cpu")
train.evaluate_validation = lost  # rank 0, which alone evaluates, does not see the scans
train.evaluate_and_document(Path(sys.argv[1]))
if idist.get_rank() == 1:
    time.sleep(600)
try:
    ranks.meet(timedelta(seconds=2))
except RuntimeError as error:
    print("alone:", error)
"""


def test_nobody_waits_for_a_rank_that_cannot_go_on(trained_run: Path, tmp_path: Path) -> None:
    """First rank 0 cannot evaluate, and the others wait for it; then rank 1 is stuck."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (run / "docs" / "curves.png").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(run)],
            env={
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, _ = both[0].communicate(timeout=300)
    finally:
        both[1].kill()
        told, _ = both[1].communicate()
    assert both[0].returncode == 0, said + told
    assert "The run is trained, but not evaluated" in said and "there is no such file" in said
    assert (run / "docs" / "curves.png").stat().st_size > 0
    assert "alone:" in said and "1" in said.split("alone:")[1]  # who did not come
