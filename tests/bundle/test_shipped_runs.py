"""Trained bundles that come with the package: found by their names, and what benchmarks.ship_hippocampus writes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml

from benchmarks.ship_hippocampus import assemble, held_out, rows_of
from medseg_supcon.bundle import check_configs_trusted, find_run, folder, shipped_runs, trust
from medseg_supcon.errors import RunError
from medseg_supcon.inference import Predictor

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("metadata_requirements.json")
MOST_BYTES = 12 * 2**20
Medseg = Callable[..., tuple[int, str, str]]


def row(dice: float, **others: float) -> dict[str, float]:
    same = {"hd95_mm": 1.0, "error": 0.02, "bias": 0.01, "covered": True, "not_good": False, "nnunet": 0.9}
    return {"Anterior": dice + 0.01, "Posterior": dice - 0.01, "dice": dice, **same, **others}


PARTS = {
    "fold_1": [row(0.81), row(0.84, not_good=True)],
    "fold_2": [row(0.9, covered=False)],
    "cut": [row(0.1)],
}


@pytest.fixture
def bundle(rated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`hippocampus` of an installed package: the small run. The working directory is far from both."""
    share = tmp_path / "site" / "medseg_supcon" / "_share"
    shutil.copytree(ROOT / "bundles" / "segmentation", share / "bundles" / "segmentation")
    shutil.copytree(ROOT / "configs", share / "configs")
    assemble(rated_run, share / "bundles" / "hippocampus", PARTS, ["reject", "good", "review"])
    monkeypatch.setattr(folder, "PACKAGE", share.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return share / "bundles" / "hippocampus"


@pytest.fixture
def scan(phantoms: Path) -> Path:
    return next((phantoms / "imagesTs").iterdir())


def test_its_name_is_a_run(bundle: Path, rated_run: Path, phantoms: Path, scan: Path, medseg: Medseg) -> None:
    assert shipped_runs() == ["hippocampus"] and find_run("hippocampus") == bundle
    assert find_run(Path("a/hippocampus")) == Path("a/hippocampus") and find_run("segmentation") == Path("segmentation")
    expected = Predictor(rated_run, device="cpu").predict(scan)
    assert expected.quality is not None and "dice" in expected.quality
    found = Predictor("hippocampus", device="cpu").predict(scan)
    assert np.array_equal(found.mask, expected.mask) and found.quality == expected.quality
    assert medseg("predict", "hippocampus", scan, "--out", "masks", "--device", "cpu")[0] == 0
    assert len(list(Path("masks").glob("*.nii.gz"))) == 1
    code, _, said = medseg("evaluate", "hippocampus", phantoms, "--out", "scores", "--device", "cpu")
    assert code == 0 and "the run was trained on" in said  # configs/datalist.json is there
    assert medseg("export", "hippocampus", "--out", "network.ts")[0] == 0
    tiny = ("--epochs", 1, "--set", "plan::steps_per_epoch=2", "--device", "cpu")
    assert medseg("plan", phantoms, "--init", "hippocampus", "--out", "run", *tiny)[0] == 0
    plans = [json.loads((run / "configs" / "plan.json").read_text()) for run in (Path("run"), bundle)]
    assert plans[0]["network_def"] == plans[1]["network_def"]
    train = yaml.safe_load(Path("run/configs/train.yaml").read_text())
    assert train["init_weights"] == str(bundle / "models" / "model.pt")


def test_a_run_of_that_name_is_used_instead(bundle: Path, trained_run: Path) -> None:
    shutil.copytree(trained_run, "hippocampus")
    assert find_run("hippocampus") == Path("hippocampus")
    assert Predictor("hippocampus", device="cpu").quality_models == [None]  # the one that ships has one


def test_anything_else_of_that_name_is_refused(bundle: Path, scan: Path, medseg: Medseg) -> None:
    Path("hippocampus").mkdir()
    with pytest.raises(RunError, match="hides the bundle"):
        Predictor("hippocampus")
    code, _, said = medseg("predict", "hippocampus", scan, "--out", "masks")
    assert code == 2 and "hippocampus in the working directory is not a run" in said


def test_scans_may_be_in_a_folder_of_that_name(bundle: Path, rated_run: Path, scan: Path, medseg: Medseg) -> None:
    Path("hippocampus").mkdir()
    shutil.copy(scan, "hippocampus")
    assert medseg("predict", rated_run, "hippocampus", "--out", "masks", "--device", "cpu")[0] == 0
    assert len(list(Path("masks").glob("*.nii.gz"))) == 1


def check_bundle(bundle: Path) -> None:
    """It is complete and small, and contains no scan, no path of the machine that trained it, and no code of its own."""
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert {path.split("/")[0] for path in files} == {"LICENSE", "configs", "docs", "models", "scripts"}
    assert {path for path in files if path.startswith(("docs/", "models/"))} == {
        "docs/README.md", "docs/curves.png", "models/model.pt", "models/quality.npz",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in files.values()) < MOST_BYTES
    for name, path in files.items():
        text = path.read_bytes()
        assert not any(part in text for part in (b"/work/", b"/home/", b"/root/", b"/Users/", b"/tmp/")), name
    for name in ("train", "evaluate"):
        assert yaml.safe_load(files[f"configs/{name}.yaml"].read_text())["dataset_dir"] == ""
    metadata = json.loads(files["configs/metadata.json"].read_text())
    jsonschema.validate(metadata, json.loads(REQUIREMENTS.read_text()))
    assert metadata["changelog"][metadata["version"]] and "CC BY-SA 4.0" in metadata["copyright"]
    for name in ("LICENSE", "docs/README.md"):
        text = files[name].read_text()
        assert "CC BY-SA 4.0" in text and "Vanderbilt University Medical Center" in text, name
    assert "Apache License" in files["LICENSE"].read_text()
    weights = torch.load(files["models/model.pt"], weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_what_is_written(bundle: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_bundle(bundle)
    assert not any(str(phantoms).encode() in path.read_bytes() for path in bundle.rglob("*") if path.is_file())
    monkeypatch.setattr(trust, "_written", set())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    check_configs_trusted(bundle, trust=False)  # on a computer that has never seen it
    card = (bundle / "docs" / "README.md").read_text()
    lines = {line.split(" | ")[0]: line for line in card.splitlines() if line.startswith("| ")}
    assert (
        lines["| fold 1"] == "| fold 1 | 2 | 0.8350 | 0.8150 | 0.8250 | 1.00 | 0.020 | 0.010 | 1.00 | 0.50 | 0.9000 |"
    )
    # each scan once: the mean of three scans, without the cut
    assert lines["| folds together"].startswith("| folds together | 3 | 0.8600 | 0.8400 | 0.8500 | ")
    assert lines["| folds together"].endswith(" | 0.67 | 0.33 | 0.9000 |")
    assert "Called good, of 3 masks of another organ's scans (left atrium, MR): 1." in card
    for name in ("evaluate", "train"):
        assert f"configs/{name}.yaml --bundle_root BUNDLE --dataset_dir Task04_Hippocampus\n" in card
    assert card.index("## Metrics") < card.index("| fold 1 |") < card.index("## Limits") < card.index("whole head")
    scores = json.loads((bundle / "configs" / "metadata.json").read_text())["eval_metrics"]
    assert scores == {"cases": 3, "Anterior_dice": 0.86, "Posterior_dice": 0.84, "mean_dice": 0.85, "mean_hd95_mm": 1.0}


@pytest.mark.parametrize("name", shipped_runs())
def test_what_ships(name: str, phantoms: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = ROOT / "bundles" / name
    check_bundle(bundle)
    monkeypatch.setattr(trust, "_written", set())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    check_configs_trusted(bundle, trust=False)
    predictor = Predictor(bundle, device="cpu")
    assert predictor.warnings == []
    for scan in predictor.find_scans([phantoms / "imagesTs"]):  # docs/hippocampus.md says so
        quality = predictor.predict(scan).quality
        assert quality is not None and quality["verdict"] in ("review", "reject") and quality["reasons"]


def test_scores_of_a_part(tmp_path: Path) -> None:
    for name in ("scores", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "scores" / "metrics.csv").write_text(
        "case,class,dice,hd95_mm\na,Anterior,0.9,1\na,Posterior,0.8,3\nb,Anterior,0.5,2\nb,Posterior,0.6,2\n"
    )
    quality: list[dict[str, Any]] = [
        {"dice": {"mean": 0.88}, "interval": [0.7, 0.9], "verdict": "good"},
        {"dice": {"mean": 0.5}, "interval": [0.3, 0.54], "verdict": "review"},
    ]
    scans = [{"name": name, "quality": of} for name, of in zip("ba", reversed(quality), strict=True)]
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps({"scans": scans}))
    published = {"a": {"anterior": 0.9, "posterior": 0.88}, "b": {"anterior": 0.7, "posterior": 0.7}}
    first, second = rows_of(tmp_path, published)
    assert first == pytest.approx(row(0.85, Anterior=0.9, Posterior=0.8, hd95_mm=2, error=0.03, bias=0.03, nnunet=0.89))
    assert second == pytest.approx(
        row(0.55, Anterior=0.5, Posterior=0.6, hd95_mm=2, error=0.05, bias=-0.05, covered=0, not_good=1, nnunet=0.7)
    )


def test_parts(tmp_path: Path) -> None:
    names = [f"case_{number:02}" for number in range(16)]
    random.Random(1).shuffle(names)
    folds = {f"fold_{number + 1}": names[4 * number : 4 * number + 4] for number in range(4)}
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    parts = held_out(tmp_path)
    assert {name: parts[name] for name in folds} == folds and list(parts)[4:] == ["cut"]
    assert len(set(parts["cut"])) == 4 and set(parts["cut"]) <= set(names)
    assert set(parts["cut"]) not in [set(fold) for fold in folds.values()] and held_out(tmp_path) == parts
