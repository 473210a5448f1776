"""Task04 Hippocampus at the planned defaults: trained on folds 2-4, tested on all 52 scans of fold 1.

    MEDSEG_DATA=/data python -m benchmarks.hippocampus [--labels 20] [--seeds 0,1,2] [--set KEY=VALUE ...] [--out DIR]

MEDSEG_DATA contains `Task04_Hippocampus` with `folds.json` (the published folds) and
`nnunet_v2_cross_validation.json` (the published Dice of nnU-Net v2 per scan, to compare scan by scan: it was trained
for 1000 epochs on a GPU with the other four folds, 208 scans).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

RESULTS = Path(__file__).parent / "results"
TASK = "Task04_Hippocampus"
PLANNED = ("configs/plan.json", "logs/expected.json")


def medseg(*arguments: object) -> float:
    """Run a command of the package; return the seconds that it took."""
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "medseg_supcon.cli", *map(str, arguments)], check=True)
    return perf_counter() - start


def dice_per_case(path: Path) -> dict[str, dict[str, float]]:
    """Case -> class (lower case) -> Dice, from metrics.csv."""
    found: dict[str, dict[str, float]] = {}
    with path.open() as stream:
        for row in csv.DictReader(stream):
            if row["dice"]:
                found.setdefault(row["case"], {})[row["class"].lower()] = float(row["dice"])
    return found


def measure(data: Path, out: Path, seed: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train and score one seed, unless an earlier call has; its Dice per case and class."""
    run, scores, timed = (out / f"{name}_{seed}" for name in ("run", "test", "seconds"))
    timed = timed.with_suffix(".json")
    if not timed.exists():
        budget = ("--labels", given.labels) if given.labels else ()
        settings = [word for setting in given.set for word in ("--set", setting)]
        cases = ("--cases", out / "training.txt")
        seconds = medseg("train", data, *cases, *budget, *settings, "--seed", seed, "--out", run, "--resume")
        timed.write_text(json.dumps(seconds))
    if not (scores / "metrics.csv").exists():
        medseg("evaluate", run, data, "--cases", out / "test.txt", "--out", scores)
    return dice_per_case(scores / "metrics.csv")


def shown(scores: npt.NDArray[np.float64]) -> str:
    """Mean Dice, then that of each class, as cells of a table; scores (cases, classes)."""
    return " | ".join(f"{value:.4f}" for value in (scores.mean(), *scores.mean(axis=0)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--labels", type=int, help="labelled scans, validation included; default: all 156")
    options.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for `medseg train`")
    options.add_argument("--seeds", default="0", help="of the trainings, such as 0,1,2")
    options.add_argument(
        "--out", type=Path, help="folder for the runs, kept and continued; default: a temporary folder"
    )
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not (Path(root) / TASK).is_dir():
        print(f"Skipped: MEDSEG_DATA must name the folder that contains {TASK}.")
        return
    data = Path(root) / TASK
    folds = json.loads((data / "folds.json").read_text())
    out = given.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.txt").write_text("\n".join(c for k in (2, 3, 4) for c in folds[f"fold_{k}"]))
    (out / "test.txt").write_text("\n".join(folds["fold_1"]))
    published = json.loads((data / "nnunet_v2_cross_validation.json").read_text())
    cases, classes = sorted(folds["fold_1"]), ("anterior", "posterior")
    theirs = np.array([[published[c][k] for k in classes] for c in cases])
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows, scores = [], []
    for seed in seeds:
        ours = measure(data, out, seed, given)
        scores.append(np.array([[ours[c][k] for k in classes] for c in cases]))
        plan, expected = (json.loads((out / f"run_{seed}" / f).read_text()) for f in PLANNED)
        minutes = json.loads((out / f"seconds_{seed}.json").read_text()) / 60
        rows.append(f"| medseg_supcon, seed {seed} | {shown(scores[-1])} | {minutes:.1f}, {expected['machine']} |")
    changes = ", ".join(("planned defaults", *given.set))
    mean = np.mean(scores, axis=0)
    difference = mean.mean(1) - theirs.mean(1)
    text = [
        f"{given.labels or len(folds['fold_2']) * 3} labelled scans (validation included), {len(cases)} test scans, "
        f"{changes}, {plan['epochs']} epochs of {plan['steps_per_epoch']} steps.",
        "",
        "| | mean Dice | anterior | posterior | minutes of `medseg train` |",
        "|---|---|---|---|---|",
        *rows,
        *([f"| mean of {len(seeds)} seeds | {shown(mean)} | |"] if len(seeds) > 1 else []),
        f"| nnU-Net v2, published | {shown(theirs)} | |",
        "",
        f"Per-scan difference (ours minus nnU-Net's): {difference.mean():+.4f}, "
        f"better on {int((difference > 0).sum())} of {len(cases)} scans.",
    ]
    print("\n".join(text))
    RESULTS.mkdir(exist_ok=True)
    command = "python -m benchmarks.hippocampus" + (f" --labels {given.labels}" if given.labels else "")
    command += f" --seeds {given.seeds}" if len(seeds) > 1 else ""
    command += "".join(f" --set {setting}" for setting in given.set)
    name = "_".join(("hippocampus", str(given.labels or "all"), *(s.replace("=", "_") for s in given.set))) + ".md"
    (RESULTS / name).write_text(f"Written by `{command}`.\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
