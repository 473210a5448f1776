"""Quality in the commands: fitted after training, in predict's manifest and quality.csv, in pages, left out on request."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_supcon.errors import RunError
from medseg_supcon.inference import Predictor
from medseg_supcon.quality import QualityModel, model
from medseg_supcon.training import fit_quality, train
from medseg_supcon.training import quality as fitting

Medseg = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def scans(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two unseen phantoms and a scan of pure noise."""
    folder = tmp_path_factory.mktemp("scans")
    for file in (phantoms / "imagesTs").iterdir():
        shutil.copy(file, folder)
    first = nibabel.load(next(folder.iterdir()))
    noise = np.random.default_rng(0).normal(size=first.shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(noise, first.affine), folder / "noise.nii.gz")
    return folder


def test_a_training_of_six_steps_has_no_quality_model_but_plain_facts(
    trained_run: Path, scans: Path, tmp_path: Path
) -> None:
    assert not (trained_run / "models" / "quality.npz").exists()
    manifest = Predictor(trained_run, device="cpu").run([scans], tmp_path)
    for entry in manifest["scans"]:
        assert set(entry["quality"]) == {"verdict", "reasons"} and entry["quality"]["verdict"] != "good"


def test_the_fit_is_reproducible_and_knows_its_scans(rated_run: Path, trained_run: Path, tmp_path: Path) -> None:
    rated = QualityModel.load(rated_run)
    lists = json.loads((rated_run / "configs" / "datalist.json").read_text())
    assert rated is not None and rated.samples >= 24
    assert rated.unseen == len(lists["validation"]) and rated.scans == len(lists["training"]) + len(lists["validation"])
    again = tmp_path / "run"
    shutil.copytree(trained_run, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "WINDOWS_PER_STEP", 10_000)
        patch.setattr(fitting, "MOST", 36)
        patch.setattr(model, "TREES", 20)
        fit_quality(again, "cpu")
    with np.load(rated_run / "models" / "quality.npz") as one, np.load(again / "models" / "quality.npz") as two:
        assert sorted(one) == sorted(two) and all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_that_is_set_to_have_none_gets_no_quality_model(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fitted = Path(shutil.copytree(trained_run, tmp_path / "run")), list[Path]()
    monkeypatch.setattr(train, "fit_quality", lambda run, device: fitted.append(run))
    config = run / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("\nquality: true", "\nquality: false"))
    train.evaluate_and_document(run, "cpu")
    assert not fitted
    config.write_text(config.read_text().replace("\nquality: false", "\nquality: true"))
    train.evaluate_and_document(run, "cpu")
    assert fitted == [run.resolve()]


def test_predict_writes_quality_worst_first_and_says_which_need_a_look(
    rated_run: Path, scans: Path, tmp_path: Path, medseg: Medseg
) -> None:
    code, out, _ = medseg(
        "predict", rated_run, scans, "--out", tmp_path / "masks", "--pictures", "--device", "cpu", "--trust"
    )
    assert code == 0
    entries = {e["name"]: e["quality"] for e in json.loads((tmp_path / "masks" / "manifest.json").read_text())["scans"]}
    for quality in entries.values():
        low, high = quality["interval"]
        assert 0 <= low <= quality["dice"]["mean"] <= high <= 1
        classes = [value for name, value in quality["dice"].items() if name != "mean"]
        assert quality["dice"]["mean"] == pytest.approx(np.mean(classes), abs=2e-3)
        assert quality["verdict"] in ("good", "review", "reject") and (quality["verdict"] == "good") == (
            not quality["reasons"]
        )
    with (tmp_path / "masks" / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["scan"] for row in rows} == set(entries)
    order = [("reject", "review", "good").index(row["verdict"]) for row in rows]
    assert order == sorted(order)
    doubtful = [name for name, quality in entries.items() if quality["verdict"] != "good"]
    assert "noise" in doubtful
    assert f"{len(doubtful)} of {len(entries)} masks need" in out and all(name in out for name in doubtful)
    assert (tmp_path / "masks" / "review.html").stat().st_size > 10_000
    again, _, _ = medseg("predict", rated_run, scans, "--out", tmp_path / "masks", "--device", "cpu", "--trust")
    later = json.loads((tmp_path / "masks" / "manifest.json").read_text())["scans"]
    assert again == 0 and {e["name"]: e["quality"] for e in later} == entries


def test_masks_are_the_same_without_quality_and_with_another_threshold(
    rated_run: Path, scans: Path, tmp_path: Path
) -> None:
    lenient = Predictor(rated_run, device="cpu", review_below=0.0).run([scans], tmp_path / "with")
    bare = Predictor(rated_run, device="cpu", quality=False).run([scans], tmp_path / "without")
    assert (
        not any("quality" in entry for entry in bare["scans"]) and not (tmp_path / "without" / "quality.csv").exists()
    )
    assert not any("predicted Dice" in reason for e in lenient["scans"] for reason in e["quality"]["reasons"])
    for entry in bare["scans"]:
        one, two = (nibabel.load(tmp_path / f / f"{entry['name']}.nii.gz") for f in ("with", "without"))
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))


def test_an_ensemble_is_rated_from_all_its_runs(rated_run: Path, trained_run: Path, scans: Path) -> None:
    scan = next(scans.glob("*.nii.gz"))
    alone = Predictor(rated_run, device="cpu").predict(scan)
    twice = Predictor([rated_run, rated_run], device="cpu").predict(scan)
    assert twice.quality is not None and alone.quality is not None
    assert twice.quality["dice"]["mean"] == pytest.approx(alone.quality["dice"]["mean"], abs=2e-3)
    mixed = Predictor([trained_run, rated_run], device="cpu").predict(scan)
    assert mixed.quality is not None and "dice" in mixed.quality and len(mixed.evidence) == 2


def test_a_damaged_quality_model_is_a_sentence_with_a_cure(
    rated_run: Path, scans: Path, tmp_path: Path, medseg: Medseg
) -> None:
    run = tmp_path / "run"
    shutil.copytree(rated_run, run)
    (run / "models" / "quality.npz").write_bytes(b"nothing")
    with pytest.raises(RunError, match="--no-quality"):
        Predictor(run, device="cpu")
    code, _, err = medseg("predict", run, scans, "--out", tmp_path / "masks", "--device", "cpu", "--trust")
    assert code == 2 and "quality.npz is damaged" in err
    assert (
        medseg("predict", run, scans, "--out", tmp_path / "masks", "--no-quality", "--device", "cpu", "--trust")[0] == 0
    )


def test_a_label_map_given_as_a_scan_is_noticed(rated_run: Path, phantoms: Path) -> None:
    label = next((phantoms / "labelsTr").iterdir())
    quality = Predictor(rated_run, device="cpu").predict(label).quality
    assert quality is not None and quality["verdict"] != "good"
    assert any("different values: is it a label map?" in reason for reason in quality["reasons"])


def test_training_leaves_a_page_of_its_validation_scans(trained_run: Path) -> None:
    assert (trained_run / "eval" / "review.html").is_file()
    assert (
        "example.png" in (trained_run / "docs" / "README.md").read_text()
        and (trained_run / "eval" / "example.png").is_file()
    )
