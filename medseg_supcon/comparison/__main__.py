"""``python -m medseg_supcon.comparison JOB.json [--device D] [--quiet]``: one run, in a process of its own."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from medseg_supcon.comparison._cell import run_cell
from medseg_supcon.errors import MedsegError


def main() -> int:
    """Exit code 0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="medseg_supcon.comparison")
    parser.add_argument("job", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # third parties' are not for a person at a terminal
    try:
        run_cell(json.loads(given.job.read_text()), given.device, given.quiet)
    except MedsegError as error:
        sys.stderr.write(f"medseg: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
