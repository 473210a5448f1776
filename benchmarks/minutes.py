"""The same minutes on the same cores: nnU-Net v2 and `medseg train`, 20 labelled hippocampi, tested on 52 unseen ones.

    MEDSEG_DATA=/data python -m benchmarks.minutes --out DIR --nnunet-python PYTHON [--minutes 20] [--seeds 0,1,2]

MEDSEG_DATA contains `Task04_Hippocampus` with `folds.json`: both tools train on the same 20 scans of folds 2-4 and are
tested on fold 1, as it is and degraded. nnU-Net needs an environment of its own; PYTHON is its interpreter:

    python -m venv nnunet
    nnunet/bin/pip install torch==2.13.0 "torchvision<0.29" nnunetv2==2.8.1

nnU-Net has its own plan, preprocessing, augmentation, optimiser and mirrored prediction. It trains on all 20 scans,
without validation on the way, and its polynomial schedule ends with the minutes. Ours is `medseg train --minutes M` at
its defaults (a part of the 20 scans is for validation), then `medseg predict`. The minutes are those of the training
steps; what else each tool takes is in the second table. Finished stages in DIR are kept, so that an interrupted call
can be repeated. Run nothing else at the same time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from benchmarks._process import ROOT, machine, run
from benchmarks.evidence import RESULTS, TASKS
from medseg_supcon.comparison import CORRUPTIONS, paired_difference
from medseg_supcon.datasets import Case, Dataset, read_dataset, split_cases
from medseg_supcon.evaluation import score_mask
from medseg_supcon.quality import Degraded, degradations
from medseg_supcon.scans import read_nifti

LABELLED = 20
OURS, NNUNET = "ours", "nnunet"
STAGES = ("prepare", "train", "predict")
Change = Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.float32]]
Array = npt.NDArray[np.float64]


def graded(kind: str, strength: float) -> Change:
    """One of the degradations of the quality model, at a fixed strength."""
    change = degradations(1)[kind]

    def degrade(image: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
        label = np.zeros(image.shape[1:], dtype=np.int16)
        return change(Degraded(image, label), strength, np.random.default_rng(seed)).image

    return degrade


CLEAN = "as they are"
CONDITIONS: dict[str, Change] = {
    CLEAN: lambda image, seed: image,
    "noise": CORRUPTIONS["noise"],
    "bias field": CORRUPTIONS["bias field"],
    "ghosting": CORRUPTIONS["ghosting"],
    "half the resolution": CORRUPTIONS["low resolution"],
    "thick slices (4 become 1)": graded("thick_slices", 3 / 7),
    "inverted contrast": graded("invert", 1.0),
    "gamma 2 or 1/2": graded("gamma", 0.5),
}


@dataclass(frozen=True)
class Work:
    """One tool with one seed.

    Attributes:
        tool: `OURS` or `NNUNET`.
        folder: for all that it writes.
        commands: words of the command of each of the `STAGES`.
        variables: environment variables of the commands.
    """

    tool: str
    folder: Path
    commands: dict[str, list[object]]
    variables: dict[str, object]

    @property
    def costs(self) -> dict[str, dict[str, Any]]:
        """Stage -> wall and CPU seconds, and what the command said; of the stages that are done."""
        file = self.folder / "costs.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def do(self, start: Callable[[Path], None], threads: int) -> None:
        """Do the stages that are not done; ``start`` fills the empty folder. Half a training starts again."""
        if "train" not in self.costs:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            start(self.folder)
        for stage in STAGES:
            if stage in self.costs:
                continue
            print(f"{self.folder.name}: {stage}", file=sys.stderr, flush=True)
            cost = run(self.commands[stage], threads, self.folder / f"{stage}.log", self.variables)
            (self.folder / f"{stage}.out").write_text(cost.output)
            done = {"seconds": cost.seconds, "cpu": cost.cpu}
            if self.tool == NNUNET:
                done |= json.loads(cost.output.splitlines()[-1])
            (self.folder / "costs.json").write_text(json.dumps(self.costs | {stage: done}, indent=2))


def ours(out: Path, data: Path, minutes: float, seed: int, settings: Sequence[str]) -> Work:
    folder = out / f"{OURS}_{minutes:g}_{seed}"
    medseg = [sys.executable, "-m", "medseg_supcon.cli"]
    common = [data, "--out", folder / "run", "--device", "cpu"]
    planned = [*common, "--cases", out / "training.txt", "--minutes", minutes, "--seed", seed]
    planned += [word for setting in settings for word in ("--set", setting)]
    commands: dict[str, list[object]] = {
        "prepare": [*medseg, "plan", *planned],
        "train": [*medseg, "train", *common],
        "predict": [*medseg, "predict", folder / "run", out / "scans", "--out", folder / "masks", "--device", "cpu"],
    }
    return Work(OURS, folder, commands, {})


def nnunet(out: Path, python: Path, minutes: float, seed: int, workers: int) -> Work:
    folder = out / f"{NNUNET}_{minutes:g}_{seed}"
    script = [python, ROOT / "benchmarks" / "_nnunet_training.py"]
    commands: dict[str, list[object]] = {
        "prepare": [*script, "prepare"],
        "train": [*script, "train", minutes, seed],
        "predict": [*script, "predict", out / "scans", folder / "masks"],
    }
    names = ("raw", "preprocessed", "results")
    variables: dict[str, object] = {f"nnUNet_{name}": folder / name for name in names}
    return Work(NNUNET, folder, commands, variables | {"nnUNet_n_proc_DA": workers, "nnUNet_compile": "f"})


def write_raw(dataset: Dataset, cases: Sequence[Case], folder: Path) -> None:
    """Write the cases as nnU-Net's raw data set."""
    raw = folder / "raw" / "Dataset001_Benchmark"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for case in cases:
        assert case.label is not None
        shutil.copyfile(case.images[0], raw / "imagesTr" / f"{case.name}_0000.nii.gz")
        shutil.copyfile(case.label, raw / "labelsTr" / f"{case.name}.nii.gz")
    described = {
        "channel_names": dict(enumerate(dataset.channels)),
        "labels": dataset.labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described, indent=2))


def scan_name(condition: str, case: Case) -> str:
    return f"{list(CONDITIONS).index(condition)}_{case.name}"


def write_scans(cases: Sequence[Case], folder: Path) -> None:
    """Write every test scan in every condition to one folder, so that one command predicts them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for condition, change in CONDITIONS.items():
        for case in cases:
            target = folder / f"{scan_name(condition, case)}.nii.gz"
            if target.exists():
                continue
            image = nibabel.load(case.images[0])
            part = target.with_name(f".{target.name}")
            if condition != CLEAN:
                seed = zlib.crc32(f"{condition}/{case.name}".encode())
                data = change(np.asarray(image.dataobj, dtype=np.float32)[None], seed)[0]
                header = nibabel.Nifti1Header.from_header(image.header)
                header.set_data_dtype(np.float32)
                header["scl_slope"], header["scl_inter"] = np.nan, np.nan
                image = nibabel.Nifti1Image(data, image.affine, header)
            nibabel.save(image, part)
            part.replace(target)


def scores(masks: Path, cases: Sequence[Case], labels: Mapping[str, float]) -> dict[str, Array]:
    """Condition -> (K,) Dice of each case, the mean over the classes."""
    found = {}
    for condition in CONDITIONS:
        dice = []
        for case in cases:
            mask = read_nifti(masks / f"{scan_name(condition, case)}.nii.gz")
            assert case.label is not None
            rows = score_mask(case.name, mask.data, mask.affine, case.label, labels, None, 1.0)
            dice.append(np.mean([row["dice"] for row in rows]))
        found[condition] = np.array(dice)
    return found


def dice_table(ours: Sequence[Mapping[str, Array]], theirs: Sequence[Mapping[str, Array]]) -> list[str]:
    """Lines of a Markdown table: mean Dice per condition and of the degraded ones, and the paired difference.

    Args:
        ours, theirs: one entry per seed, in the same order: condition -> (K,) Dice of each scan.
    """
    lines = ["| Dice | ours | nnU-Net | difference in points (95 % interval) |", "|---|---:|---:|---:|"]
    a, b = ({name: np.array([one[name] for one in tool]) for name in ours[0]} for tool in (ours, theirs))
    degraded = [name for name in a if name != CLEAN]
    for tool in (a, b):
        tool["mean of the degraded"] = np.mean([tool[name] for name in degraded], axis=0)
    for name in a:
        found = paired_difference(a[name], b[name])
        points = [f"{100 * value:+.1f}" for value in (found.difference, found.low, found.high)]
        cells = (f"{a[name].mean():.4f}", f"{b[name].mean():.4f}", f"{points[0]} ({points[1]} to {points[2]})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cost_table(costs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Lines of a Markdown table: minutes per stage, means over the seeds."""
    head = [f"{name}, {kind}" for name in ("ours", "nnU-Net") for kind in ("wall", "CPU")]
    lines = [f"| minutes | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    titles = dict(zip(STAGES, ("planning and preprocessing", "training", "prediction"), strict=True))
    for stage, title in titles.items():
        cells = [
            np.mean([one[stage][kind] for one in costs[tool]]) / 60
            for tool in (OURS, NNUNET)
            for kind in ("seconds", "cpu")
        ]
        lines.append(f"| {title} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return lines


def minutes_of_epochs(run_folder: Path) -> float:
    """Wall-clock minutes of the epochs of one of our runs."""
    with (run_folder / "logs" / "history.csv").open() as stream:
        return sum(float(row["seconds"]) for row in csv.DictReader(stream)) / 60


def report(done: Sequence[Work], cases: Sequence[Case], labels: Mapping[str, float], given: argparse.Namespace) -> str:
    """The page, from finished work of both tools."""
    of = {tool: [work for work in done if work.tool == tool] for tool in (OURS, NNUNET)}
    measured = {tool: [scores(work.folder / "masks", cases, labels) for work in works] for tool, works in of.items()}
    costs = {tool: [work.costs for work in works] for tool, works in of.items()}
    plans = [json.loads((work.folder / "run" / "configs" / "plan.json").read_text()) for work in of[OURS]]
    plan, steps = plans[0], round(np.mean([one["epochs"] * one["steps_per_epoch"] for one in plans]))
    their_steps = round(np.mean([cost["train"]["steps"] for cost in costs[NNUNET]]))
    epochs = np.mean([minutes_of_epochs(work.folder / "run") for work in of[OURS]])
    patch = " x ".join(map(str, plan["patch_size"]))
    prepared = costs[NNUNET][0]["prepare"]
    their_patch = " x ".join(map(str, prepared["patch_size"]))
    settings = "".join(f" --set {setting}" for setting in given.set)
    text = [
        f"Written by `python -m benchmarks.minutes --minutes {given.minutes:g} --seeds {given.seeds}{settings}`.",
        "",
        f"{LABELLED} labelled scans of folds 2-4, {len(cases)} scans of fold 1 in {len(CONDITIONS)} conditions, "
        f"{given.minutes:g} min of training, seeds {given.seeds}. {machine(given.cores)}.",
        f"Ours: about {steps} steps of {2 * plan['batch_size']} patches of {patch}. nnU-Net: about {their_steps} steps of "
        f"{prepared['batch_size']} patches of {their_patch}, mirrored prediction, "
        f"nnUNet_n_proc_DA={given.nnunet_workers}, {prepared['versions']}.",
        "",
        *dice_table(measured[OURS], measured[NNUNET]),
        "",
        "Ours minus nnU-Net's, paired by scan and seed; bootstrap over scans and seeds.",
        "",
        *cost_table(costs),
        "",
        f"Means over the seeds, of each command from start to end. The training commands also start and save, which is not "
        f"part of the {given.minutes:g} min; ours also evaluates the run and fits the quality model. Our epochs took "
        f"{epochs:.1f} min, validation included; nnU-Net's steps {given.minutes:g} min. Prediction is of "
        f"{len(cases) * len(CONDITIONS)} scans; ours includes the predicted Dice of each mask.",
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    options.add_argument("--minutes", type=float, default=20, help="minutes of training steps")
    options.add_argument("--seeds", default="0", help="for example 0,1,2")
    options.add_argument("--part", choices=(NNUNET, OURS, "score"), action="append", help="default: all")
    options.add_argument("--nnunet-python", type=Path, help="interpreter of an environment with nnunetv2")
    # one is enough: nnU-Net's augmentation takes 2 % of the processor time of its step
    options.add_argument(
        "--nnunet-workers", type=int, default=1, help="its processes for augmentation (nnUNet_n_proc_DA)"
    )
    options.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE for `medseg plan`; use another --out for each"
    )
    options.add_argument("--cores", type=int, default=2)
    options.add_argument(
        "--scans", type=int, help="only the first N test scans, for a trial (with an --out of its own)"
    )
    options.add_argument("--result", type=Path, help="file to write; default: benchmarks/results/minutes_MINUTES.md")
    given = options.parse_args()
    root = os.environ.get("MEDSEG_DATA")
    if not root or not (Path(root) / TASKS["hippocampus"].folder).is_dir():
        print(f"Skipped: MEDSEG_DATA must name the folder that contains {TASKS['hippocampus'].folder}.")
        return
    parts = given.part or [NNUNET, OURS, "score"]
    if NNUNET in parts and given.nnunet_python is None:
        options.error("nnU-Net needs --nnunet-python")
    if hasattr(os, "sched_setaffinity"):  # also of all commands below
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    data, out = Path(root).resolve() / TASKS["hippocampus"].folder, given.out.resolve()
    dataset = read_dataset(data)
    training_names, test_names = TASKS["hippocampus"].cases(Path(root))
    pool = replace(dataset, cases=tuple(case for case in dataset.cases if case.name in training_names))
    split = split_cases(pool, labels=LABELLED, seed=0)
    training = sorted((*split.training, *split.validation), key=lambda case: case.name)
    test = [case for case in dataset.cases if case.name in test_names][: given.scans]
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.txt").write_text("\n".join(case.name for case in training) + "\n")
    write_scans(test, out / "scans")
    works = []
    for seed in map(int, given.seeds.split(",")):
        python = given.nnunet_python or Path("python")  # not used where nnU-Net's part is done
        theirs = nnunet(out, python.absolute(), given.minutes, seed, given.nnunet_workers)
        mine = ours(out, data, given.minutes, seed, given.set)
        if NNUNET in parts:
            theirs.do(lambda folder: write_raw(dataset, training, folder), given.cores)
        if OURS in parts:
            mine.do(lambda folder: None, given.cores)
        works += [theirs, mine]
    if "score" not in parts:
        return
    if missing := [work.folder.name for work in works if len(work.costs) < len(STAGES)]:
        raise SystemExit(f"Not finished in {out}: {', '.join(missing)}. Run the other parts first.")
    text = report(works, test, dataset.labels, given)
    print(text)
    (given.result or RESULTS / f"minutes_{given.minutes:g}.md").write_text(text)


if __name__ == "__main__":
    main()
