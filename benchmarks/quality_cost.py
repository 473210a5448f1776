"""What `medseg predict` pays for saying how far to trust a mask: seconds of CPU time and peak memory, with and without.

    python -m benchmarks.quality_cost [--rounds 3] [--threads 2]

Two jobs: 52 small scans (36 x 50 x 36 voxels, 3 classes), and one CT of 300 x 300 x 300 voxels with 10 classes, made
here. Networks have seeded random weights; the quality model is fitted on parts of the scan with random Dice, since the cost
does not depend on what was learnt. Each prediction is a process of its own, with and without quality taking turns.
CPU time does not depend on how busy the machine is (much), so it is what the table compares.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._process import machine, make, run, times

RESULT = Path(__file__).parent / "results" / "quality_cost.md"
JOBS: dict[str, tuple[list[int], list[float], int, int]] = {  # shape, spacing in mm, organs, scans
    "52 small scans": ([36, 50, 36], [1.0, 1.0, 1.0], 2, 52),
    "one CT": ([300, 300, 300], [0.8, 0.8, 1.2], 9, 1),
}
PARTS, PART = 12, 64  # of the scan, for the quality model; voxels of their edge
WITH, WITHOUT = "with", "without"


def fit(run_folder: Path, file: Path) -> None:
    """Save a quality model of random targets in a run."""
    from medseg_supcon.inference import Predictor, prepare_volume
    from medseg_supcon.quality import Degraded, QualityModel, Sample
    from medseg_supcon.scans import Scan, read_scan

    rng = np.random.default_rng(0)
    predictor, scan = Predictor(run_folder, device="cpu"), Scan("scan", (file,))
    volume = read_scan(scan, 1)
    samples = []
    for number in range(PARTS):
        start = [int(rng.integers(0, max(1, n - PART))) for n in volume.data.shape]
        box = tuple(slice(a, a + PART) for a in start)
        image = volume.data[box][None].astype(np.float32)
        for clean in (True, *[False] * 15):
            part = image if clean else image + rng.normal(0, 200, image.shape).astype(np.float32)
            form = Degraded(part, np.zeros(part.shape[1:], dtype=np.int16)).as_volume(volume)
            evidence = predictor.segment(prepare_volume(form, scan, predictor.models, time.perf_counter())).evidence[0]
            dice = rng.random(len(predictor.labels) - 1)
            samples.append(Sample(str(number), evidence, dice, clean, number % 4 == 0))
    QualityModel.fit(samples).save(run_folder)


def measure(run_folder: Path, scans: Path, out: Path, quality: bool) -> dict[str, float]:
    """Run in a process of its own: CPU seconds of predicting a folder, and the peak memory in MiB."""
    import torch

    from medseg_supcon.inference import Predictor

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    predictor = Predictor(run_folder, device="cpu", quality=quality)
    assert not quality or predictor.quality_models[0] is not None
    begun, started = time.process_time(), time.perf_counter()
    manifest = predictor.run([scans], out)
    spent = {"cpu": time.process_time() - begun, "seconds": time.perf_counter() - started}
    if manifest["summary"]["done"] != len(manifest["scans"]):
        raise RuntimeError(json.dumps(manifest["scans"])[:1000])
    return spent | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def contest(run_folder: Path, scans: Path, out: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The measurements with and without, round by round; each goes first in half of the rounds."""
    results: dict[str, list[dict[str, float]]] = {WITH: [], WITHOUT: []}
    for number in range(args.rounds):
        for how in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
            shutil.rmtree(out, ignore_errors=True)
            words = [sys.executable, "-m", "benchmarks.quality_cost", "--measure", how, run_folder, scans, out]
            results[how].append(json.loads(run(words, args.threads).output.splitlines()[-1]))
            print(how, results[how][-1], file=sys.stderr, flush=True)
    return results


def row(job: str, results: dict[str, list[dict[str, float]]]) -> str:
    def mean(how: str, key: str) -> float:
        return float(np.mean([r[key] for r in results[how]]))

    pairs = zip(results[WITH], results[WITHOUT], strict=True)
    ratios = [100 * (one["cpu"] / other["cpu"] - 1) for one, other in pairs]
    cells = [f"{mean(how, 'cpu'):.1f}" for how in (WITHOUT, WITH)]
    cells.append(f"{np.mean(ratios):+.1f} % ({', '.join(f'{r:+.1f}' for r in ratios)})")
    cells += [f"{mean(how, 'peak'):,.0f}" for how in (WITHOUT, WITH)]
    return f"| {job} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write the table to")
    parser.add_argument("--fit", nargs=2, type=Path, metavar=("RUN", "SCAN"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, metavar=("HOW", "RUN", "SCANS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(*args.fit)
        return
    if args.measure:
        how, *paths = args.measure
        print(json.dumps(measure(*map(Path, paths), quality=how == WITH)))
        return
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, job in enumerate(args.jobs):
            shape, spacing, organs, count = JOBS[job]
            folder = Path(temporary) / str(number)
            first, run_folder = folder / "scans" / "scan_0.nii.gz", folder / "run"
            changes: dict[str, Any] = {}
            plan = make(first, run_folder, shape, spacing, organs, changes)
            for copy in range(1, count):
                shutil.copyfile(first, first.with_name(f"scan_{copy}.nii.gz"))
            run([sys.executable, "-m", "benchmarks.quality_cost", "--fit", run_folder, first], args.threads)
            what = f"{job}, {times(shape)} voxels, {organs + 1} classes, windows of {times(plan['patch_size'])}"
            lines.append(row(what, contest(run_folder, first.parent, folder / "masks", args)))
    text = (
        "# What the predicted Dice costs\n\n`python -m benchmarks.quality_cost`\n\n"
        f"{machine(args.threads)}. Means over {args.rounds} alternating rounds; in brackets each round. CPU seconds of all "
        "threads, from the scans' files to the masks' with the model loaded; peak: the largest resident set, MiB.\n\n"
        "| | CPU s, without | with | change | peak, without | with |\n|---|---:|---:|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n"
    )
    args.result.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
