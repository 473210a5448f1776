"""Does contrast help? The comparisons behind docs/results.md, on two real data sets.

    MEDSEG_DATA=/data python -m benchmarks.evidence --out DIR [--set atrium] [--part deciding] [--workers 2]

MEDSEG_DATA contains `Task04_Hippocampus` (with `folds.json`: trained on folds 2-4, tested on fold 1) and
`LeftAtrium_1p5mm` (with `splits.json`: trained on `pool`, tested on `development_test`). Every part is one
`medseg compare` call, which is printed, so you can run it yourself. Finished runs are kept: after an interruption,
run the same command again. The tables are written to benchmarks/results/evidence_SET_PART.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = "0,1,2,3,4"
STEPS_PER_EPOCH = 50  # each of 4 patches: 2 views of 2 scans
# bias_field=0 and no scanner_shifts below: these comparisons were made before bias fields became a default, and led to it


@dataclass(frozen=True)
class Task:
    """A data set: its folder, the main label budget, the other budgets, and settings of all runs on it."""

    folder: str
    deciding: str
    budgets: str
    settings: tuple[str, ...] = ()

    def cases(self, root: Path) -> tuple[list[str], list[str]]:
        """Names of the training and the test cases, as the data set's README defines them."""
        folder = root / self.folder
        if (folder / "folds.json").exists():
            folds = json.loads((folder / "folds.json").read_text())
            return [*folds["fold_2"], *folds["fold_3"], *folds["fold_4"]], folds["fold_1"]
        splits = json.loads((folder / "splits.json").read_text())
        return splits["pool"], splits["development_test"]


TASKS = {
    "hippocampus": Task("Task04_Hippocampus", "10", "5,21,42,all"),
    # an atrium is one piece: removing stray parts gains every recipe a point or two
    "atrium": Task("LeftAtrium_1p5mm", "8", "4,16,all", ("plan::keep_largest=['left atrium']",)),
}


@dataclass(frozen=True)
class Part:
    """One `medseg compare` call on a data set.

    Attributes:
        folder: folder of the comparison; parts with the same folder share its runs.
        recipes: the baseline first.
        labels: "deciding" or "budgets" of the task, or numbers.
        sets: the tasks that this part applies to.
    """

    folder: str
    recipes: str
    seeds: str = SEEDS
    labels: str = "deciding"
    epochs: int = 10
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ("--no-robustness",)
    sets: tuple[str, ...] = tuple(TASKS)


TUNED = str(HERE / "recipes" / "dice_ce_tuned.yaml")
SEMI = str(HERE / "recipes" / "semi_tuned.yaml")
VIEWS = str(HERE / "recipes" / "dice_ce_semi_views.yaml")
SHADED = str(HERE / "recipes" / "dice_ce_bias_field.yaml")
SEMI_SHADED = str(HERE / "recipes" / "semi_bias_field.yaml")
SEMI_0 = str(HERE / "recipes" / "semi_no_contrast.yaml")
LONG_OPTIONS = ("--validation", "0", "--robustness")
# long enough that the number of labels matters: six times the steps, at 2.5 mm, where a step costs a third
ATRIUM: dict[str, Any] = {
    "epochs": 60,
    "settings": ("plan::spacing=[2.5,2.5,2.5]", "plan::patch_size=[40,32,24]"),
    "options": LONG_OPTIONS,
    "sets": ("atrium",),
}
# the hippocampus is small: its own grid, three times the steps, as many seeds as fit in an hour on two cores
HIPPOCAMPUS: dict[str, Any] = {
    "epochs": 30,
    "seeds": "0,1,2",
    "options": LONG_OPTIONS,
    "sets": ("hippocampus",),
}
PARTS = {
    "deciding": Part("deciding", f"{TUNED},joint,dice_ce"),
    "ablation": Part("deciding", "dice_ce,joint"),  # the same runs: contrast alone
    "recipes": Part("deciding", f"{TUNED},joint,two_stage,semi", "0"),
    "budgets": Part("budgets", f"{TUNED},joint", "0", "budgets"),
    # the same runs again, on degraded scans
    "robustness": Part("deciding", f"{TUNED},joint,dice_ce", options=("--robustness",)),
    "robustness_ablation": Part("deciding", "dice_ce,joint", options=("--robustness",)),
    "long": Part("long", f"{TUNED},{SEMI},{SEMI_0}", **ATRIUM),
    "long_ablation": Part("long", f"{SEMI_0},{SEMI}", **ATRIUM),
    "long_hippocampus": Part("long", f"{TUNED},{SEMI},{SEMI_0}", **HIPPOCAMPUS),
    "long_hippocampus_ablation": Part("long", f"{SEMI_0},{SEMI}", **HIPPOCAMPUS),
    # does augmentation give what contrast does not?
    "long_bias_field": Part("long", f"{TUNED},{SHADED}", "0,1,2", **ATRIUM),
    "long_bias_field_hippocampus": Part("long", f"{TUNED},{SHADED}", **HIPPOCAMPUS),
    "long_bias_field_semi": Part("long", f"{SHADED},{SEMI_SHADED}", "0,1,2", **ATRIUM),
    # is it the unlabelled scans, or the views that `semi` uses?
    "long_views": Part("long", f"{TUNED},{VIEWS},{SEMI_0}", **ATRIUM),
    "long_budgets": Part(
        "long_budgets",
        f"{TUNED},{SEMI}",
        "0",
        "4",
        **ATRIUM | {"options": ("--validation", "0", "--no-robustness")},
    ),
}


def command(name: str, part: Part, root: Path, out: Path, workers: int) -> list[str]:
    """The words of one `medseg compare` call; writes the files of case names that it reads."""
    task = TASKS[name]
    lists = []
    for option, names in zip(("--cases", "--test-cases"), task.cases(root), strict=True):
        path = out / f"{name}{option.replace('--', '_').replace('-', '_')}.txt"
        path.write_text("\n".join(names) + "\n")
        lists += [option, str(path)]
    settings = [
        f"steps_per_epoch={STEPS_PER_EPOCH}",
        f"val_interval={part.epochs}",
        "bias_field=0",
        "scanner_shifts={}",
    ]
    labels = {"deciding": task.deciding, "budgets": task.budgets}.get(part.labels, part.labels)
    return [
        *("compare", str(root / task.folder), "--out", str(out / f"{name}_{part.folder}"), *lists),
        *("--recipes", part.recipes, "--seeds", part.seeds, "--labels", labels),
        *("--epochs", str(part.epochs), "--workers", str(workers), *part.options),
        *(word for setting in (*settings, *task.settings, *part.settings) for word in ("--set", setting)),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True, help="folder for the comparisons")
    options.add_argument("--set", choices=TASKS, action="append", help="default: both")
    options.add_argument("--part", choices=PARTS, action="append", help="default: all")
    options.add_argument("--workers", type=int, default=1, help="number of runs at the same time")
    options.add_argument("--epochs", type=int, help="another length, for a GPU; in folders of their own")
    options.add_argument("--print", action="store_true", help="only print the commands")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not all((Path(root) / task.folder).is_dir() for task in TASKS.values()):
        print("Skipped: MEDSEG_DATA must name the folder that contains Task04_Hippocampus and LeftAtrium_1p5mm.")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for title in given.part or PARTS:
        part = PARTS[title]
        if given.epochs is not None:
            part = replace(part, epochs=given.epochs, folder=f"{part.folder}_{given.epochs}")
            title += f"_{given.epochs}"
        for name in [name for name in given.set or TASKS if name in part.sets]:
            words = command(name, part, Path(root), given.out, given.workers)
            print("medseg", shlex.join(words), flush=True)
            if given.print:
                continue
            subprocess.run([sys.executable, "-m", "medseg_supcon.cli", *words], check=True)
            made = (given.out / f"{name}_{part.folder}" / "summary.md").read_text()
            (RESULTS / f"evidence_{name}_{title}.md").write_text(made)


if __name__ == "__main__":
    main()
