"""Does the predicted Dice tell wrong masks from right ones? Runs of two data sets on unseen and degraded scans.

    MEDSEG_DATA=/data python -m benchmarks.quality --out DIR [--set hippocampus] [--recipes joint,dice_ce] [--seeds 0,1,2]

MEDSEG_DATA holds `Task04_Hippocampus` (trained on 20 scans of folds 2-4, tested on fold 1) and `LeftAtrium_1p5mm` (8
scans of `pool`, tested on `development_test`); 1800 steps each. Each test scan is segmented as it is, in some of the kinds of
degradation that the quality model was fitted on, and in some that it has never seen (`UNKNOWN`, below); and scans of
the other set are, whose Dice is 0. Finished runs and measurements in DIR are kept. `--development` tests on the scans
of the training folds that the runs do not use instead: what was chosen, was chosen on these.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy import ndimage, stats

from medseg_supcon.bundle import cases_of
from medseg_supcon.datasets import class_indices, load_items, read_dataset
from medseg_supcon.inference import Predictor, prepare_volume
from medseg_supcon.quality import Degraded, degradations, rate
from medseg_supcon.scans import Grid, Scan, read_nifti, read_scan
from medseg_supcon.training import fit_quality

RESULTS = Path(__file__).parent / "results"
SHORT = ("--epochs", "36", "--set", "steps_per_epoch=50", "--set", "val_interval=9")  # 1800 steps
ATRIUM = ("plan::spacing=[2.5,2.5,2.5]", "plan::patch_size=[40,32,24]", "plan::keep_largest=['left atrium']")
SETS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "hippocampus": ("Task04_Hippocampus", 20, ()),
    "atrium": ("LeftAtrium_1p5mm", 8, tuple(word for s in ATRIUM for word in ("--set", s))),
}
FOREIGN = 14  # scans of the other set
PER_SCAN = 4  # degraded forms of a test scan, of known kinds and of unknown ones alike
Change = Callable[[Degraded, float, np.random.Generator], Degraded]


def of_image(change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]) -> Change:
    return lambda d, strength, rng: Degraded(change(d.image, strength, rng).astype(np.float32), d.label)


def truncation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """k-space is cut off: ringing."""
    spectrum = np.fft.fftshift(np.fft.fftn(image, axes=(1, 2, 3)), axes=(1, 2, 3))
    axes = [np.abs(np.arange(n) - n // 2) / n for n in image.shape[1:]]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    spectrum *= radius < 0.5 * (1 - 0.85 * strength)
    return np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(1, 2, 3)), axes=(1, 2, 3)).real


def salt_and_pepper(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    dice, (low, high) = rng.random(image.shape), np.percentile(image, (0.5, 99.5))
    return np.where(dice < 0.15 * strength, low, np.where(dice > 1 - 0.15 * strength, high, image))


def equalised(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    rank = np.argsort(np.argsort(image.ravel())).reshape(image.shape) / image.size
    return (1 - strength) * image + strength * rank * np.ptp(image)


def stripes(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Every slice has another brightness."""
    axis = int(rng.integers(1, 4))
    factor = 1 + 0.9 * strength * rng.uniform(-1, 1, image.shape[axis])
    return image * factor.reshape([-1 if a == axis else 1 for a in range(4)])


def box(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A box of one value hides a part of the scan."""
    size = [max(1, int(n * (0.2 + 0.4 * strength))) for n in image.shape[1:]]
    start = [int(rng.integers(0, n - s + 1)) for n, s in zip(image.shape[1:], size, strict=True)]
    hidden = image.copy()
    value = np.percentile(image, 99) if rng.random() < 0.5 else np.median(image)
    hidden[(slice(None), *(slice(a, a + s) for a, s in zip(start, size, strict=True)))] = value
    return hidden


def rician(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    sigma, signal = 0.35 * strength * np.ptp(image), image - image.min()
    first, second = (sigma * rng.standard_normal(image.shape) for _ in range(2))
    return np.sqrt((signal + first) ** 2 + second**2)


def solarised(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    low, high = np.percentile(image, (0.5, 99.5))
    unit = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.where(unit > 1 - 0.6 * strength, 1 - unit, unit)


def rotated(d: Degraded, strength: float, rng: np.random.Generator) -> Degraded:
    axes = ((0, 1), (0, 2), (1, 2))[int(rng.integers(3))]
    how: dict[str, Any] = {"angle": 15 + 45 * strength, "axes": axes, "reshape": False}
    image = np.stack([ndimage.rotate(c, order=1, mode="nearest", **how) for c in d.image])
    return Degraded(image, ndimage.rotate(d.label, order=0, **how))


def warped(d: Degraded, strength: float, rng: np.random.Generator) -> Degraded:
    shape = np.array(d.label.shape)
    shift = [
        ndimage.zoom(rng.uniform(-1, 1, (4, 4, 4)), shape / 4, order=2, grid_mode=True, mode="nearest") for _ in "xyz"
    ]
    where = [
        a + 10 * strength * s for a, s in zip(np.meshgrid(*map(np.arange, shape), indexing="ij"), shift, strict=True)
    ]
    image = np.stack([ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in d.image])
    return Degraded(image.astype(np.float32), ndimage.map_coordinates(d.label, where, order=0))


UNKNOWN: dict[str, Change] = {
    "rotated": rotated,
    "warped": warped,
    **{f.__name__: of_image(f) for f in (truncation, salt_and_pepper, equalised, stripes, box, rician, solarised)},
}


def cases(root: Path, name: str) -> tuple[list[str], list[str]]:
    """Names of the training and the test cases."""
    folder = root / SETS[name][0]
    if name == "hippocampus":
        folds = json.loads((folder / "folds.json").read_text())
        return [*folds["fold_2"], *folds["fold_3"], *folds["fold_4"]], folds["fold_1"]
    splits = json.loads((folder / "splits.json").read_text())
    return splits["pool"], splits["development_test"]


def trained(root: Path, out: Path, name: str, recipe: str, seed: int) -> Path:
    folder, labels, settings = SETS[name]
    run, listed = out / f"{name}_{recipe}_{seed}", out / f"{name}.txt"
    listed.write_text("\n".join(cases(root, name)[0]))
    if not (run / "docs" / "curves.png").exists():
        words = ("train", root / folder, "--out", run, "--cases", listed, "--labels", labels, "--recipe", recipe)
        words = (*words, "--seed", seed, *SHORT, *settings, "--resume")
        subprocess.run([sys.executable, "-m", "medseg_supcon.cli", *map(str, words)], check=True)
    if not (run / "models" / "quality.npz").exists():
        fit_quality(run)
    return run


def dice_of(mask: np.ndarray, label: np.ndarray, classes: int) -> float:
    """Mean Dice over the classes that the mask or the label map has; 0 if neither has any."""
    scores = []
    for c in range(1, classes):
        one, other = (mask == c) & (label >= 0), label == c
        if one.any() or other.any():
            scores.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean(scores)) if scores else 0.0


def forms(name: str, original: Degraded) -> list[tuple[str, str, Degraded]]:
    """(group, kind, form): the scan as it is, and some degraded forms; which ones follows from its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = [("clean", "clean", original)]
    for group, kinds in (("known", degradations(len(original.image))), ("unknown", UNKNOWN)):
        for kind in rng.choice(sorted(kinds), PER_SCAN, replace=False):
            made.append((group, str(kind), kinds[str(kind)](original, 1 - rng.random(), rng)))
    return made


def measure(run: Path, root: Path, name: str, development: bool) -> list[dict[str, Any]]:
    """A row per form of each test scan: its Dice and every score."""
    predictor = Predictor(run)
    plan, model = predictor.plan, predictor.quality_models[0]
    training, test = cases(root, name)
    if development:
        used = {item["name"] for section in cases_of(run).values() for item in section if item.get("label")}
        test = [case for case in training if case not in used][:: 3 if name == "hippocampus" else 2]
    other = next(key for key in SETS if key != name)
    rows = []

    def add(scan: Scan, group: str, kind: str, form: Degraded, volume: Any) -> None:
        affine = volume.monai_affine.copy()
        affine[:3, :3] *= form.zoom
        data = np.moveaxis(form.image, 0, -1) if volume.data.ndim == 4 else form.image[0]
        grid = Grid.at(form.label.shape, affine)
        changed = replace(volume, data=np.ascontiguousarray(data), grid=grid, monai_affine=affine)
        prediction = predictor.segment(prepare_volume(changed, scan, predictor.models, perf_counter()))
        evidence, quality = prediction.evidence[0], prediction.quality
        assert quality is not None and model is not None
        mask = class_indices(prediction.mask, plan | {"ignore_label": None})
        dice = 0.0 if form.foreign or group == "foreign" else dice_of(mask, form.label, len(plan["labels"]))
        probability = np.nan_to_num(evidence.probability[1:], nan=0.0).mean(axis=0)
        known = model.reference
        scores = {
            "predicted Dice": quality["dice"]["mean"],
            "mean probability": probability[0],
            "soft Dice": probability[1],
            "entropy": -probability[2],
            "volume": -float(np.abs(np.log(np.maximum(evidence.volume[1:], 1e-4)) - known.volume[0]).max()),
            "kNN distance": -float(np.nan_to_num(known.distances(evidence)[:, 0], nan=9.0).mean()),
            "histogram": -float((np.abs(evidence.quantiles - known.quantiles[0]) / known.quantiles[1]).mean()),
            "random": zlib.crc32(f"{scan.name}{kind}".encode()) / 2**32,
        }
        facts_alone = rate(plan, grid, prediction.evidence, [None])["verdict"]
        rows.append(
            {
                "scan": scan.name,
                "group": group,
                "kind": kind,
                "dice": dice,
                "interval": quality["interval"],
                "verdict": quality["verdict"],
                "facts": facts_alone,
                "scores": scores,
            }
        )

    dataset = read_dataset(root / SETS[name][0])
    items = load_items(
        [
            {"name": c.name, "image": [str(f) for f in c.images], "label": str(c.label)}
            for c in dataset.cases
            if c.name in test
        ],
        "/",
    )
    for item in items:
        images = [item["image"]] if isinstance(item["image"], str) else item["image"]
        scan = Scan(item["name"], tuple(map(Path, images)))
        volume = read_scan(scan, len(plan["channels"]))
        label = class_indices(read_nifti(Path(item["label"])).data, plan, item["label"])
        for group, kind, form in forms(scan.name, Degraded(volume.channels_first.astype(np.float32), label)):
            add(scan, group, kind, form, volume)
    for case in read_dataset(root / SETS[other][0]).labelled[:FOREIGN]:
        scan = Scan(case.name, case.images)
        volume = read_scan(scan, len(plan["channels"]))
        empty = np.zeros(volume.data.shape[:3], dtype=np.int16)
        add(scan, "foreign", other, Degraded(volume.channels_first.astype(np.float32), empty), volume)
    return rows


def excess_aurc(dice: np.ndarray, score: np.ndarray) -> float:
    """Area under the risk-coverage curve above that of the perfect order, as a share of random's (Zenk et al. 2025)."""
    risk, count = 1 - dice, np.arange(1, len(dice) + 1)

    def area(order: np.ndarray) -> float:
        return float((np.cumsum(risk[order]) / count).mean())

    best = area(np.argsort(risk))
    return (area(np.argsort(-score, kind="stable")) - best) / (float(risk.mean()) - best)


def auroc(failed: np.ndarray, score: np.ndarray) -> float:
    """Chance that a failure has a lower score than a success."""
    if failed.all() or not failed.any():
        return float("nan")
    return float(stats.mannwhitneyu(-score[failed], -score[~failed]).statistic / (failed.sum() * (~failed).sum()))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of one run, by what they are about."""
    dice, group = np.array([r["dice"] for r in rows]), np.array([r["group"] for r in rows])
    interval, verdict = np.array([r["interval"] for r in rows]), np.array([r["verdict"] for r in rows])
    predicted = np.array([r["scores"]["predicted Dice"] for r in rows])
    own, clean = group != "foreign", group == "clean"
    within = (dice >= interval[:, 0]) & (dice <= interval[:, 1])
    result = {
        "Dice, clean": dice[clean].mean(),
        "bias, clean": (predicted - dice)[clean].mean(),
        "error, clean": np.abs(predicted - dice)[clean].mean(),
        "coverage, clean": within[clean].mean(),
        "clean not good": (verdict[clean] != "good").mean(),
        "error, known and unknown": np.abs(predicted - dice)[own].mean(),
        "error, unknown": np.abs(predicted - dice)[group == "unknown"].mean(),
        "coverage, known and unknown": within[own].mean(),
        "foreign called good": float((verdict[group == "foreign"] == "good").sum()),
        "good with Dice below 0.5": float(((verdict == "good") & (dice < 0.5)).sum()),
    }
    for score in rows[0]["scores"]:
        values = np.array([r["scores"][score] for r in rows])
        result[f"excess AURC, {score}"] = excess_aurc(dice[own], values[own])
        result[f"excess AURC of unknown, {score}"] = excess_aurc(dice[group == "unknown"], values[group == "unknown"])
        result[f"AUROC, {score}"] = auroc(dice[own] < 0.5, values[own])
        result[f"Spearman, {score}"] = float(stats.spearmanr(values[own], dice[own]).statistic)
    return result


def table(name: str, results: dict[tuple[str, int], dict[str, float]], recipes: list[str]) -> list[str]:
    """Means over the seeds per recipe, and the paired difference of the first two recipes with its interval."""
    lines = [
        "",
        f"## {name}",
        "",
        f"| | {' | '.join(recipes)} | {recipes[0]} - {recipes[-1]} |",
        "|---|" + "---:|" * (len(recipes) + 1),
    ]
    seeds = sorted({seed for _, seed in results})
    for key in next(iter(results.values())):
        values = {
            recipe: np.array([results[recipe, s][key] for s in seeds if (recipe, s) in results]) for recipe in recipes
        }
        cells = [f"{v.mean():.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in values.values()]
        both = [s for s in seeds if all((recipe, s) in results for recipe in recipes)]
        change = np.array([results[recipes[0], s][key] - results[recipes[-1], s][key] for s in both])
        half = stats.t.ppf(0.975, len(change) - 1) * stats.sem(change) if len(change) > 1 else float("nan")
        lines.append(f"| {key} | {' | '.join(cells)} | {change.mean():+.3f} (+- {half:.3f}) |")
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--set", choices=SETS, action="append")
    options.add_argument("--recipes", default="joint,dice_ce")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--development", action="store_true")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not all((Path(root) / folder).is_dir() for folder, *_ in SETS.values()):
        print("Skipped: MEDSEG_DATA must name the folder that holds Task04_Hippocampus and LeftAtrium_1p5mm.")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    recipes, seeds = given.recipes.split(","), [int(seed) for seed in given.seeds.split(",")]
    words = " ".join(word for word in sys.argv[1:] if word not in ("--out", str(given.out)))
    for name in given.set or SETS:
        lines = [f"Written by `python -m benchmarks.quality --out DIR {words}`. Mean over the seeds (each seed)."]
        results = {}
        for recipe in recipes:
            for seed in seeds:
                run = trained(Path(root), given.out, name, recipe, seed)
                file = given.out / f"{run.name}{'_development' if given.development else ''}.json"
                if not file.exists():
                    file.write_text(json.dumps(measure(run, Path(root), name, given.development)))
                results[recipe, seed] = summary(json.loads(file.read_text()))
        lines += table(name, results, recipes)
        print("\n".join(lines))
        if not given.development:
            (RESULTS / f"quality_{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
