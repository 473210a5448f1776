"""``python -m medseg_supcon.comparison JOB.json [--device D] [--quiet]``: one run, in a process of its own."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from threading import Thread
from time import sleep

from medseg_supcon.comparison.cell import run_cell
from medseg_supcon.errors import MedsegError


def main() -> int:
    """Exit code 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="medseg_supcon.comparison")
    parser.add_argument("job", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--beside", type=int, default=0, help="other such processes that share the machine")
    parser.add_argument("--parent", type=int, help="process without which this one ends")
    given = parser.parse_args()
    if given.parent is not None:
        Thread(target=_end_with, args=(given.parent,), daemon=True).start()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # third parties' are not for a person at a terminal
    try:
        run_cell(json.loads(given.job.read_text()), given.device, given.quiet, 1 + given.beside)
    except MedsegError as error:
        sys.stderr.write(f"medseg: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with(parent: int) -> None:
    """A comparison that was killed leaves nothing behind that would train beside its next call."""
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
