"""Does contrast pay? The comparisons behind docs/results.md, on two real sets of scans.

    MEDSEG_DATA=/data python -m benchmarks.evidence --out DIR [--set atrium] [--part deciding] [--workers 2]

MEDSEG_DATA holds `Task04_Hippocampus` (with `folds.json`: trained on folds 2-4, tested on fold 1) and
`LeftAtrium_1p5mm` (with `splits.json`: trained on `pool`, tested on `development_test`). Every part is one
`medseg compare`, which is printed and can be given by hand; finished runs are kept, so a broken call goes on.
The tables go to benchmarks/results/evidence_SET_PART.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STEPS_PER_EPOCH = 50  # of 4 patches: 2 views of 2 scans


@dataclass(frozen=True)
class Task:
    """A set of scans: its folder, who trains, who tests, and what holds for all runs on it."""

    folder: str
    deciding: str
    budgets: str
    epochs: int
    settings: tuple[str, ...] = ()

    def cases(self, root: Path) -> tuple[list[str], list[str]]:
        """Names to train on and to test on, as the data set's README says."""
        folder = root / self.folder
        if (folder / "folds.json").exists():
            folds = json.loads((folder / "folds.json").read_text())
            return [*folds["fold_2"], *folds["fold_3"], *folds["fold_4"]], folds["fold_1"]
        splits = json.loads((folder / "splits.json").read_text())
        return splits["pool"], splits["development_test"]


TASKS = {
    "hippocampus": Task("Task04_Hippocampus", "10", "5,21,42,all", 10),
    # an atrium is one piece: without its stray parts every recipe gains a point or two
    "atrium": Task("LeftAtrium_1p5mm", "8", "4,16,all", 10, ("plan::keep_largest=['left atrium']",)),
}
TUNED = str(HERE / "recipes" / "dice_ce_tuned.yaml")
PARTS = {  # folder; recipes, the baseline first; seeds; labels; whether corrupted scans are tested on, too
    "deciding": ("deciding", f"{TUNED},joint,dice_ce", "0,1,2,3,4", "deciding", False),
    "ablation": (
        "deciding",
        "dice_ce,joint",
        "0,1,2,3,4",
        "deciding",
        False,
    ),  # the same runs: contrast alone
    "recipes": ("deciding", f"{TUNED},joint,two_stage,semi", "0", "deciding", False),
    "budgets": ("budgets", f"{TUNED},joint", "0", "budgets", False),
    "robustness": (
        "deciding",
        f"{TUNED},joint,dice_ce",
        "0,1,2,3,4",
        "deciding",
        True,
    ),  # the deciding runs again
}


def command(name: str, part: str, root: Path, out: Path, workers: int) -> list[str]:
    """One `medseg compare`; writes the files of case names that it takes."""
    task = TASKS[name]
    folder, recipes, seeds, labels, robustness = PARTS[part]
    lists = []
    for option, names in zip(("--cases", "--test-cases"), task.cases(root), strict=True):
        path = out / f"{name}{option.replace('--', '_').replace('-', '_')}.txt"
        path.write_text("\n".join(names) + "\n")
        lists += [option, str(path)]
    settings = [f"steps_per_epoch={STEPS_PER_EPOCH}", f"val_interval={task.epochs}", *task.settings]
    return [
        *("compare", str(root / task.folder), "--out", str(out / f"{name}_{folder}"), *lists),
        *("--recipes", recipes, "--seeds", seeds, "--labels", getattr(task, labels)),
        *("--epochs", str(task.epochs), "--workers", str(workers)),
        "--robustness" if robustness else "--no-robustness",
        *(word for setting in settings for word in ("--set", setting)),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True, help="folder of the comparisons")
    options.add_argument("--set", choices=TASKS, action="append", help="default: both")
    options.add_argument("--part", choices=PARTS, action="append", help="default: all")
    options.add_argument("--workers", type=int, default=1, help="runs at once")
    options.add_argument("--print", action="store_true", help="only print the commands")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not all((Path(root) / task.folder).is_dir() for task in TASKS.values()):
        print("Skipped: MEDSEG_DATA must name the folder that holds Task04_Hippocampus and LeftAtrium_1p5mm.")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.part or PARTS:
        for name in given.set or TASKS:
            words = command(name, part, Path(root), given.out, given.workers)
            print("medseg", shlex.join(words), flush=True)
            if given.print:
                continue
            subprocess.run([sys.executable, "-m", "medseg_supcon.cli", *words], check=True)
            made = (given.out / f"{name}_{PARTS[part][0]}" / "summary.md").read_text()
            (RESULTS / f"evidence_{name}_{part}.md").write_text(made)


if __name__ == "__main__":
    main()
