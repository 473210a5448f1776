"""The command line as a person meets it: help, sentences instead of tracebacks, exit codes."""

from __future__ import annotations

import json
import shutil
import sys

import nibabel
import numpy as np
import pytest

from medseg_supcon import cli

COMMANDS = ["demo", "check", "plan", "train", "predict", "evaluate", "compare", "embed", "export"]


@pytest.fixture
def medseg(monkeypatch, capsys):
    """Call ``medseg`` in this process: (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, args)])
        monkeypatch.setattr(cli, "_quieten", lambda: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        return stop.value.code, shown.out, shown.err

    return call


def test_no_arguments_show_help(medseg):
    code, text, _ = medseg()
    assert code == 0
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(medseg, command):
    code, text, _ = medseg(command, "--help")
    assert code == 0 and "Usage" in text


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


def test_a_trained_run_is_not_overwritten(medseg, trained_run, phantoms):
    before = (trained_run / "models" / "model.pt").read_bytes()
    code, _, error = medseg("train", phantoms, "--out", trained_run)
    assert code == 2 and "--resume" in error
    code, shown, _ = medseg("train", phantoms, "--out", trained_run, "--resume")
    assert code == 0 and "finished" in shown
    assert (trained_run / "models" / "model.pt").read_bytes() == before


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
    monkeypatch.setattr(cli, "_dataset", lambda *a: 1 / 0)
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
