"""``python -m medseg_supcon.comparison JOB.json [--device D] [--quiet]``: one run, in a process of its own."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from threading import Thread
from time import sleep

from medseg_supcon.comparison.cell import run_cell
from medseg_supcon.errors import MedsegError
from medseg_supcon.files import read_json


def main() -> int:
    """Exit code 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="medseg_supcon.comparison")
    parser.add_argument("job", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--beside", type=int, default=0, help="number of other such processes on this machine")
    parser.add_argument("--parent", type=int, help="process whose end also ends this one")
    options = parser.parse_args()
    if options.parent is not None:
        Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # those of third parties are not for a person at a terminal
    try:
        run_cell(read_json(options.job), options.device, options.quiet, 1 + options.beside)
    except MedsegError as error:
        sys.stderr.write(f"medseg: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with(parent: int) -> None:
    """Ends this process if the comparison was killed, so that it does not train beside the next call."""
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
