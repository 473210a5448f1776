"""``medseg train --folds`` on a set whose masks are known: scores, post-processing, ensemble, kills, refusals.

A scan is 2 in the organ and in two loose voxels, and 0 elsewhere; the network starts as a threshold at 1 and hardly
changes. So an out-of-fold mask is the organ and the two voxels, and the largest component alone is the label map.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from in_this_process import run_jobs_here

from medseg_supcon.bundle import load_tensors
from medseg_supcon.comparison import jobs, train_folds
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError, DataError, RunError
from medseg_supcon.inference import Predictor
from medseg_supcon.networks import chain
from medseg_supcon.slurm import Cluster, Command
from medseg_supcon.training import Request, prepare_run

SHAPE, CASES, PATIENTS, FOLDS = (16, 18, 14), 8, "abcdefaf", 3
FIRST = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
NETWORK = chain(FIRST, FIRST | {"out_channels": 2})
SETTINGS = [
    "plan::patch_size=[16,16,16]", "plan::steps_per_epoch=2", "plan::batch_size=1", "learning_rate=1e-6",
]  # fmt: skip


def label_of(number: int) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[3 : 7 + number % 3, 4:9, 3:8] = 1
    return label


def scan_of(number: int) -> np.ndarray:
    scan = 2.0 * label_of(number)
    scan[13, 14, 2 + number % 5] = scan[1, 15, 11] = 2
    return scan.astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folds") / "data"
    for folder, make in (("imagesTr", scan_of), ("labelsTr", label_of)):
        (root / folder).mkdir(parents=True)
        for number in range(CASES):
            image = nibabel.Nifti1Image(make(number), np.diag([1.0, 1.5, 2.0, 1.0]))
            nibabel.save(image, root / folder / f"c{number}.nii.gz")
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}}
    (root / "dataset.json").write_text(json.dumps(content))
    (root / "patients.json").write_text(json.dumps({f"c{n}": patient for n, patient in enumerate(PATIENTS)}))
    return root


@pytest.fixture(scope="module")
def threshold(data: Path) -> Path:
    """A run whose network says organ where a scan is above 1."""
    run, dataset = data.parent / "threshold", read_dataset(data)
    settings = [("network_def", NETWORK), ("plan::patch_size", [16, 16, 16]), ("plan::intensity", [])]
    prepare_run(dataset, split_cases(dataset), run, recipe="dice_ce", settings=settings, epochs=1, device="cpu")
    weights = {
        "0.weight": torch.ones(1, 1, 1, 1, 1),
        "0.bias": torch.zeros(1),
        "1.weight": torch.tensor([0.0, 20.0]).reshape(2, 1, 1, 1, 1),
        "1.bias": torch.tensor([0.0, -20.0]),
    }
    (run / "models").mkdir(exist_ok=True)
    torch.save(weights, run / "models" / "model.pt")
    return run


def train(data: Path, threshold: Path, out: Path, number: int | None = FOLDS, **options: Any) -> list[str]:
    """What it says; with options of `train_folds` or of `Request`."""
    said: list[str] = []
    mine = {key: options.pop(key) for key in ("resume", "workers", "cluster") if key in options}
    given: dict[str, Any] = {"recipe": "dice_ce", "epochs": 2, "settings": SETTINGS, "init": threshold, **options}
    train_folds(data, out, number, Request(**given), device="cpu", say=said.append, **mine)
    return said


@pytest.fixture(scope="module")
def folds(data: Path, threshold: Path) -> Path:
    """Trained without interruption. Do not change it."""
    out = data.parent / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "run_jobs", run_jobs_here)
        train(data, threshold, out)
    return out


def masks_in(folder: Path) -> dict[str, np.ndarray]:
    files = sorted((folder / "predictions").glob("*.nii.gz"))
    return {file.name.split(".")[0]: np.asarray(nibabel.load(file).dataobj) for file in files}


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def test_pooled_scores_are_those_of_the_masks(folds: Path) -> None:
    for part in ("eval/before", "eval"):
        masks, rows = masks_in(folds / part), rows_of(folds / part / "metrics.csv")
        assert len(masks) == len(rows) == CASES
        dice = {}
        for number in range(CASES):
            mask, label = masks[f"c{number}"] > 0, label_of(number) > 0
            dice[f"c{number}"] = 2 * (mask & label).sum() / (mask.sum() + label.sum())
            row = rows[f"c{number}"]
            assert float(row["dice"]) == pytest.approx(dice[f"c{number}"], abs=1e-12)
            assert float(row["volume_ml"]) == pytest.approx(mask.sum() * 0.003)
        summary = json.loads((folds / part / "metrics.json").read_text())["summary"]
        assert summary["mean"]["dice"] == pytest.approx(np.mean(list(dice.values())))


def test_each_case_is_scored_by_the_fold_that_did_not_see_it(folds: Path) -> None:
    rows, seen = rows_of(folds / "eval" / "metrics.csv"), []
    for index in range(FOLDS):
        lists = json.loads((folds / f"fold_{index}" / "configs" / "datalist.json").read_text())
        trained, held_out = ({item["name"] for item in lists[key]} for key in ("training", "validation"))
        assert held_out == {case for case, row in rows.items() if row["fold"] == str(index)}
        assert trained | held_out == set(rows) and not trained & held_out
        patients = [{PATIENTS[int(name[1:])] for name in part} for part in (trained, held_out)]
        assert not patients[0] & patients[1]
        seen += held_out
    assert sorted(seen) == sorted(rows)


def test_the_largest_component_is_chosen_and_used_everywhere(folds: Path) -> None:
    before, after = masks_in(folds / "eval" / "before"), masks_in(folds / "eval")
    for number in range(CASES):
        np.testing.assert_array_equal(before[f"c{number}"], scan_of(number) > 1)
        np.testing.assert_array_equal(after[f"c{number}"], label_of(number))
    for index in range(FOLDS):
        run = folds / f"fold_{index}"
        assert json.loads((run / "configs" / "plan.json").read_text())["keep_largest"] == ["organ"]
        assert "largest connected component" in (run / "docs" / "README.md").read_text()
        for name, mask in masks_in(run / "eval").items():
            np.testing.assert_array_equal(mask, after[name])
    report = json.loads((folds / "eval" / "metrics.json").read_text())
    assert report["summary"]["mean"]["dice"] == 1 > report["before"]["mean"]["dice"]
    assert [row["adopted"] for row in report["postprocessing"]] == [True]
    text = (folds / "eval" / "report.md").read_text()
    assert "only the largest component is kept" in text and report["notes"][0].split(":")[0] in text
    assert (folds / "eval" / "review.html").stat().st_size > 10_000


def test_the_folder_is_an_ensemble(folds: Path, data: Path, tmp_path: Path, medseg: Callable[..., Any]) -> None:
    scan = data / "imagesTr" / "c1.nii.gz"
    single = [
        Predictor(folds / f"fold_{i}", device="cpu").predict(scan, probabilities=True).probabilities
        for i in range(FOLDS)
    ]
    together = Predictor(folds, device="cpu").predict(scan, probabilities=True)
    mean = np.mean([np.asarray(one, dtype=np.float64) for one in single], axis=0)
    assert len(Predictor(folds, device="cpu").models) == FOLDS
    np.testing.assert_allclose(together.probabilities, mean, atol=1e-6)
    assert (mean.argmax(0) == (scan_of(1) > 1)).all() and (together.mask == label_of(1)).all()
    for runs, models in ((folds, FOLDS), (folds / "fold_0", 1)):
        out = tmp_path / runs.name
        assert medseg("predict", runs, scan, "--out", out, "--device", "cpu")[0] == 0
        assert len(json.loads((out / "manifest.json").read_text())["models"]) == models
        np.testing.assert_array_equal(np.asarray(nibabel.load(out / "c1.nii.gz").dataobj), label_of(1))


def test_planning_and_folds_are_jobs_of_a_cluster(
    folds: Path, data: Path, threshold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended cluster, which gets each task through pickle; tests/test_slurm.py has a real one."""
    called: list[str] = []

    def cluster(tasks: Any, cluster: Any, folder: Path, done: Callable[[str, str], None], *_: Any) -> None:
        assert folder == tmp_path / "out" / "slurm"
        for name, task in pickle.loads(pickle.dumps(tasks)).items():
            called.append(name)
            if isinstance(task, Command):
                assert task.log == (tmp_path / "out" / "jobs" / f"{name}.log").resolve()
                job = next(Path(part) for part in task.arguments if part.endswith(".json"))
                jobs.run_cell(json.loads(job.read_text()), "cpu", quiet=True)
            else:
                assert task() == ""
            done(name, "")

    monkeypatch.setattr(jobs, "run_on_cluster", cluster)
    said = train(data, threshold, tmp_path / "out", cluster=Cluster(5))
    assert called[:4] == ["plan", "fold_0", "fold_1", "fold_2"] and "3 runs to do as jobs." in said
    for file in ("eval/metrics.csv", "fold_1/configs/plan.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folds / file).read_bytes(), file
    ours, theirs = masks_in(tmp_path / "out"), masks_in(folds)
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_second_training_is_refused_and_a_finished_one_is_left(
    folds: Path, data: Path, threshold: Path, medseg: Callable[..., Any]
) -> None:
    files = {file: file.stat().st_mtime_ns for file in folds.rglob("*") if file.is_file()}
    for options in (("--folds", 3), ()):
        code, _, err = medseg("train", data, "--out", folds, *options)
        assert code == 2 and "already contains folds" in err
        code, out, err = medseg("train", data, "--out", folds, *options, "--resume")
        assert code == 0 and "is finished" in err and "organ" in out
    with pytest.raises(RunError, match="has 3 folds, not 4"):
        train(data, threshold, folds, 4, resume=True)
    assert medseg("train", data, "--out", folds / "fold_1", "--resume")[0] == 0
    assert medseg("train", data, "--out", threshold, "--folds", 2)[0] == 2
    assert "--workers is for --folds" in medseg("train", data, "--out", folds / "new", "--workers", 2)[2]
    assert {file: file.stat().st_mtime_ns for file in folds.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize(
    ("number", "options", "error", "sentence"),
    [
        (7, {}, DataError, "7 folds were asked for, but there are 6 labelled patients"),
        (3, {"validation": 0.2}, ConfigError, "--validation and --folds contradict"),
        (3, {"settings": ["plan::patch_sise=[8,8,8]"]}, ConfigError, "patch_size"),
    ],
)
def test_what_cannot_be_planned_leaves_nothing(
    data: Path, threshold: Path, tmp_path: Path, number: int, options: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        train(data, threshold, tmp_path / "runs", number, **options)
    assert list((tmp_path / "runs").iterdir()) == []


def content(folder: Path) -> dict[str, Any]:
    """What must be the same however often a training was killed."""
    kept = ("folds.json", "plan.json", "datalist.json", "metrics.csv", "metrics.json", "report.md", "review.html")
    files = [f for f in folder.rglob("*") if f.name in kept or f.parent.name == "predictions"]
    found: dict[str, Any] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for run in folder.glob("fold_*"):
        found[run.name] = {k: v.tolist() for k, v in load_tensors(run / "models" / "model.pt").items()}
    return found


def killed_at(data: Path, threshold: Path, out: Path, moment: int | None, ticks: Any, again: bool) -> None:
    """Train in this process, up to a moment (a file that is moved or copied) at which it is killed."""
    torch.set_num_threads(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            ticks.value += 1
            if ticks.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.replace, os.rename, shutil.copyfile = map(counted, (os.replace, os.rename, shutil.copyfile))
    jobs.run_jobs = run_jobs_here
    train(data, threshold, out, resume=again)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
def test_killed_again_and_again(folds: Path, data: Path, threshold: Path, tmp_path: Path) -> None:
    """At five moments from planning to the pooled scores; the end is that of an uninterrupted training."""
    rng = random.Random(7)
    context, out = multiprocessing.get_context("fork"), tmp_path / folds.name
    codes = []
    for attempt in range(6):
        ticks = context.Value("i", 0)
        moment = (12, *rng.sample(range(40, 140), 4), None)[attempt]
        process = context.Process(target=killed_at, args=(data, threshold, out, moment, ticks, attempt > 0))
        process.start()
        process.join(300)
        codes.append(process.exitcode)
    assert codes[-1] == 0 and codes.count(-signal.SIGKILL) >= 3
    assert content(out) == content(folds)
    assert not list(out.rglob("*.tmp")) and not (out / ".planning").exists()
