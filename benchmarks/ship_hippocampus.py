"""Makes `bundles/hippocampus` again: the trained bundle that comes with the package, and its scores.

    MEDSEG_DATA=/data python -m benchmarks.ship_hippocampus --out DIR [--part fold_1]

MEDSEG_DATA contains `Task04_Hippocampus` with `folds.json`: folds 1 to 4 of nnU-Net's published split, 208 scans. Fold 0 is
not used for anything. The parts, of which `--part` does one:

- fold_1 to fold_4, and `cut`, a quarter of all scans drawn at random: train on the other scans, then predict and score these;
- final: train on all 208 scans, of which it validates on some, as every run does;
- ship: write the bundle from the final run, with the scores of the parts that are done.

Everything is kept in DIR. A part that was interrupted continues when it is called again. To do two parts at a time, call the
script twice with OMP_NUM_THREADS=1. The weights stay in float32: in bfloat16, 10 of 12 masks differed by 1 to 3 voxels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hippocampus import TASK, medseg
from medseg_supcon.bundle import (
    dump_commented,
    load_commented,
    read_config,
    write_metadata,
    write_model_card,
    write_twins,
)
from medseg_supcon.training import is_complete

# Options of `medseg train` in all parts, such as "--recipe", "dice_ce", "--set", "learning_rate=1e-3"; none: its defaults.
RECIPE: tuple[str, ...] = ()
VERSION, CHANGE = "0.1.0", "first version, trained on all labelled scans of folds 1 to 4"

BUNDLE = Path(__file__).parents[1] / "bundles" / "hippocampus"
# Of the final run. Left out are the checkpoints, and all that shows or describes single scans: eval/ and logs/.
SHIPPED = ("LICENSE", "configs", "docs", "scripts", "models/model.pt", "models/quality.npz", "logs/history.csv")
CUT, FINAL, SHIP = "cut", "final", "ship"
OTHER_ORGAN, FOREIGN = "LeftAtrium_1p5mm", 14
COLUMNS = {  # head in the card: (key, digits)
    "Anterior": ("Anterior", 4),
    "Posterior": ("Posterior", 4),
    "mean Dice": ("dice", 4),
    "HD95, mm": ("hd95_mm", 2),
    "error of the predicted Dice": ("error", 3),
    "its bias": ("bias", 3),
    "in the 90 % interval": ("covered", 2),
    "not good": ("not_good", 2),
    "nnU-Net v2, published": ("nnunet", 4),
}
LICENCE_NOTE = """The weights and the quality model in models/ were trained on the data set Task04 Hippocampus of the Medical
Segmentation Decathlon, by Vanderbilt University Medical Center (Simpson et al. 2019, https://arxiv.org/abs/1902.09063;
Antonelli et al. 2022, https://doi.org/10.1038/s41467-022-30695-9). It is licensed under CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/), and so are they. All other files of this folder are licensed under the
Apache License 2.0 (LICENSE).
"""
LIMITS = """- The training scans are cut out around one hippocampus: 31 to 43 x 40 to 59 x 24 to 47 mm. Cut other scans
  likewise; a scan of a whole head is unlike all training scans.
- All are T1-weighted MR of one site (MPRAGE at 3 T, of healthy adults and of adults with a psychotic disorder).
"""
METADATA = {
    "version": VERSION,
    "changelog": {VERSION: CHANGE},
    "authors": "the authors of medseg-supcon",
    "copyright": "Weights: CC BY-SA 4.0, as their training data. All else: Apache License 2.0. See LICENSE",
    "data_source": "Task04 Hippocampus, Medical Segmentation Decathlon, Vanderbilt University Medical Center (CC BY-SA 4.0)",
}
REFERENCES = (
    "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022, https://doi.org/10.1038/s41467-022-30695-9",
    "Simpson et al., A large annotated medical image dataset for the development and evaluation of segmentation algorithms, "
    "2019, https://arxiv.org/abs/1902.09063",
)


def held_out(data: Path) -> dict[str, list[str]]:
    """Part -> the scans that it does not train on."""
    folds: dict[str, list[str]] = json.loads((data / "folds.json").read_text())
    every = sorted(name for names in folds.values() for name in names)
    return {**folds, CUT: sorted(random.Random(0).sample(every, len(every) // 4))}


def measure(data: Path, folder: Path, training: Sequence[str], test: Sequence[str]) -> None:
    """Train a run, then predict and score the scans that it was not trained on."""
    train(data, folder, training)
    listed = folder / "test.txt"
    listed.write_text("\n".join(test) + "\n")
    scans = [data / "imagesTr" / f"{name}.nii.gz" for name in test]
    medseg("predict", folder / "run", *scans, "--out", folder / "masks", "--overwrite")
    medseg("evaluate", folder / "run", data, "--cases", listed, "--out", folder / "scores")


def train(data: Path, folder: Path, training: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "training.txt"
    listed.write_text("\n".join(training) + "\n")
    medseg("train", data, "--out", folder / "run", "--cases", listed, *RECIPE, "--resume")


def recipe_of(run: Path) -> dict[str, Any]:
    """What the parts have in common; the network may follow from the cases."""
    plan = json.loads((run / "configs" / "plan.json").read_text(encoding="utf-8"))
    return read_config(run / "configs" / "train.yaml") | {"network_def": None, "epochs": plan["epochs"]}


def rows_of(folder: Path, published: dict[str, Any]) -> list[dict[str, float]]:
    """What was measured on each held-out scan of a part."""
    scores: dict[str, list[dict[str, str]]] = {}
    with (folder / "scores" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["case"], []).append(row)
    manifest = json.loads((folder / "masks" / "manifest.json").read_text())
    quality = {scan["name"]: scan["quality"] for scan in manifest["scans"]}
    rows = []
    for case, classes in scores.items():
        row = {one["class"]: float(one["dice"]) for one in classes}
        dice = row["dice"] = float(np.mean(list(row.values())))
        low, high = quality[case]["interval"]
        predicted = quality[case]["dice"]["mean"]
        row |= {"hd95_mm": float(np.mean([float(one["hd95_mm"]) for one in classes])), "covered": low <= dice <= high}
        row |= {"error": abs(predicted - dice), "bias": predicted - dice}
        row["not_good"] = quality[case]["verdict"] != "good"
        row["nnunet"] = (published[case]["anterior"] + published[case]["posterior"]) / 2
        rows.append(row)
    return rows


def mean(rows: Sequence[dict[str, float]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def table(parts: dict[str, list[dict[str, float]]]) -> list[str]:
    """Means per part, and over the folds, which have each scan once."""
    folds = [row for part, rows in parts.items() if part != CUT for row in rows]
    every = {**parts, **({"folds together": folds} if folds else {})}
    lines = ["| held out | scans | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for part, rows in every.items():
        cells = [f"{mean(rows, key):.{digits}f}" for key, digits in COLUMNS.values()]
        lines.append(f"| {part.replace('_', ' ')} | {len(rows)} | " + " | ".join(cells) + " |")
    return lines


def report(parts: dict[str, list[dict[str, float]]], foreign: Sequence[str]) -> str:
    """The card's section on networks of the same recipe, each on scans that it was not trained on."""
    text = [
        "This network has seen all scans, in training or validation. So the scores are those of other networks of the",
        "same recipe and length, each on scans that it has not seen. The folds are those of nnU-Net's published split,",
        "whose fold 0 was not used for anything. `cut` is a quarter of all scans, drawn at random. Error and bias:",
        "predicted minus true mean Dice of a scan, absolute and signed. `python -m benchmarks.ship_hippocampus` in the",
        "source code repeats all of this.",
        "",
        *table(parts),
    ]
    if foreign:
        text += [
            "",
            f"Called good, of {len(foreign)} masks of another organ's scans (left atrium, MR): {foreign.count('good')}.",
        ]
    return "\n".join(text) + "\n"


def assemble(run: Path, bundle: Path, parts: dict[str, list[dict[str, float]]], foreign: Sequence[str] = ()) -> None:
    """Write the bundle from the final run, without the training's files and the training machine's paths."""
    shutil.rmtree(bundle, ignore_errors=True)
    for name in SHIPPED:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        if (run / name).is_dir():
            shutil.copytree(run / name, bundle / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(run / name, bundle / name)
    for name in ("train", "evaluate"):
        path = bundle / "configs" / f"{name}.yaml"
        tree = load_commented(path)
        tree["dataset_dir"] = ""
        path.write_text(dump_commented(tree), encoding="utf-8")
    write_twins(bundle)
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8")) | METADATA
    metadata["references"] = [*metadata["references"], *REFERENCES]
    path.write_text(json.dumps(metadata), encoding="utf-8")
    write_metadata(bundle)
    metadata = json.loads(path.read_text(encoding="utf-8"))
    folds = [row for part, rows in parts.items() if part != CUT for row in rows]
    if folds:
        means = {f"{name}_dice": mean(folds, name) for name in ("Anterior", "Posterior")}
        means |= {"mean_dice": mean(folds, "dice"), "mean_hd95_mm": mean(folds, "hd95_mm")}
        metadata["eval_metrics"] = {"cases": len(folds)} | {name: round(value, 4) for name, value in means.items()}
    path.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_model_card(bundle)
    shutil.rmtree(bundle / "logs")
    path = bundle / "docs" / "README.md"
    card = path.read_text(encoding="utf-8").partition("## Licence")[0]
    card = card.replace("## Metrics\n", f"## Metrics\n\n{report(parts, foreign)}", 1)
    card = card.replace("## Limits\n\n", f"## Limits\n\n{LIMITS}", 1)
    for name in (
        "evaluate",
        "train",
    ):  # their paths start from the data set's folder, which is elsewhere on each computer
        line = f"configs/{name}.yaml --bundle_root BUNDLE"
        card = card.replace(line, f"{line} --dataset_dir {TASK}")
    path.write_text(f"{card}## Licence\n\n{LICENCE_NOTE}", encoding="utf-8")
    path = bundle / "LICENSE"
    path.write_text(f"{LICENCE_NOTE}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True, help="folder for the runs")
    options.add_argument("--part", help="fold_1 to fold_4, cut, final or ship; default: all, one after the other")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not (Path(root) / TASK).is_dir():
        print(f"Skipped: MEDSEG_DATA must name the folder that contains {TASK}.")
        return
    data, other = Path(root) / TASK, Path(root) / OTHER_ORGAN / "imagesTr"
    tests = held_out(data)
    every = sorted(set().union(*tests.values()))
    steps = [*tests, FINAL, SHIP]
    if given.part not in (None, *steps):
        options.error(f"--part {given.part}: expected one of {', '.join(steps)}")
    for part in steps if given.part is None else [given.part]:
        folder = given.out / part
        if part in tests:
            measure(data, folder, [name for name in every if name not in tests[part]], tests[part])
        elif part == FINAL:
            train(data, folder, every)
            if foreign := sorted(other.glob("*.nii.gz"))[:FOREIGN]:
                medseg("predict", folder / "run", *foreign, "--out", folder / "foreign", "--overwrite")
        else:
            published = json.loads((data / "nnunet_v2_cross_validation.json").read_text())
            done = [name for name in tests if (given.out / name / "scores" / "metrics.csv").exists()]
            parts = {name: rows_of(given.out / name, published) for name in done}
            run = given.out / FINAL / "run"
            if not is_complete(run):
                raise SystemExit(f"{run} is not finished. Train it first: --part {FINAL}")
            if other_recipe := [name for name in done if recipe_of(given.out / name / "run") != recipe_of(run)]:
                raise SystemExit(
                    f"{', '.join(other_recipe)}: trained with another recipe or length than {run}. Train again."
                )
            manifest = given.out / FINAL / "foreign" / "manifest.json"
            scans = json.loads(manifest.read_text())["scans"] if manifest.exists() else []
            assemble(run, BUNDLE, parts, [scan["quality"]["verdict"] for scan in scans])
            size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
            print(
                f"{BUNDLE}: {size / 2**20:.1f} MiB, scores of {', '.join(parts) or 'no part'}", *table(parts), sep="\n"
            )


if __name__ == "__main__":
    main()
