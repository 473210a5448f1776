"""Seconds and peak memory of predicting one scan: `medseg predict`, the stock bundle, nnU-Net's predictor.

    python -m benchmarks.inference [--nnunet-python PYTHON]

The scan is a CT of 300 x 300 x 300 voxels with 10 classes, made here. All three use one network with seeded
weights. They take turns, each in its own process. The time is from the scan's file to the mask's, with the model
already loaded. The stock bundle is the run's own inference.yaml (SlidingWindowInferer, Invertd on probabilities,
argmax) without this package. nnU-Net predicts without mirroring, with its own resampling; its interpreter needs
nnunetv2 and monai (for the network).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._process import ROOT, machine, make, run, times

RESULT = Path(__file__).parent / "results" / "inference_cpu.md"
CASES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "large windows": {"spacing": [1.0, 1.0, 1.0], "patch_size": [96, 96, 96]},
}
OURS, STOCK, NNUNET = "medseg predict", "stock bundle", "nnU-Net"
Result = dict[str, float]


def ours(run_folder: Path, scan: Path, out: Path) -> Callable[[], object]:
    from medseg_supcon.inference import Predictor

    predictor = Predictor(run_folder, device="cpu")

    def predict() -> None:
        manifest = predictor.run([scan], out)
        if manifest["summary"]["done"] != 1:
            raise RuntimeError(manifest["scans"][0]["error"])

    return predict


def stock(run_folder: Path, scan: Path, out: Path) -> Callable[[], object]:
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=str(run_folder / "configs" / "inference.yaml"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(run_folder),
        dataset_dir=str(scan.parent),
        output_dir=str(out),
        device="$torch.device('cpu')",
    )
    workflow.initialize()
    workflow.parser.get_parsed_content("evaluator")  # the weights are loaded by run
    return workflow.run


def measure(name: str, run_folder: Path, scan: Path, out: Path) -> Result:
    """Run in the contestant's own process: the seconds, and the peak memory before predicting (MiB)."""
    import resource

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    predict = {OURS: ours, STOCK: stock}[name](run_folder, scan, out)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    predict()
    return {"seconds": time.perf_counter() - start, "before": before}


def contest(run_folder: Path, scan: Path, out: Path, args: argparse.Namespace, python: str | None) -> dict[str, Result]:
    """Best time and largest peak of each contestant over alternating rounds, and the voxels that differ from ours."""
    results: dict[str, Result] = {}
    for _ in range(args.rounds):
        for name in (OURS, STOCK, *([NNUNET] if python else [])):
            folder = out / name
            shutil.rmtree(folder, ignore_errors=True)
            if name == NNUNET:
                command = [python, ROOT / "benchmarks" / "_nnunet.py", run_folder, scan, folder]
            else:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.inference",
                    "--measure",
                    name,
                    run_folder,
                    scan,
                    folder,
                ]
            cost = run(command, args.threads)
            said = json.loads(cost.output.splitlines()[-1])
            one = {"seconds": said["seconds"], "peak": cost.peak, "above": cost.peak - said["before"]}
            best = results.setdefault(name, one)
            best["seconds"] = min(best["seconds"], one["seconds"])
            best["peak"], best["above"] = max(best["peak"], one["peak"]), max(best["above"], one["above"])
            print(f"{name}: {one['seconds']:.1f} s, {one['peak']:.0f} MiB", file=sys.stderr, flush=True)
    for name, result in results.items():
        result["differ"] = different(out / OURS / scan.name, out / name / scan.name)
    return results


def different(a: Path, b: Path) -> float:
    """The number of voxels in which two masks differ."""
    import nibabel
    import numpy as np

    first, second = (np.asarray(nibabel.load(file).dataobj) for file in (a, b))
    if first.shape != second.shape:
        raise SystemExit(f"{b} has shape {second.shape}, expected {first.shape}")
    return float(np.count_nonzero(first != second))


def table(results: dict[str, Result], voxels: int) -> str:
    own = results[OURS]
    lines = [
        "| | seconds | peak, MiB | above the start, MiB | voxels that differ |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, r in results.items():
        cells = [f"{r['seconds']:.1f}", f"{r['peak']:,.0f}", f"{r['above']:,.0f}", ""]
        if name != OURS:
            cells[0] += f" (x {r['seconds'] / own['seconds']:.2f})"
            for i, key in ((1, "peak"), (2, "above")):
                cells[i] += f" ({own[key] / r[key] * 100:.0f} %)"
            share = f"{r['differ'] / voxels * 100:.2g} %"
            cells[3] = f"{r['differ']:,.0f} ({share})" if name == STOCK else f"{share}, see above"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_nnunet(python: str) -> tuple[str | None, str]:
    """The interpreter, or None if it does not have nnunetv2, and a sentence about it."""
    ask = "import importlib.metadata as m, nnunetv2, monai, torch; print(m.version('nnunetv2'), torch.__version__)"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        return (
            None,
            f"nnU-Net was left out: {Path(python).name} cannot import nnunetv2 and monai (--nnunet-python).",
        )
    version, torch_version = done.stdout.split()[-2:]
    return python, f"nnunetv2 {version} on torch {torch_version}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nnunet-python", default=sys.executable, help="an interpreter that has nnunetv2 and monai")
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 300, 300])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.2], help="mm")
    parser.add_argument("--organs", type=int, default=9, help="number of classes besides background")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write the tables to")
    parser.add_argument("--measure", nargs=4, metavar=("NAME", "RUN", "SCAN", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, *paths = args.measure
        print(json.dumps(measure(name, *(Path(path) for path in paths))))
        return
    python, sentence = with_nnunet(args.nnunet_python)
    voxels = args.shape[0] * args.shape[1] * args.shape[2]
    parts = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, scan = Path(temporary), Path(temporary) / "scans" / "ct.nii.gz"
        for number, case in enumerate(args.cases):
            run_folder = folder / f"run{number}"
            plan = make(scan, run_folder, args.shape, args.spacing, args.organs, CASES[case])
            what = f"{case}: windows of {times(plan['patch_size'])} voxels of {times(plan['spacing'])} mm"
            print(what, file=sys.stderr)
            results = contest(run_folder, scan, folder / f"masks{number}", args, python)
            parts.append(f"## {what[0].upper()}{what[1:]}\n\n{table(results, voxels)}\n")
    text = (
        "# Predicting one scan on a CPU\n\n`python -m benchmarks.inference --nnunet-python PYTHON`\n\n"
        f"{machine(args.threads)}. {sentence}\n\n"
        f"One int16 CT of {times(args.shape)} voxels of {times(args.spacing)} mm (.nii.gz), {args.organs + 1} classes, "
        "overlap 0.5. All use the same network and weights (random, seed 0). Seconds: from the scan's file to the "
        f"mask's with the model loaded, best of {args.rounds} alternating rounds. Peak: the largest resident set of the "
        "process (ru_maxrss); above the start: what exceeds its peak with the model loaded. In brackets: how many "
        "times slower than ours, and our share of its memory.\n\n"
        "Where our mask differs from the stock bundle's, two classes tie to within rounding. nnU-Net's mask differs "
        "more: it interpolates in another way (scans by cubic splines, logits instead of probabilities), places and "
        "blends windows in another way (in half precision), and random weights amplify small differences.\n\n"
        + "\n".join(parts)
    )
    args.result.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
