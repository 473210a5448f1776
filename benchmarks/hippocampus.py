"""Task04 Hippocampus at the planned defaults: trained on folds 2-4, tested on all 52 scans of fold 1.

    MEDSEG_DATA=/data python -m benchmarks.hippocampus [--labels 20] [--set KEY=VALUE ...] [--out DIR]

MEDSEG_DATA holds `Task04_Hippocampus` with `folds.json` (the published folds) and
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

RESULTS = Path(__file__).parent / "results"
TASK = "Task04_Hippocampus"


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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--labels", type=int, help="labelled scans, validation included; default: all 156")
    options.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for `medseg train`")
    options.add_argument("--out", type=Path, help="folder for the run; default: a temporary folder")
    options.add_argument("--reuse", action="store_true", help="only read the results of an earlier call from --out")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not (Path(root) / TASK).is_dir():
        print(f"Skipped: MEDSEG_DATA must name the folder that holds {TASK}.")
        return
    data = Path(root) / TASK
    folds = json.loads((data / "folds.json").read_text())
    out = given.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.txt").write_text("\n".join(c for k in (2, 3, 4) for c in folds[f"fold_{k}"]))
    (out / "test.txt").write_text("\n".join(folds["fold_1"]))
    if not given.reuse:
        budget = ("--labels", given.labels) if given.labels else ()
        settings = [word for setting in given.set for word in ("--set", setting)]
        seconds = medseg("train", data, "--cases", out / "training.txt", *budget, *settings, "--out", out / "run")
        medseg("evaluate", out / "run", data, "--cases", out / "test.txt", "--out", out / "test")
        (out / "seconds.json").write_text(json.dumps(seconds))
    ours = dice_per_case(out / "test" / "metrics.csv")
    published = json.loads((data / "nnunet_v2_cross_validation.json").read_text())
    cases, classes = sorted(ours), ("anterior", "posterior")
    scores = np.array([[ours[c][k] for k in classes] for c in cases])
    theirs = np.array([[published[c][k] for k in classes] for c in cases])
    plan, expected = (json.loads((out / "run" / f).read_text()) for f in ("configs/plan.json", "logs/expected.json"))
    minutes = json.loads((out / "seconds.json").read_text()) / 60
    told = ", ".join(("planned defaults", *given.set))
    text = [
        f"{given.labels or len(folds['fold_2']) * 3} labelled scans (validation included), {len(cases)} test scans, "
        f"{plan['epochs']} epochs of {plan['steps_per_epoch']} steps, {minutes:.1f} minutes for `medseg train` "
        f"on {expected['machine']}, seed 0.",
        "",
        "| | mean Dice | anterior | posterior |",
        "|---|---|---|---|",
        f"| medseg_supcon, {told} | {scores.mean():.4f} | {scores[:, 0].mean():.4f} | {scores[:, 1].mean():.4f} |",
        f"| nnU-Net v2, published | {theirs.mean():.4f} | {theirs[:, 0].mean():.4f} | {theirs[:, 1].mean():.4f} |",
        "",
        f"Per-scan difference (ours minus nnU-Net's): {(scores.mean(1) - theirs.mean(1)).mean():+.4f}, "
        f"better on {int((scores.mean(1) > theirs.mean(1)).sum())} of {len(cases)} scans.",
    ]
    print("\n".join(text))
    RESULTS.mkdir(exist_ok=True)
    command = "python -m benchmarks.hippocampus" + (f" --labels {given.labels}" if given.labels else "")
    command += "".join(f" --set {setting}" for setting in given.set)
    name = "_".join(("hippocampus", str(given.labels or "all"), *(s.replace("=", "_") for s in given.set))) + ".md"
    (RESULTS / name).write_text(f"Written by `{command}`.\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
