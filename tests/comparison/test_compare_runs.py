"""A small comparison on phantoms: equal budgets, resuming, and scores that can be recomputed from its tables."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from time import sleep

import psutil
import pytest
import torch
from in_this_process import run_jobs_here
from tiny_run import TINY

from medseg_supcon.cli import commands as cli
from medseg_supcon.comparison import compare, design_comparison, devices, read_comparison, run_jobs
from medseg_supcon.comparison import corruptions as _corruptions
from medseg_supcon.comparison import jobs as _jobs
from medseg_supcon.comparison import runs as _runs
from medseg_supcon.datasets import read_dataset
from medseg_supcon.errors import MedsegError, RunError
from medseg_supcon.files import folder_lock
from medseg_supcon.slurm import read_cluster
from medseg_supcon.training import checkpoint as _checkpoint
from medseg_supcon.training import is_finished

FIRST, SECOND = "dice_ce_labels2_seed0", "joint_labels2_seed0"
NOISE_ONLY = {"noise": _corruptions.CORRUPTIONS["noise"]}


def quiet(_):
    """Print nothing."""


def asked(*recipes, **more):
    options = {"seeds": [0], "labels": [2], "epochs": 2, "settings": dict(TINY)} | more
    return read_comparison(recipes=list(recipes), **options)


def changed(design, **more):
    return replace(design, config=design.config.model_copy(update=more))


def again(design, out, run_jobs=run_jobs_here, **more):
    """The comparison of these tests."""
    options = {"device": "cpu", "say": quiet} | more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runs, "CORRUPTIONS", NOISE_ONLY)
        patch.setattr(_jobs, "run_jobs", run_jobs)
        return compare(design, out, **options)


def arguments(dataset, out):
    """The same by the command line."""
    values = {"network_def": TINY[0][1], "plan::patch_size": "[16, 16, 16]", "plan::steps_per_epoch": "3"}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    given = ["compare", dataset, "--out", out, "--recipes", "dice_ce,joint", "--seeds", "0", "--labels", "2"]
    more = ["--epochs", "2", "--device", "cpu", *sets, "--set", "contrast_samples=256"]
    return [*map(str, given), *more]


@pytest.fixture(scope="module")
def design(phantoms):
    return design_comparison(read_dataset(phantoms), asked("dice_ce", "joint"))


@pytest.fixture(scope="module")
def compared(design, tmp_path_factory):
    """(folder, what compare returned). Do not change the folder."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, again(design, out)


@pytest.fixture
def copied(compared, tmp_path):
    return shutil.copytree(compared[0], tmp_path / "copy", copy_function=shutil.copy2)


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_run_has_the_same_budget(compared):
    out, found = compared
    plans = {(out / "runs" / name / "configs" / "plan.json").read_text() for name in (FIRST, SECOND)}
    lists = {(out / "runs" / name / "configs" / "datalist.json").read_text() for name in (FIRST, SECOND)}
    assert len(plans) == len(lists) == 1
    assert [row["steps"] for row in table(out / "runs.csv")] == ["6", "6"]
    used = json.loads(lists.pop())
    seen = {item["name"] for part in used.values() for item in part}
    assert not seen & set(found["about"]["test"])


def test_the_tables_follow_from_the_results(compared):
    out, found = compared
    rows = table(out / "results.csv")
    assert {row["case"] for row in rows} == set(found["about"]["test"])
    cases = sorted({row["case"] for row in rows})

    def mean(recipe, case):
        dice = [row["dice"] for row in rows if (row["recipe"], row["case"]) == (recipe, case)]
        return math.fsum(map(float, dice)) / len(dice)

    assert all(row["dice"] for row in rows)  # phantoms have every class: nothing is left out
    d = [mean("joint", case) - mean("dice_ce", case) for case in cases]
    row = next(r for r in table(out / "differences.csv") if r["class"] == "mean")
    assert float(row["difference"]) == pytest.approx(math.fsum(d) / len(d), abs=1e-12)
    assert row["p"] == "", "one seed: a p over scans says nothing about another training"
    assert min(d) - 1e-12 <= float(row["low"]) <= float(row["high"]) <= max(d) + 1e-12


def test_test_scores_are_those_of_medseg_evaluate(compared, medseg, phantoms, tmp_path):
    out, found = compared
    (tmp_path / "cases.txt").write_text("\n".join(found["about"]["test"]))
    options = ("--cases", tmp_path / "cases.txt", "--out", tmp_path / "again", "--device", "cpu")
    code, _, error = medseg("evaluate", out / "runs" / SECOND, phantoms, *options)
    assert code == 0, error
    again, here = table(tmp_path / "again" / "metrics.csv"), table(out / "results.csv")

    def scores(rows):
        return {(row["case"], row["class"]): (row["dice"], row["hd95_mm"]) for row in rows}

    assert scores(again) == scores(row for row in here if row["recipe"] == "joint")


def test_the_report_stands_alone(compared):
    out, found = compared
    html = (out / "report.html").read_text()
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', html))
    assert len(re.findall("<img", html)) >= 5
    assert not re.search(r'(href|src)="https?:', html)
    for word in ("dice_ce", "joint", "95 %", "GiB", "noise", *found["about"]["test"]):
        assert word in html, word
    text = (out / "summary.md").read_text()
    assert found["answers"][0] in text and "| 2 | joint | mean |" in text
    for name in ("label_efficiency", "differences", "learning", "robustness"):
        assert (out / "pictures" / f"{name}.png").stat().st_size > 5000


def test_robustness_is_measured_on_degraded_scans(compared):
    out, found = compared
    assert {row["condition"] for row in found["robustness"]} == {"clean", "noise"}
    clean = [row["dice"] for row in table(out / "results.csv")]
    noisy = [row["dice"] for row in table(out / "robustness.csv")]
    assert len(clean) == len(noisy) and clean != noisy


def test_what_is_finished_is_kept(compared, design, copied):
    model = copied / "runs" / SECOND / "models" / "model.pt"
    metrics = copied / "tests" / SECOND / "clean" / "metrics.json"
    before = model.stat().st_mtime_ns, metrics.stat().st_mtime_ns
    found = again(design, copied)
    assert (model.stat().st_mtime_ns, metrics.stat().st_mtime_ns) == before
    assert found["differences"] == compared[1]["differences"]


def test_an_interrupted_run_goes_on(compared, design, copied, monkeypatch):
    for folder in ("runs", "tests"):
        shutil.rmtree(copied / folder / SECOND)
    save = _checkpoint.Checkpoint.save

    def stop(self, engine):
        if engine.state.epoch == 2:
            raise KeyboardInterrupt
        save(self, engine)

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint.Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            again(design, copied)
    assert (copied / "runs" / SECOND / "models" / "checkpoint.pt").exists()
    found = again(design, copied)
    assert found["differences"] == compared[1]["differences"]


def test_a_recipe_against_itself(phantoms, copied):
    design = design_comparison(read_dataset(phantoms), asked("joint", "joint"))
    found = again(design, copied)
    for row in found["differences"]:
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, None)
    assert "give the same" in found["answers"][0]


def test_other_settings_are_refused(design, copied):
    with pytest.raises(RunError, match="other settings"):
        again(changed(design, settings=dict(TINY) | {"learning_rate": 0.1}), copied)
    with pytest.raises(RunError, match="2 epochs, not 3"):
        again(changed(design, epochs=3), copied)


def test_other_cases_are_refused_with_the_options_that_choose_them(design, copied):
    splits = {labels: replace(split, validation=split.training) for labels, split in design.splits.items()}
    with pytest.raises(RunError, match=r"other validation cases.*--validation"):
        again(replace(design, splits=splits), copied)


def test_another_share_of_validation_is_refused(phantoms, copied):
    other = design_comparison(read_dataset(phantoms), asked("dice_ce", "joint", validation=0))
    with pytest.raises(RunError, match=r"prepared with other .*cases.*--validation.*or choose another --out"):
        again(other, copied)


def test_a_plan_of_other_settings_is_not_taken(design, copied):
    shutil.rmtree(copied / "runs")  # a comparison that was stopped once it was planned
    other = dict(TINY) | {"plan::patch_size": [24, 24, 24]}
    with pytest.raises(RunError, match=r"labels2\.json was prepared with other settings"):
        again(changed(design, settings=other), copied)
    with pytest.raises(RunError, match="other --allow-affine-mismatch"):
        again(design, copied, trust_scan_affine=True)
    assert not (copied / "runs").exists()


def test_a_strange_folder_is_refused(design, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(RunError, match="contains no comparison"):
        again(design, tmp_path)


def test_one_comparison_at_a_time(design, tmp_path):
    (tmp_path / "comparison.json").write_text("{}\n")
    with folder_lock(tmp_path), pytest.raises(RunError, match="Another medseg compare is working"):
        again(design, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.json"]


def test_the_command_line_goes_on_too(copied, phantoms, monkeypatch, capsys):
    monkeypatch.setattr(_runs, "CORRUPTIONS", NOISE_ONLY)
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    monkeypatch.setattr(sys, "argv", ["medseg", *arguments(phantoms, copied)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    assert "2 of 2 runs are finished already" in shown.err
    assert "With 2 labelled scans" in shown.out and "report.html" in shown.out


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    """By processes that say what `_jobs.main` says; those of the next tests are real."""
    script = 'case "$5" in */a.json) echo "medseg: $5: no plan" >&2; exit 2;; esac'
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = {}
    run_jobs(
        [tmp_path / "a.json", tmp_path / "b.json"],
        ["cpu", "cpu"],
        lambda job, text: found.update({job.stem: text}),
    )
    assert f"{tmp_path / 'a.json'}: no plan" in found.pop("a")
    assert found == {"b": ""}


def test_a_run_that_cannot_be_done_is_a_sentence(tmp_path, monkeypatch, capsys):
    for name in ("logging.disable", "logging.captureWarnings", "medseg_supcon.comparison.jobs._end_with"):
        monkeypatch.setattr(name, lambda _: None)
    job = {"run": str(tmp_path / "a"), "tests": str(tmp_path / "t"), "dataset_dir": "", "conditions": {}}
    (tmp_path / "a.json").write_text(json.dumps(job))
    assert _jobs.main(str(tmp_path / "a.json"), "cpu", "2", "0") == 2
    said = capsys.readouterr().err
    assert said.startswith("medseg: ") and str(tmp_path) in said and "plan" in said


def test_a_run_that_is_killed_says_so(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for where in (["cpu"], ["cpu", "cpu"]):
        said = _jobs.run_process(tmp_path / "job.json", "cpu", where, set())
        assert "stopped by SIGKILL" in said and "memory" in said


def command(words, log):
    """`medseg` in a session of its own, forked from this process; the runs' processes start afresh."""
    os.setsid()
    sys.argv = words
    with log.open("w", buffering=1) as sys.stderr:
        cli.main()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
def test_killed_side_by_side_and_resumed(compared, phantoms, design, copied):
    """SIGKILL of two runs in the middle leaves what a whole comparison is made of, to the last bit."""
    for folder in ("runs", "tests"):
        shutil.rmtree(copied / folder)
    words = ["medseg", *arguments(phantoms, copied), "--workers", "2", "--no-robustness"]
    checkpoints = [copied / "runs" / cell / "models" / "checkpoint.pt" for cell in (FIRST, SECOND)]
    log = copied.parent / "log"
    process = multiprocessing.get_context("fork").Process(target=command, args=(words, log))
    process.start()
    while process.is_alive() and not any(path.exists() for path in checkpoints):
        sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert "2 runs to do on cpu, 2 at the same time." in log.read_text()
    assert any(path.exists() for path in checkpoints), log.read_text()
    assert not all(is_finished(copied / "runs" / cell) for cell in (FIRST, SECOND))
    found = again(design, copied)
    for key in ("means", "differences", "robustness"):
        assert found[key] == compared[1][key]
    for name in ("results.csv", "robustness.csv", "summary.csv", "differences.csv"):
        assert (copied / name).read_bytes() == (compared[0] / name).read_bytes()
    for cell in (FIRST, SECOND):
        one, other = (torch.load(out / "runs" / cell / "models/model.pt") for out in (copied, compared[0]))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_job_of_a_cluster_is_killed_and_the_comparison_goes_on(compared, design, copied, monkeypatch):
    """Through submitit's local executor: the killed run is named, the other is done, and the next call completes it."""
    for folder in ("runs", "tests"):
        shutil.rmtree(copied / folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as these tests

    def kill_the_second(text):
        if found := re.match(f"{SECOND}: submitted as process (\\d+)", text):
            run = next(process for process in _running(int(found[1])) if "comparison" in " ".join(process.cmdline()))
            while run.is_running() and not (copied / "runs" / SECOND / "models" / "checkpoint.pt").exists():
                sleep(0.01)
            run.kill()  # as Linux does when memory runs out

    options = {"cluster": read_cluster("executor=local,time=01:00:00"), "workers": 2}
    with pytest.raises(RunError, match=f"1 of 2 runs failed; {SECOND}: it was stopped by SIGKILL"):
        again(design, copied, say=kill_the_second, **options)
    assert is_finished(copied / "runs" / FIRST) and not is_finished(copied / "runs" / SECOND)
    said = []
    found = again(design, copied, say=said.append)
    assert "1 of 2 runs are finished already." in said
    for key in ("means", "differences", "robustness"):
        assert found[key] == compared[1][key]
    for cell in (FIRST, SECOND):
        one, other = (torch.load(out / "runs" / cell / "models/model.pt") for out in (copied, compared[0]))
        assert all(torch.equal(one[key], other[key]) for key in other)


def _running(number):
    """The processes of a job, as they start."""
    while True:
        yield from psutil.Process(number).children(recursive=True)
        sleep(0.01)


def test_a_run_ends_with_the_comparison_that_started_it(monkeypatch):
    parents, ended = iter([7, 7, 1]), []
    monkeypatch.setattr(_jobs.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(_jobs, "sleep", lambda _: None)
    monkeypatch.setattr(_jobs.os, "_exit", ended.append)
    _jobs._end_with(7)
    assert ended == [130] and next(parents, None) is None


def test_workers_share_threads_and_memory(monkeypatch, trained_run):
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    here, name = _jobs.process_environment("cpu", ["cpu"] * 3)
    assert (here["OMP_NUM_THREADS"], name) == ("2", "cpu")
    alone, _ = _jobs.process_environment("cpu", ["cpu"])
    assert alone.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
    together, _ = _jobs.process_environment("cuda", ["cuda", "cuda"])
    assert together.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
    gpu, name = _jobs.process_environment("cuda:1", ["cuda:0", "cuda:1"])
    assert (gpu["CUDA_VISIBLE_DEVICES"], name) == ("6", "cuda")
    assert _jobs._memory_share(trained_run, 1) == {}
    assert eval(_jobs._memory_share(trained_run, 4)["memory_share"].removeprefix("$")) == pytest.approx(0.1)


def test_unlabelled_scans_are_looked_at_too(medseg, phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    files = sorted((data / "imagesTr").glob("*.nii.gz"))
    test, *others = [file.name.removesuffix(".nii.gz") for file in files]
    (tmp_path / "test.txt").write_text(test)
    options = ("--recipes", "dice_ce,semi", "--labels", 2, "--test-cases", tmp_path / "test.txt")
    split = design_comparison(read_dataset(data), asked("dice_ce", "semi"), test_cases=[test]).splits[2]
    broken = split.unlabelled[0].name
    assert broken in others
    (data / "imagesTr" / f"{broken}.nii.gz").write_bytes(b"no scan")
    code, _, error = medseg("compare", data, "--out", tmp_path / "out", *options)
    assert code == 2 and broken in error and "medseg check" in error
    assert not (tmp_path / "out").exists()


def test_devices(monkeypatch):
    assert devices("cpu") == ["cpu"]
    assert devices("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices(None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices(None, 2) == ["cuda:0", "cuda:1"]
    assert devices(None, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices(None) == ["cpu"]


def test_a_failure_is_a_sentence(design, copied):
    shutil.rmtree(copied / "tests" / SECOND)

    def failing(jobs, where, done):
        for job in jobs:
            done(job, "no memory")

    with pytest.raises(RunError, match=f"1 of 2 runs failed; {SECOND}: no memory"):
        again(design, copied, failing)


JSON_DAMAGE = (b"", b"{", b"[]", b'{"rows": NaN}', b"\xff\xfe", b"[" * 100_000)


def damage(path, content):
    path.write_bytes(content)
    later = path.stat().st_mtime + 5  # newer than the model, as written by this run
    os.utime(path, (later, later))


@pytest.mark.parametrize("content", JSON_DAMAGE, ids=range(len(JSON_DAMAGE)))
@pytest.mark.parametrize(
    "name",
    ["plans/labels2.json", "jobs/plans/labels2.json", f"jobs/{SECOND}.json"],
    ids=["plan", "its job", "job"],
)
def test_a_damaged_record_is_a_sentence(design, compared, copied, name, content):
    damage(copied / name, content)
    with pytest.raises(MedsegError, match=re.escape(str(copied / name))):
        again(design, copied)


@pytest.mark.parametrize("content", [*JSON_DAMAGE, None], ids=range(len(JSON_DAMAGE) + 1))
def test_damaged_scores_and_costs_do_not_stop_a_comparison(design, compared, copied, content):
    """Scores are computed again; a cost that is lost is not shown."""
    metrics = copied / "tests" / SECOND / "clean" / "metrics.json"
    if content is None:  # whole JSON, one class missing
        report = json.loads(metrics.read_text())
        report["rows"].pop()
        content = json.dumps(report).encode()
    for path in (metrics, copied / "tests" / SECOND / "cost.json", copied / "comparison.json"):
        damage(path, content)
    report = again(design, copied)
    assert report["differences"] == compared[1]["differences"]
    assert [run["memory_gib"] is None for run in report["runs"]] == [False, True]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("logs/history.csv", b""),
        ("logs/history.csv", b"epoch,loss\n1,0.5\n"),
        ("logs/history.csv", b"epoch,step,seconds\n1,3,many\n"),
        ("logs/history.csv", b"epoch,step,seconds\n1,3,1,\xff\n"),
        ("models/checkpoint.pt", {"epoch": 1}),
        ("models/checkpoint.pt", [1]),
        ("models/checkpoint.pt", b""),
        ("models/checkpoint.pt", None),
        ("models/model.pt", None),
        ("models/model.pt", b"not weights"),
    ],
)
def test_a_damaged_run_is_a_sentence(design, copied, name, content):
    path = copied / "runs" / SECOND / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save(content, path)
    if name == "models/model.pt":
        shutil.rmtree(copied / "tests" / SECOND)
    with pytest.raises(MedsegError, match=re.escape(name.rpartition("/")[2])):
        again(design, copied)
