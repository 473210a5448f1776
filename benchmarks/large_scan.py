"""A large CT on a CPU: seconds and peak memory of `medseg predict`, as the operating system counts them.

    python -m benchmarks.large_scan

The scan has 512 x 512 x 400 voxels of int16 and 20 classes, and is made here. The public command runs in its own
process and is measured from outside: wall clock, and ru_maxrss of wait4 (the largest resident set, with imports).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._process import machine, make, run, times

RESULT = Path(__file__).parent / "results" / "large_scan_cpu.md"
CASES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "large windows": {"spacing": [1.5, 1.5, 1.5], "patch_size": [96, 96, 96]},
    "full resolution": {"spacing": [0.75, 0.75, 1.0], "patch_size": [96, 96, 96]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.75, 0.75, 1.0], help="mm")
    parser.add_argument("--organs", type=int, default=19, help="number of classes besides background")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write the table to")
    args = parser.parse_args()
    lines = ["| plan | windows, voxels | spacing, mm | seconds | peak, MiB |", "|---|---|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, scan = Path(temporary), Path(temporary) / "scans" / "ct.nii.gz"
        for number, case in enumerate(args.cases):
            run_folder, out = folder / f"run{number}", folder / f"masks{number}"
            plan = make(scan, run_folder, args.shape, args.spacing, args.organs, CASES[case])
            command = [
                sys.executable,
                "-m",
                "medseg_supcon.cli",
                "predict",
                run_folder,
                scan,
                "--out",
                out,
            ]
            cost = run([*command, "--device", "cpu"], args.threads)
            if not (out / scan.name).is_file():
                raise SystemExit(f"{scan.name}: no mask was written.\n{cost.output}")
            cells = [case, times(plan["patch_size"]), times(plan["spacing"])]
            lines.append(f"| {' | '.join(cells)} | {cost.seconds:.0f} | {cost.peak:,.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    voxels = math.prod(args.shape)
    text = (
        "# A large CT on a CPU\n\n`python -m benchmarks.large_scan`\n\n"
        f"{machine(args.threads)}.\n\n"
        f"One int16 CT of {times(args.shape)} voxels of {times(args.spacing)} mm ({voxels * 2 / 2**20:,.0f} MiB), "
        f"{args.organs + 1} classes. All classes at its resolution in float32 would take "
        f"{voxels * 4 * (args.organs + 1) / 2**20:,.0f} MiB, and are never in memory together. Measured: the whole "
        "command `medseg predict RUN SCAN --out DIR`, start-up included. Peak: the largest resident set (ru_maxrss).\n\n"
        + "\n".join(lines)
        + "\n"
    )
    args.result.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
