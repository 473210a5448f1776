"""The command line as a person meets it: help, sentences instead of tracebacks, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from tiny_run import TINY

from medseg_supcon.cli import commands as cli
from medseg_supcon.cli import terminal

COMMANDS = ["demo", "check", "plan", "train", "predict", "review", "evaluate", "compare", "embed", "export"]


def test_no_arguments_show_help(medseg):
    code, text, _ = medseg()
    assert code == 0
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(medseg, command):
    code, text, _ = medseg(command, "--help")
    assert code == 0 and "Usage" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_options_can_be_copied_from_a_narrow_terminal(medseg, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    assert "\u2026" not in medseg(command, "--help")[1]  # an ellipsis in place of a name's end


def test_version(medseg):
    assert medseg("--version")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "train"),
        (["train", "nowhere", "--out", "run"], "nowhere"),
        (["check", "nowhere"], "nowhere"),
        (["plan", "nowhere", "--out", "run"], "nowhere"),
        (["predict", "nowhere", "scan.nii.gz", "--out", "masks"], "not a run"),
        (["evaluate"], "--predictions"),
        (["evaluate", "--predictions", "a"], "--references"),
        (["evaluate", "--predictions", "nowhere", "--references", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "model.ts"], "nowhere"),
        (["train", "nowhere", "--out", "run", "--device", "toaster"], "toaster"),
        (["train", "nowhere", "--out", "run", "--device", "cuda:99"], "--device cpu"),
        (["train", "nowhere", "--out", "run", "--epochs", "0"], "epochs"),
        (["compare", "nowhere", "--out", "x", "--robustness", "--no-robustness"], "Give one of them"),
    ],
)
def test_faults_of_the_input_are_sentences(medseg, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = medseg(*arguments)
    assert code == 2
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_without_labels_is_a_sentence(medseg, phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    shutil.rmtree(data / "labelsTr")
    listing = json.loads((data / "dataset.json").read_text())
    listing["training"] = [{"image": case["image"]} for case in listing["training"]]
    (data / "dataset.json").write_text(json.dumps(listing))
    code, _, error = medseg("train", data, "--out", tmp_path / "run")
    assert code == 2 and "label" in error
    assert not (tmp_path / "run").exists()


def test_a_setting_that_does_not_exist_is_refused(medseg, phantoms, tmp_path):
    code, _, error = medseg("plan", phantoms, "--out", tmp_path / "run", "--set", "learning_rat=1")
    assert code == 2 and "learning_rate" in error
    code, _, error = medseg("plan", phantoms, "--out", tmp_path / "run", "--set", "plan::spacin=1")
    assert code == 2 and "spacing" in error


def test_errors_in_the_data_stop_the_training(medseg, phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    victim = sorted((data / "imagesTr").glob("*.nii.gz"))[0]
    scan = nibabel.load(victim)
    values = np.asarray(scan.dataobj, dtype=np.float32)
    values[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, scan.affine), victim)
    code, shown, _ = medseg("check", data, "--json", tmp_path / "report.json")
    assert code == 2 and victim.name.removesuffix(".nii.gz") in shown
    assert json.loads((tmp_path / "report.json").read_text())["errors"] == 1
    code, _, error = medseg("train", data, "--out", tmp_path / "run")
    assert code == 2 and "medseg check" in error
    assert not (tmp_path / "run").exists()


def test_a_clean_data_set_passes(medseg, phantoms):
    assert medseg("check", phantoms)[0] == 0


def test_where_all_labelled_scans_train_each_is_checked_once(medseg, phantoms, tmp_path):
    run = tmp_path / "run"
    words = ("--labels", 3, "--validation", 0)
    code, shown, error = medseg("plan", phantoms, "--out", run, *words)
    assert code == 0 and "3 for training" in shown + error and "same voxels" not in error
    lists = json.loads((run / "configs" / "datalist.json").read_text())
    assert len(lists["training"]) == 3 and lists["validation"] == lists["training"]
    code, _, error = medseg("train", phantoms, "--out", run, "--validation", 0.2)
    assert code == 2 and "--validation would be ignored" in error


def test_too_few_epochs_for_the_stages_leave_no_run(medseg, phantoms, tmp_path):
    run = tmp_path / "run"
    code, _, error = medseg("plan", phantoms, "--out", run, "--recipe", "two_stage", "--epochs", 2)
    assert code == 2 and "3 or more" in error and not run.exists()


def test_a_trained_run_is_not_overwritten(medseg, trained_run, phantoms):
    before = (trained_run / "models" / "model.pt").read_bytes()
    code, _, error = medseg("train", phantoms, "--out", trained_run)
    assert code == 2 and "--resume" in error
    code, shown, _ = medseg("train", phantoms, "--out", trained_run, "--resume")
    assert code == 0 and "finished" in shown
    assert (trained_run / "models" / "model.pt").read_bytes() == before


def longer(trained_run, run, old, new):
    """A copy of the trained run, planned for one epoch more, with a change in its train.yaml."""
    shutil.copytree(trained_run, run)
    plan, config = run / "configs" / "plan.json", run / "configs" / "train.yaml"
    plan.write_text(plan.read_text().replace('"epochs": 2', '"epochs": 3'))
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    return run


def test_a_run_goes_on_without_the_weights_it_began_from(medseg, trained_run, phantoms, tmp_path):
    run = longer(trained_run, tmp_path / "run", "init_weights:", "init_weights: /gone/model.pt")
    code, _, error = medseg("train", phantoms, "--out", run, "--resume", "--device", "cpu")
    assert code == 0, error
    assert len((run / "logs" / "history.csv").read_text().splitlines()) == 4


def test_a_run_that_was_changed_is_not_resumed(medseg, trained_run, phantoms, tmp_path):
    run = longer(trained_run, tmp_path / "run", "out_channels: 64", "out_channels: 32")
    code, _, error = medseg("train", phantoms, "--out", run, "--resume", "--device", "cpu")
    assert code == 2 and "does not fit the loss of the config" in error and "size mismatch" in error


def test_a_trained_run_without_scores_gets_them(medseg, trained_run, phantoms, tmp_path):
    """What is left where a training was stopped while its model was evaluated; a path may hold brackets."""
    run = shutil.copytree(trained_run, tmp_path / "run [old]")
    weights = (run / "models" / "model.pt").stat().st_mtime_ns
    shutil.rmtree(run / "eval")
    (run / "docs" / "curves.png").unlink()
    code, shown, error = medseg("train", phantoms, "--out", run, "--resume", "--device", "cpu")
    assert code == 0, error
    assert f"The run is in {run} " in shown
    assert json.loads((run / "eval" / "metrics.json").read_text())["summary"]["cases"] == 1
    assert (run / "docs" / "curves.png").exists()
    assert (run / "models" / "model.pt").stat().st_mtime_ns == weights
    code, shown, _ = medseg("train", phantoms, "--out", run, "--resume")
    assert code == 0 and f"{run} is finished" in shown


def test_tta_without_an_axis_to_mirror_says_so(medseg, trained_run, phantoms, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    path = run / "configs" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flip_axes": []}))
    scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    for which, told in ((run, True), (trained_run, False)):
        code, _, error = medseg("predict", which, scan, "--out", tmp_path / which.name / "masks", "--tta")
        assert code == 0 and ("--tta has no effect" in error) == told


def test_some_failed_and_all_failed_have_their_codes(medseg, trained_run, phantoms, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    good = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    shutil.copy(good, scans)
    (scans / "broken.nii.gz").write_bytes(good.read_bytes()[:1000])
    code, _, error = medseg("predict", trained_run, scans, "--out", tmp_path / "masks", "--device", "cpu")
    assert code == 3 and "broken.nii.gz" in error
    assert (tmp_path / "masks" / good.name).exists()
    code, _, error = medseg(
        "predict", trained_run, scans / "broken.nii.gz", "--out", tmp_path / "none", "--device", "cpu"
    )
    assert code == 2
    assert [p.name for p in (tmp_path / "none").glob("*.nii.gz")] == []


def test_long_paths_are_not_wrapped_off_a_terminal(medseg, tmp_path):
    deep = tmp_path.joinpath(*["a_rather_long_folder_name_that_goes_on"] * 4)
    _, _, error = medseg("check", deep)
    assert str(deep) in error


def test_a_fault_of_ours_exits_with_one(monkeypatch, capsys, phantoms):
    monkeypatch.setattr(sys, "argv", ["medseg", "check", str(phantoms)])
    monkeypatch.setattr(cli, "read_selected", lambda *a: 1 / 0)
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "plan::batch_size"),
        (MemoryError(), "Close other programs"),
    ],
)
def test_out_of_memory_says_whose_it_was(medseg, monkeypatch, phantoms, error, says):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "read_selected", fail)
    code, _, told = medseg("check", phantoms)
    assert code == 2 and says in told


def test_a_gpu_that_torch_cannot_use_is_told_of(medseg, monkeypatch, phantoms, tmp_path):
    """Without a word a training that was meant for the GPU would take days on the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = "predict", tmp_path / "no_run", tmp_path / "scan.nii.gz", "--out", tmp_path / "masks"
    assert "NVIDIA" not in medseg(*missing)[2]  # a machine without one
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(terminal, "DRIVER", driver)
    told = medseg(*missing)[2]
    assert "cannot use it" in told and "--gpus all" in " ".join(told.split())
    assert "NVIDIA" not in medseg(*missing, "--device", "cpu")[2]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert "NVIDIA" not in medseg(*missing)[2]


TINY_SET = [f"--set={key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in TINY]


def test_arguments_that_the_template_does_not_spell_out_can_be_set(medseg, phantoms, tmp_path):
    more = ("--set", "view_1::elastic=0.2", "--set", "contrastive_loss::within_scan=true")
    code, _, error = medseg("plan", phantoms, "--out", tmp_path / "run", "--epochs", 1, *TINY_SET, *more)
    assert code == 0, error
    config = yaml.safe_load((tmp_path / "run" / "configs" / "train.yaml").read_text())
    assert config["view_1"]["elastic"] == 0.2
    assert config["contrastive_loss"]["within_scan"] is True


@pytest.mark.parametrize(
    "more", [("--recipe", "semi", "--labels", 4), ("--set", "contrastive_loss::loss::positives=same_voxel")]
)
def test_pairs_of_voxels_and_elastic_views_exclude_each_other(medseg, phantoms, tmp_path, more):
    code, _, error = medseg(
        "plan",
        phantoms,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        *TINY_SET,
        "--set",
        "view_1::elastic=0.2",
        *more,
    )
    assert code == 2 and ("elastic=0" in error or "pair_ids" in error), error


@pytest.mark.parametrize("setting", ["sampling=hrd", "learning_rate=abc", "view_1::elastik=1"])
def test_a_setting_that_cannot_be_leaves_no_half_run(medseg, phantoms, tmp_path, setting):
    code, _, error = medseg("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, *TINY_SET, "--set", setting)
    assert code == 2 and "settings" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def planned(medseg, phantoms, tmp_path):
    run = tmp_path / "planned"
    assert medseg("plan", phantoms, "--out", run, "--set", "epochs=2", *TINY_SET)[0] == 0
    return run


def test_length_set_by_key_is_the_plans(planned):
    plan = json.loads((planned / "configs" / "plan.json").read_text())
    assert (plan["epochs"], plan["steps_per_epoch"]) == (2, 3)


@pytest.mark.parametrize(("name", "says"), [("train.yaml", "not valid YAML"), ("datalist.json", "not valid JSON")])
def test_a_config_edited_wrongly_is_a_sentence(medseg, phantoms, planned, name, says):
    path = planned / "configs" / name
    path.write_text(path.read_text() + "a: [\n")
    code, _, error = medseg("train", phantoms, "--out", planned)
    assert code == 2 and f"{path} is {says}" in error and "line" in error


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("[16, 16, 16]", "[15, 16, 16]"), "patch_size"),
        (lambda text: text[:200], "JSON"),
        (lambda text: text.replace('"spacing"', '"spacin"'), "spacing"),
    ],
)
def test_a_plan_edited_wrongly_is_a_sentence(medseg, phantoms, planned, edit, says):
    path = planned / "configs" / "plan.json"
    path.write_text(edit(path.read_text()))
    code, _, error = medseg("train", phantoms, "--out", planned)
    assert code == 2 and says in error


def test_what_a_planned_folder_would_ignore_is_refused(medseg, phantoms, planned, tmp_path):
    code, _, error = medseg("train", phantoms, "--out", planned, "--recipe", "dice_ce", "--seed", 3)
    assert code == 2 and "--recipe, --seed" in error
    other = shutil.copytree(phantoms, tmp_path / "other")
    code, _, error = medseg("train", other, "--out", planned)
    assert code == 2 and str(other) in error
    assert medseg("train", tmp_path / "nowhere", "--out", planned)[0] == 2


def test_a_slip_in_a_recipe_of_ones_own_is_refused(medseg, phantoms, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("contrast_wieght: 0.2\n")
    code, _, error = medseg("plan", phantoms, "--out", tmp_path / "run", "--recipe", own)
    assert code == 2 and "contrast_weight" in error


def test_a_recipe_may_choose_the_network(medseg, phantoms, tmp_path):
    own, settings = tmp_path / "own.yaml", dict(TINY)
    own.write_text(
        yaml.safe_dump({"network_def": settings["network_def"], "plan::patch_size": [16, 16, 16], "epochs": 1})
    )
    assert medseg("plan", phantoms, "--out", tmp_path / "run", "--recipe", own)[0] == 0
    plan = json.loads((tmp_path / "run" / "configs" / "plan.json").read_text())
    assert plan["network_def"] == settings["network_def"] and plan["epochs"] == 1


def test_control_characters_of_a_name_stay_out_of_the_terminal(medseg, trained_run, phantoms, tmp_path):
    scans = tmp_path / "scans\n\x1b[2J"
    scans.mkdir()
    good = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    shutil.copy(good, scans / "a\rb.nii.gz")
    (scans / "c\x07\u202e.nii.gz").write_bytes(b"damaged")
    out = tmp_path / "masks\n\x1b[31m"
    code, shown, error = medseg("predict", trained_run, scans, "--out", out, "--device", "cpu")
    assert code == 3 and r"c\x07\u202e.nii.gz" in error and r"masks\n\x1b[31m" in shown
    assert (out / "a\rb.nii.gz").exists()
    for text in (
        shown + error,
        *medseg("check", tmp_path / "no\nsuch\x1b[0m")[1:],
        *medseg("predict", trained_run, "--nonsense\x1b[31m")[1:],
    ):
        assert all(character.isprintable() or character == "\n" for character in text), text
        assert all(line.startswith(("medseg: ", "failed ", "warning ", str(tmp_path))) for line in text.splitlines())


@pytest.mark.parametrize("arguments", [["check"], ["--help"]])
def test_a_closed_pipe_ends_quietly(phantoms, arguments):
    words = [sys.executable, "-m", "medseg_supcon.cli", *arguments]
    with subprocess.Popen(
        [*words, str(phantoms)] if arguments == ["check"] else words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode in (0, 141) and error == ""


def test_long_class_names_are_not_cut_off_a_terminal(medseg, trained_run, phantoms, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    plan = run / "configs" / "plan.json"
    name = "a_structure_with_a_name_that_is_longer_than_a_terminal_is_wide_" * 3
    plan.write_text(plan.read_text().replace('"capsule"', f'"{name}"'))
    code, shown, error = medseg("evaluate", run, phantoms, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0 and name in shown
    assert "trained on 5 of 6 cases" in error


def test_embed_and_export_replace_a_file_only_if_asked(medseg, trained_run, phantoms, tmp_path):
    file, folder = tmp_path / "model.ts", tmp_path / "plots"
    folder.mkdir()
    for existing in (file, folder / "separation.json"):
        existing.write_text("mine")
    export = ("export", trained_run, "--out", file)
    for words in (export, ("embed", trained_run, phantoms, "--out", folder)):
        code, _, error = medseg(*words)
        assert code == 2 and "already exists. Replace it with --overwrite" in error
    assert file.read_text() == (folder / "separation.json").read_text() == "mine"
    assert medseg(*export, "--overwrite")[0] == 0 and file.read_bytes() != b"mine"


def test_a_recipe_that_is_not_utf8_or_refers_to_itself_a_billion_times(medseg, phantoms, tmp_path):
    own = tmp_path / "own.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    for content, says in ((b"# f\xfcr\nseed: 1\n", "UTF-8"), ("\n".join(lines).encode(), "alias")):
        own.write_bytes(content)
        code, _, error = medseg("plan", phantoms, "--out", tmp_path / "run", "--recipe", own)
        assert code == 2 and says in error and str(own) in error


@pytest.mark.parametrize("content", ["[]", '{"training": 3}', '{"training": [3]}', "{", "[" * 100_000])
def test_a_damaged_datalist_is_a_sentence(medseg, trained_run, phantoms, tmp_path, content):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "configs" / "datalist.json").write_text(content)
    (run / "eval" / "metrics.json").unlink()
    for words in (
        ("evaluate", run, phantoms, "--out", tmp_path / "out", "--device", "cpu"),
        ("embed", run, phantoms, "--out", tmp_path / "plots", "--device", "cpu"),
        ("train", phantoms, "--out", run, "--resume", "--device", "cpu"),
    ):
        code, _, error = medseg(*words)
        assert code == 2 and "datalist.json" in error, words


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv")
def test_a_user_without_a_name_or_a_home(trained_run, phantoms):
    """As in a container that runs with --user 12345: no passwd entry, no HOME, no USER."""
    scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        folder = Path(name)
        words = ["predict", shutil.copytree(trained_run, folder / "run"), shutil.copy(scan, folder)]
        words += ["--out", folder / "masks", "--device", "cpu"]
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        program = [sys.executable, "-m", "medseg_supcon.cli", *map(str, words)]
        done = subprocess.run(
            ["setpriv", "--reuid", "12345", "--clear-groups", *program],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert (folder / "masks" / scan.name).exists()
