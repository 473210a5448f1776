"""Two gloo processes against one process with the same global batch.

torchrun starts one training as docs/workstation.md says; the other jobs are those of two forked processes.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from forked_ranks import start_ranks
from monai.bundle import ConfigWorkflow
from tiny_run import training_of

from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.training import prepare_run

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")

TIMEOUT = 600  # seconds; a machine that does much else is slow to start processes


def torchrun(*command: str, cwd: Path) -> str:
    """What two processes say, from a folder elsewhere."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc_per_node", "2", *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, too
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said[-4000:]
    return said


def history(run: Path) -> list[dict[str, float]]:
    with (run / "logs" / "history.csv").open(newline="") as stream:
        rows = csv.DictReader(stream)
        return [{k: float(v or "nan") for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_curve(one: Path, two: Path, rel: float = 1e-4) -> None:
    assert len(history(one)) == len(history(two)) > 0
    for expected, found in zip(history(one), history(two), strict=True):
        # a Dice counts voxels, and the last digit of a logit may decide about one
        tolerance = {key: 2e-3 if key.startswith("val_") else 1e-9 for key in expected}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=rel, abs=tolerance[key], nan_ok=True), (key, found)


def copy(run: Path, to: Path) -> Path:
    """The planned run, without what training left."""
    shutil.copytree(run, to)
    for made in ("models", "logs", "eval"):
        shutil.rmtree(to / made)
    return to


@pytest.fixture(scope="module")
def by_two(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``trained_run`` trained again by two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    run = copy(trained_run, folder / "run")
    assert json.loads((run / "configs" / "plan.json").read_text())["batch_size"] == 2
    files = "['train.yaml','multi_gpu_train.yaml']"
    return run, torchrun("-m", "monai.bundle", "run", "--config_file", files, cwd=run / "configs")


def test_the_loss_curve_is_that_of_one_process(trained_run: Path, by_two: tuple[Path, str]) -> None:
    # contrast included: its voxels are drawn over the scans of both; one validation case, so one rank has a filler
    assert_same_curve(trained_run, by_two[0])


def test_rank_0_alone_writes_and_tells(by_two: tuple[Path, str]) -> None:
    run, said = by_two
    assert said.count("epoch 2/2") == 1
    assert len(list((run / "logs").glob("events.out.tfevents.*"))) == 1


def test_scores_and_documents_follow_the_training(trained_run: Path, by_two: tuple[Path, str]) -> None:
    run, _ = by_two
    one, two = (json.loads((r / "eval" / "metrics.json").read_text())["summary"] for r in (trained_run, run))
    assert two["cases"] == one["cases"] == 1
    assert two["mean"]["dice"] == pytest.approx(one["mean"]["dice"], abs=2e-3)
    metadata = json.loads((run / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["mean_dice"] == pytest.approx(two["mean"]["dice"], abs=5e-5)
    assert "2 epochs, 6 steps" in (run / "docs" / "README.md").read_text()
    assert (run / "docs" / "curves.png").stat().st_size > 0


def test_one_process_resumes_what_two_began(trained_run: Path, by_two: tuple[Path, str], tmp_path: Path) -> None:
    ends = []
    for name, run in (("one", trained_run), ("two", by_two[0])):
        ends.append(Path(shutil.copytree(run, tmp_path / name)))
        training_of(ends[-1], resume=True, epochs=3).trainer.run()
    assert [row["epoch"] for row in history(ends[1])] == [1, 2, 3]
    assert_same_curve(*ends, rel=1e-3)


@pytest.fixture(scope="module")
def jobs(trained_run: Path, by_two: tuple[Path, str], phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``one`` and ``two`` with what one process and two make of evaluation, inference and two recipes.

    The two also resume a finished run without scores and documents, ``finished``.
    """
    folder = tmp_path_factory.mktemp("jobs")
    dataset, plan = read_dataset(phantoms), json.loads((trained_run / "configs" / "plan.json").read_text())
    short = {**plan, "epochs": 3, "steps_per_epoch": 2}
    settings = [("contrast_samples", 256), ("positives", "same_voxel"), ("val_interval", 3), ("weight_average", 0.5)]
    first = folder / "one" / "two_stage"
    prepare_run(dataset, split_cases(dataset), first, recipe="two_stage", settings=settings, device="cpu", plan=short)
    shutil.copytree(first, folder / "two" / "two_stage")
    # batch_size 4: a labelled and an unlabelled scan on each process
    semi = [("contrast_samples", 256), ("val_interval", 3), ("unlabelled_from", 0.34)]
    budget, four = split_cases(dataset, labels=4), {**short, "batch_size": 4}
    run = folder / "one" / "semi"
    prepare_run(dataset, budget, run, recipe="semi", settings=semi, device="cpu", plan=four)
    shutil.copytree(run, folder / "two" / "semi")
    (folder / "scans").mkdir()
    scans = sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:3]
    for scan in scans:
        shutil.copy(scan, folder / "scans")
    cases = [{"name": s.name[:-7], "image": f"imagesTr/{s.name}", "label": f"labelsTr/{s.name}"} for s in scans]
    (folder / "cases.json").write_text(json.dumps(cases))
    finished = Path(shutil.copytree(by_two[0], folder / "finished"))
    shutil.rmtree(finished / "eval")
    shutil.rmtree(finished / "docs")
    do_jobs(trained_run, folder, "one")

    def work() -> None:
        do_jobs(trained_run, folder, "two")
        resumed = training_of(finished, overlays=("multi_gpu_train",), resume=True)
        resumed.run()
        torch.distributed.destroy_process_group()

    ranks = start_ranks(work, folder)
    for rank in ranks:
        rank.join(TIMEOUT)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0], [p.read_text()[-2000:] for p in folder.glob("rank*.log")]
    return folder


def do_jobs(run: Path, folder: Path, side: str) -> None:
    cases, out = json.loads((folder / "cases.json").read_text()), folder / side
    for name, options in (
        ("evaluate", {"datalist": cases, "output_dir": str(out / "evaluation")}),
        ("inference", {"dataset_dir": str(folder / "scans"), "output_dir": str(out / "masks")}),
    ):
        configure(run, name, "multi_gpu_evaluate", side, workflow_type="infer", **options)
    for recipe in ("two_stage", "semi"):
        configure(out / recipe, "train", "multi_gpu_train", side, workflow_type="train", quiet=True)


def configure(run: Path, name: str, overlay: str, side: str, **options: object) -> None:
    """Run a config, of a training only its trainer, and not its `finalize`: the processes go on."""
    files = [name, overlay] if side == "two" else [name]
    workflow = ConfigWorkflow(
        [str(run / "configs" / f"{file}.yaml") for file in files],
        logging_file=False,
        bundle_root=str(run),
        device="$torch.device('cpu')",
        **options,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    if name == "train":
        workflow.trainer.run()
    else:
        workflow.run()


def test_evaluation_by_two_counts_every_case_once(jobs: Path) -> None:
    tables = []
    for side in ("one", "two"):
        with (jobs / side / "evaluation" / "metrics.csv").open(newline="") as stream:
            tables.append(list(csv.DictReader(stream)))
    assert len({row["case"] for row in tables[0]}) == 3
    assert tables[0] == tables[1]
    reports = [json.loads((jobs / side / "evaluation" / "metrics.json").read_text()) for side in ("one", "two")]
    assert reports[0] == reports[1]


def test_inference_by_two_writes_the_same_masks(jobs: Path) -> None:
    names = sorted(p.name for p in (jobs / "scans").iterdir())
    assert sorted(p.name for p in (jobs / "two" / "masks").iterdir()) == names
    for name in names:
        one, two = (nibabel.load(jobs / side / "masks" / name) for side in ("one", "two"))
        assert np.array_equal(one.affine, two.affine)
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))


def test_stages_with_frozen_parameters(jobs: Path) -> None:
    # contrast of voxel pairs, cross-entropy alone, Dice + cross-entropy: an epoch each
    assert_same_curve(jobs / "one" / "two_stage", jobs / "two" / "two_stage")


def test_labelled_and_unlabelled_scans(jobs: Path) -> None:
    # labelled scans alone in the first epoch: as one process. Then other scans meet, but all of it goes on
    one, two = (history(jobs / side / "semi") for side in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [2, 4, 6]
    for key in ("loss", "segmentation", "contrastive"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4)
    assert all(math.isfinite(row["loss"]) for row in two)
    saved = torch.load(jobs / "two" / "semi" / "models" / "checkpoint.pt", weights_only=True)
    shipped = torch.load(jobs / "two" / "semi" / "models" / "model.pt", weights_only=True)
    teacher = {k.removeprefix("module."): v for k, v in saved["state"]["average"].items()}
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in shipped.items())


def test_a_finished_run_is_resumed(jobs: Path, by_two: tuple[Path, str]) -> None:
    """Nothing is left to train, so only the documents are written."""
    run = jobs / "finished"
    assert (run / "models" / "model.pt").read_bytes() == (by_two[0] / "models" / "model.pt").read_bytes()
    assert len(history(run)) == 2
    for name in ("eval/metrics.json", "docs/README.md", "docs/curves.png"):
        assert (run / name).stat().st_size > 0
