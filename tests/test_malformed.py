"""Every file of the catalogue with every command: a sentence names the file, and the good ones are done."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from malformed import BROKEN, SHAPE, nifti, sound

from medseg_supcon.datasets import read_dataset

Command = Callable[..., tuple[int, str, str]]
NOT_AS_LABEL = ("nan", "inf", "all_nan")  # as label maps these have tests of their own


def good(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nifti(array), 1))
    return path


def label() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[2:6, 2:6, 2:6] = 1
    return array


def lines_on(path: Path, text: str) -> list[str]:
    return [line for line in text.splitlines() if f"{path}:" in line or f"{path} " in line]


def errors_on(path: Path, text: str) -> list[str]:
    return [line for line in lines_on(path, text) if line.startswith("error")]


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A folder with two good scans and every broken one."""
    folder = tmp_path / "scans"
    for number in range(2):
        good(folder / f"good_{number}.nii.gz", sound(number))
    paths = {name: folder / f"{name}{ending}" for name, (ending, _) in BROKEN.items()}
    for name, (_, write) in BROKEN.items():
        write(paths[name])
    return folder, paths


def test_predict(medseg: Command, trained_run: Path, spoilt: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, paths = spoilt
    before = {p: p.stat(follow_symlinks=False).st_mtime_ns for p in folder.iterdir()}
    code, _, error = medseg("predict", trained_run, folder, "--out", tmp_path / "masks", "--device", "cpu")
    assert code == 3
    for name, path in paths.items():
        assert len(lines_on(path, error)) == 1, name
    entries = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    assert entries["summary"] == {"done": 2, "skipped": 0, "failed": len(BROKEN)}
    for entry in entries["scans"]:
        if entry["status"] == "failed":
            sentence = entry["error"]
            assert str(paths[entry["name"]]) in sentence and sentence.endswith(".") and "\n" not in sentence
            assert "the prediction failed" not in sentence, "that is what unforeseen exceptions say"
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {
        "manifest.json",
        "quality.csv",
        "good_0.nii.gz",
        "good_1.nii.gz",
    }
    assert before == {p: p.stat(follow_symlinks=False).st_mtime_ns for p in folder.iterdir()}
    code, _, _ = medseg("predict", trained_run, *paths.values(), "--out", tmp_path / "none", "--device", "cpu")
    assert code == 2


def data_list(folder: Path, images: dict[str, Path], labels: dict[str, Path]) -> Path:
    items = [{"name": n, "image": str(images[n]), "label": str(labels[n])} for n in images]
    content = {"labels": {"background": 0, "organ": 1}, "modality": "MRI", "training": items}
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("which", ["image", "label"])
def test_check_and_train(medseg: Command, spoilt: tuple[Path, dict[str, Path]], tmp_path: Path, which: str) -> None:
    _, broken = spoilt
    broken = {n: p for n, p in broken.items() if which == "image" or n not in NOT_AS_LABEL}
    names = ["good_a", "good_b", *broken]
    images = {n: good(tmp_path / "i" / f"{n}.nii.gz", sound(i)) for i, n in enumerate(names)}
    labels = {n: good(tmp_path / "l" / f"{n}.nii.gz", label()) for n in names}
    (images if which == "image" else labels).update(broken)
    source = data_list(tmp_path, images, labels)
    code, shown, _ = medseg("check", source, "--json", tmp_path / "report.json")
    assert code == 2
    findings = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert {f["case"] for f in findings if f["severity"] == "error"} == set(broken)
    for name, path in broken.items():
        assert lines_on(path, shown), name
    code, _, error = medseg("train", source, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2 and "medseg check" in error
    for name, path in broken.items():
        assert name.startswith("good") or lines_on(path, error), name
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["masks", "references"])
def test_evaluate_folders(medseg: Command, spoilt: tuple[Path, dict[str, Path]], tmp_path: Path, which: str) -> None:
    folder, broken = spoilt
    other = tmp_path / "other"
    for name in ("good_0", "good_1", *broken):
        good(other / f"{name}.nii.gz", label())
    for number in range(2):
        good(folder / f"good_{number}.nii.gz", label())
    masks, references = (folder, other) if which == "masks" else (other, folder)
    options = ("--predictions", masks, "--references", references, "--out", tmp_path / "scores")
    code, _, error = medseg("evaluate", *options)
    assert code == 3
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert {row["case"] for row in report["rows"]} == {"good_0", "good_1"}
    assert {problem["case"] for problem in report["problems"]} == set(broken)
    for name, path in broken.items():
        assert lines_on(path, error), name


def test_evaluate_a_run(
    medseg: Command, trained_run: Path, phantoms: Path, spoilt: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Broken scans beside two good cases, and a label map with a value that the run does not know."""
    _, broken = spoilt
    cases = read_dataset(phantoms).labelled[:3]
    images = {c.name: c.images[0] for c in cases} | broken
    labels = {c.name: Path(str(c.label)) for c in cases} | dict.fromkeys(broken, Path(str(cases[0].label)))
    stray = nibabel.load(labels[cases[2].name])
    values = np.asarray(stray.dataobj).copy()
    values[0, 0, 0] = 77
    nibabel.save(nibabel.Nifti1Image(values, stray.affine), tmp_path / "stray.nii.gz")
    labels[cases[2].name] = tmp_path / "stray.nii.gz"
    source = data_list(tmp_path, images, labels)
    code, _, error = medseg("evaluate", trained_run, source, "--out", tmp_path / "scores", "--device", "cpu")
    assert code == 3, error
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert {row["case"] for row in report["rows"]} == {c.name for c in cases[:2]}
    assert {problem["case"] for problem in report["problems"]} == {*broken, cases[2].name}
    assert report["summary"]["failed"] == len(broken) + 1
    assert lines_on(tmp_path / "stray.nii.gz", error)


def test_unlabelled_scans_are_checked_too(medseg: Command, phantoms: Path, tmp_path: Path) -> None:
    """Those of --unlabelled and those beyond --labels N are learnt from as well."""
    more = tmp_path / "more"
    good(more / "fine.nii.gz", sound(7))
    for name in ("nan", "cut", "four_d", "two_d"):
        BROKEN[name][1](more / f"{name}.nii.gz")
    code, _, error = medseg("train", phantoms, "--out", tmp_path / "run", "--unlabelled", more, "--recipe", "semi")
    assert code == 2 and str(more) in error
    assert [len(errors_on(more / f"{name}.nii.gz", error)) for name in ("nan", "cut", "four_d", "two_d", "fine")] == [
        *(1, 1, 1, 1),
        0,
    ]
    data = shutil.copytree(phantoms, tmp_path / "data")
    beyond: dict[str, Any] = {}
    for path in sorted((data / "imagesTr").glob("*.nii.gz")):
        beyond[path.name] = path
    scans = list(beyond.values())
    for path in scans:  # whichever two are labelled, the others are not sound
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
        values[0, 0, 0] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    code, _, error = medseg("train", data, "--out", tmp_path / "run", "--labels", 2, "--recipe", "semi")
    assert code == 2
    assert all(lines_on(path, error) for path in scans)
    assert not (tmp_path / "run").exists()


def test_data_that_breaks_after_the_plan(medseg: Command, phantoms: Path, tmp_path: Path) -> None:
    from tiny_run import TINY

    data = shutil.copytree(phantoms, tmp_path / "data")
    settings = [f"--set={k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in TINY]
    assert medseg("plan", data, "--out", tmp_path / "run", "--epochs", 1, "--device", "cpu", *settings)[0] == 0
    victim = sorted((data / "imagesTr").glob("*.nii.gz"))[1]
    victim.write_bytes(victim.read_bytes()[:500])
    code, _, error = medseg("train", data, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2 and lines_on(victim, error)
    assert not (tmp_path / "run" / "models" / "model.pt").exists()
