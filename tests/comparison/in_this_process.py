"""Jobs of a comparison without processes of their own, which take five seconds each to import what they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from medseg_supcon.comparison import jobs


def run_jobs_here(names: Sequence[Path], where: Sequence[str], done: Callable[[Path, str], None]) -> None:
    """As `run_jobs`, in this process: what a test replaces in it is used."""
    for job in names:
        jobs.run_cell(json.loads(job.read_text()), where[0], quiet=True)
        done(job, "")
