"""Does the predicted Dice tell wrong masks from right ones? Runs of two data sets on unseen and degraded scans.

    MEDSEG_DATA=/data python -m benchmarks.quality --out DIR [--set hippocampus] [--recipes joint,dice_ce] [--seeds 0,1,2]

MEDSEG_DATA holds `Task04_Hippocampus` (trained on 20 scans of folds 2-4, tested on fold 1; `hippocampus4`: 24 scans,
so that exactly four are for validation) and `LeftAtrium_1p5mm` (8 scans of `pool`, tested on `development_test`); 1800
steps each. Each test scan is segmented as it is, in some of the kinds of degradation that the quality model was fitted
on, in some that it has never seen (`UNKNOWN` in `_test_scans.py`), and read from a DICOM series; and scans of the other
set are, whose Dice is 0. The seeds' runs are measured one by one, and together as an ensemble.

`--runs DIR` takes trained runs, DIR/SET_RECIPE_SEED, as they are and trains none; one without a quality model gets one.
`--out` (with `--runs`, DIR by default) keeps measurements: the same call continues an interrupted one. `--embedding`
also compares where the distance to the training voxels is measured: in the network's features or in the projection head's
embedding, each with a quality model of its own on the same masks. `--development` tests on the scans of the training
folds that the runs do not use instead: what was chosen, was chosen on these.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from benchmarks._quality_table import Masks, Row, add_pairwise, agreement_of, summary, table
from benchmarks._test_scans import UNKNOWN, write_dicom
from medseg_supcon.bundle import cases_of
from medseg_supcon.datasets import class_indices, load_items, read_dataset
from medseg_supcon.embedding import AFTER, heads_of
from medseg_supcon.errors import RunError
from medseg_supcon.inference import Prediction, Predictor, prepare_volume
from medseg_supcon.quality import Degraded, Evidence, QualityModel, degradations, rate
from medseg_supcon.scans import Scan, Volume, read_nifti, read_scan
from medseg_supcon.training import fit_quality, quality_samples

RESULTS = Path(__file__).parent / "results"
SHORT = ("--epochs", "36", "--set", "steps_per_epoch=50", "--set", "val_interval=9")  # 1800 steps
ATRIUM = ("plan::spacing=[2.5,2.5,2.5]", "plan::patch_size=[40,32,24]", "plan::keep_largest=['left atrium']")
SETS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "hippocampus": ("Task04_Hippocampus", 20, ()),
    "hippocampus4": ("Task04_Hippocampus", 24, ()),
    "atrium": ("LeftAtrium_1p5mm", 8, tuple(word for s in ATRIUM for word in ("--set", s))),
}
FOREIGN = 14  # scans of the other set
PER_SCAN = 4  # degraded forms of a test scan, of known kinds and of unknown ones alike
ENSEMBLE = "ensemble"
MOST_MEMBERS = 5


def cases(root: Path, name: str) -> tuple[list[str], list[str]]:
    """Names of the training and the test cases."""
    folder = root / SETS[name][0]
    if (folder / "folds.json").exists():
        folds = json.loads((folder / "folds.json").read_text())
        return [*folds["fold_2"], *folds["fold_3"], *folds["fold_4"]], folds["fold_1"]
    splits = json.loads((folder / "splits.json").read_text())
    return splits["pool"], splits["development_test"]


def trained(root: Path, out: Path, name: str, recipe: str, seed: int) -> Path:
    """The run of a set, a recipe and a seed, trained unless it is there."""
    folder, labels, settings = SETS[name]
    run, listed = out / f"{name}_{recipe}_{seed}", out / f"{name}.txt"
    listed.write_text("\n".join(cases(root, name)[0]))
    if not (run / "docs" / "curves.png").exists():
        words = ("train", root / folder, "--out", run, "--cases", listed, "--labels", labels, "--recipe", recipe)
        words = (*words, "--seed", seed, *SHORT, *settings, "--resume")
        subprocess.run([sys.executable, "-m", "medseg_supcon.cli", *map(str, words)], check=True)
    return run


def rated(run: Path) -> Path:
    """The same run, with a quality model that this program can read."""
    try:
        model = QualityModel.load(run)
    except RunError:  # of another version
        model = None
    if model is None:
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


class Measurement:
    """Rows (a form of a test scan, its Dice and every score) and masks of a run, or of an ensemble of runs."""

    def __init__(self, runs: list[Path], embedding: bool) -> None:
        self.predictor, self.plain = Predictor(runs), Predictor(runs, quality=False)
        self.plan, self.classes = self.predictor.plan, len(self.predictor.plan["labels"])
        self.known = [model for model in self.predictor.quality_models if model is not None]
        self.rows: list[Row] = []
        self.masks: Masks = []
        self.sources = self._sources(runs[0]) if embedding and len(runs) == 1 else {}

    def _sources(self, run: Path) -> dict[str, tuple[Any, QualityModel]]:
        """Where the reference vectors are from -> what turns features into them, and a quality model."""
        heads, _ = heads_of(run, trust=True)
        if not heads:
            return {}
        head, samples = heads[AFTER].eval(), quality_samples(run)

        def embedded(evidence: Evidence) -> Evidence:
            with torch.inference_mode():
                parts = [head(torch.from_numpy(f)).numpy() if len(f) else f for f in evidence.features]
            return replace(evidence, features=parts)

        made = {"features": lambda evidence: evidence, "projection head": embedded}
        return {
            name: (change, QualityModel.fit([replace(s, evidence=change(s.evidence)) for s in samples]))
            for name, change in made.items()
        }

    def scan(self, scan: Scan, volume: Volume, label: np.ndarray, every: list[tuple[str, str, Degraded]]) -> None:
        for group, kind, form in every:
            changed = form.as_volume(volume)
            prediction = self._segment(self.predictor, scan, changed)
            mask = class_indices(prediction.mask, self.plan | {"ignore_label": None})
            dice = 0.0 if form.foreign or group == "foreign" else dice_of(mask, form.label, self.classes)
            self._add(scan.name, group, kind, dice, prediction, mask, self._flip_agreement(scan, changed, mask))
        if every[0][0] == "clean":
            with tempfile.TemporaryDirectory() as folder:
                write_dicom(Path(folder) / scan.name, volume.channels_first[0], volume.affine)
                prediction = self.predictor.predict(Path(folder) / scan.name)
            turn = ornt_transform(io_orientation(prediction.grid.affine), io_orientation(volume.affine))
            mask = class_indices(apply_orientation(prediction.mask, turn), self.plan | {"ignore_label": None})
            dice = dice_of(mask, label, self.classes)
            self._add(scan.name, "dicom", "dicom", dice, prediction, mask, float("nan"))

    def _segment(self, predictor: Predictor, scan: Scan, volume: Volume) -> Prediction:
        return predictor.segment(prepare_volume(volume, scan, predictor.models, perf_counter()))

    def _flip_agreement(self, scan: Scan, volume: Volume, mask: np.ndarray) -> float:
        """Dice of the mask and that of the scan mirrored left to right."""
        axis = int(np.flatnonzero(io_orientation(volume.affine)[:, 0] == 0)[0])
        mirrored = replace(volume, data=np.ascontiguousarray(np.flip(volume.data, axis)))
        other = class_indices(self._segment(self.plain, scan, mirrored).mask, self.plan | {"ignore_label": None})
        return agreement_of(mask, np.flip(other, axis), self.classes)

    def _add(
        self, name: str, group: str, kind: str, dice: float, prediction: Prediction, mask: np.ndarray, flipped: float
    ) -> None:
        quality, every = prediction.quality, prediction.evidence
        assert quality is not None

        def mean(score: Any) -> float:
            return float(np.mean([score(e, m.reference) for e, m in zip(every, self.known, strict=True)]))

        def probability(column: int) -> float:
            return mean(lambda e, _: np.nan_to_num(e.probability[1:, column], nan=float(column == 2)).mean())

        scores = {
            "predicted Dice": quality["dice"]["mean"],
            "mean probability": probability(0),
            "soft Dice": probability(1),
            "entropy": -probability(2),
            "flip agreement": flipped,
            "volume": -mean(lambda e, r: np.abs(np.log(np.maximum(e.volume[1:], 1e-4)) - r.volume[0]).max()),
            "kNN distance": -mean(lambda e, r: np.nan_to_num(r.distances(e)[:, 0], nan=9.0).mean()),
            "histogram": -mean(lambda e, r: (np.abs(e.quantiles - r.quantiles[0]) / r.quantiles[1]).mean()),
            "random": zlib.crc32(f"{name}{kind}".encode()) / 2**32,
        }
        for source, (change, model) in self.sources.items():
            evidence = change(every[0])
            scores[f"predicted Dice with {source}"] = model.estimate(evidence).mean
            scores[f"kNN distance in {source}"] = -float(
                np.nan_to_num(model.reference.distances(evidence)[:, 0], nan=9.0).mean()
            )
        facts_alone = rate(self.plan, prediction.grid, every[:1], [None])["verdict"]
        row = {"scan": name, "group": group, "kind": kind, "dice": dice, "interval": quality["interval"]}
        self.rows.append(row | {"verdict": quality["verdict"], "facts": facts_alone, "scores": scores})
        self.masks.append(mask.astype(np.uint8))


def measure(runs: list[Path], root: Path, name: str, development: bool, embedding: bool) -> Measurement:
    """Every form of each test scan, and scans of the other set."""
    result = Measurement(runs, embedding)
    plan = result.plan
    training, test = cases(root, name)
    if development:
        used = {item["name"] for run in runs for s in cases_of(run).values() for item in s if item.get("label")}
        test = [case for case in training if case not in used][:: 2 if name == "atrium" else 3]
    for case in read_dataset(root / SETS[name][0]).cases:
        if case.name in test:
            item = load_items(
                [{"name": case.name, "image": list(map(str, case.images)), "label": str(case.label)}], "/"
            )
            scan = Scan(case.name, case.images)
            volume = read_scan(scan, len(plan["channels"]))
            label = class_indices(read_nifti(Path(item[0]["label"])).data, plan, item[0]["label"])
            every = forms(scan.name, Degraded(volume.channels_first.astype(np.float32), label))
            result.scan(scan, volume, label, every)
    other = "hippocampus" if name == "atrium" else "atrium"
    for case in read_dataset(root / SETS[other][0]).labelled[:FOREIGN]:
        scan = Scan(case.name, case.images)
        volume = read_scan(scan, len(plan["channels"]))
        empty = np.zeros(volume.data.shape[:3], dtype=np.int16)
        form = Degraded(volume.channels_first.astype(np.float32), empty)
        result.scan(scan, volume, empty, [("foreign", other, form)])
    return result


def measured(job: tuple[list[Path], Path, Path, str, bool, bool], threads: int) -> None:
    """Measure a run, or an ensemble, unless that was done after its quality model was fitted."""
    runs, file, root, name, development, embedding = job
    for run in runs:
        rated(run)
    newest = max((run / "models" / "quality.npz").stat().st_mtime for run in runs)
    if file.exists() and file.stat().st_mtime >= newest:
        return
    if threads:
        torch.set_num_threads(threads)
    started = process_time()
    result = measure(runs, root, name, development, embedding)
    np.savez_compressed(file.with_suffix(".npz"), *result.masks)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result.rows))
    part.replace(file)
    print(f"{file.stem}: {len(result.rows)} masks, {process_time() - started:.0f} s of CPU time", flush=True)


def read(file: Path) -> tuple[list[Row], Masks]:
    with np.load(file.with_suffix(".npz")) as masks:
        return json.loads(file.read_text()), [masks[f"arr_{i}"] for i in range(len(masks.files))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--out", type=Path, help="folder of measurements, and of the runs that are trained")
    options.add_argument("--runs", type=Path, help="folder of trained runs, SET_RECIPE_SEED; none is trained")
    options.add_argument("--set", choices=SETS, action="append")
    options.add_argument("--recipes", default="joint,dice_ce")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--processes", type=int, choices=(1, 2), default=1)
    options.add_argument("--embedding", action="store_true")
    options.add_argument("--development", action="store_true")
    given = options.parse_args()
    out, runs = given.out or given.runs, given.runs or given.out
    if out is None:
        options.error("--out or --runs is needed")
    data = os.environ.get("MEDSEG_DATA")
    if not data or not all((Path(data) / folder).is_dir() for folder, *_ in SETS.values()):
        print("Skipped: MEDSEG_DATA must name the folder that holds Task04_Hippocampus and LeftAtrium_1p5mm.")
        return
    root = Path(data)
    out.mkdir(parents=True, exist_ok=True)
    recipes, seeds = given.recipes.split(","), [int(seed) for seed in given.seeds.split(",")]
    ending = f"{'_embedding' if given.embedding else ''}{'_development' if given.development else ''}"
    words = " ".join(word for word in sys.argv[1:] if word not in ("--out", "--runs", str(given.out), str(given.runs)))
    for name in given.set or SETS:
        cells: dict[tuple[str, Any], list[Path]] = {}
        for recipe in recipes:
            for seed in seeds:
                run = runs / f"{name}_{recipe}_{seed}"
                if not given.runs:
                    trained(root, out, name, recipe, seed)
                if (run / "models" / "model.pt").exists():
                    cells[recipe, seed] = [run]
                else:
                    print(f"{run} is not a trained run: left out", file=sys.stderr)
            members = [cells[recipe, seed][0] for seed in seeds if (recipe, seed) in cells][:MOST_MEMBERS]
            if len(members) > 1 and not given.embedding:
                cells[recipe, ENSEMBLE] = members
        files = {cell: out / f"{name}_{cell[0]}_{cell[1]}{ending}.json" for cell in cells}
        for together in (False, True):  # an ensemble's runs have quality models by then
            jobs = [
                (members, files[cell], root, name, given.development, given.embedding)
                for cell, members in cells.items()
                if (cell[1] == ENSEMBLE) is together
            ]
            if given.processes == 1:
                for job in jobs:
                    measured(job, 0)
                continue
            with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
                for future in [pool.submit(measured, job, 1) for job in jobs]:
                    future.result()
        lines = [
            f"Written by `python -m benchmarks.quality --runs DIR {words}`. Mean over the seeds +- half the width of its "
            "95 % interval (each seed); differences are paired over the seeds."
        ]
        results, together_results = {}, {}
        for recipe in recipes:
            mine = {cell: read(file) for cell, file in files.items() if cell[0] == recipe}
            single = [value for (_, seed), value in mine.items() if seed != ENSEMBLE]
            if len(single) > 1:
                add_pairwise(single)
            for cell, (rows, _) in mine.items():
                (together_results if cell[1] == ENSEMBLE else results)[cell] = summary(rows)
        if not results:
            continue
        members = {recipe: sum(r == recipe for r, _ in results) for recipe in recipes}
        lines += table(f"{name}; pairwise Dice: of {max(members.values())} runs", results, recipes)
        if together_results:
            lines += table(f"{name}, through an ensemble of the seeds' runs", together_results, recipes)
        print("\n".join(lines))
        if not given.development:
            (RESULTS / f"quality_{name}{ending}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
