"""Overlapping regions from nnU-Net's dataset.json to masks, scores, page and DICOM: a set like BraTS', and numpy's answer."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from region_phantoms import AFFINE, EDGE, HELD, IGNORE, ORDER, SETTINGS, write_region_phantoms
from scipy import ndimage

from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import ConfigError
from medseg_supcon.inference import Predictor, evaluate_dataset
from medseg_supcon.networks import build_network
from medseg_supcon.quality import model
from medseg_supcon.training import fit_quality, load_initial, prepare_run, train_run
from medseg_supcon.training import quality as fitting
from medseg_supcon.training.prepare import inherit

# Runs MONAI's bundle where medseg_supcon cannot be imported.
STOCK = """
import sys
sys.modules["medseg_supcon"] = None
from monai.bundle import run
for root in sys.argv[2:]:
    config = root + "/configs/inference.yaml"
    run(config_file=config, bundle_root=root, dataset_dir=sys.argv[1], output_dir=root + "_stock")
"""
SCRIPTS = Path(__file__).parents[1] / "bundles" / "segmentation" / "scripts"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_region_phantoms(tmp_path_factory.mktemp("brats") / "Dataset001_Toy")


def train(data: Path, run: Path, recipe: str = "joint", epochs: int = 4, more: Any = (), **split: Any) -> list[Any]:
    """Train on the phantoms: the rows of history.csv."""
    dataset, settings = read_dataset(data), [*SETTINGS, *more]
    prepare_run(
        dataset, split_cases(dataset, **split), run, recipe=recipe, epochs=epochs, settings=settings, device="cpu"
    )
    train_run(run, device="cpu", quiet=True)
    with (run / "logs" / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps; its segmentation loss fell."""
    run = tmp_path_factory.mktemp("runs") / "run"
    rows = train(data, run)
    losses = [float(row["segmentation"]) for row in rows]
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(float(rows[-1][f"val_dice_{name}"])) for name in HELD)
    assert np.isfinite(float(rows[-1]["contrastive"])) and float(rows[-1]["contrastive"]) > 0
    return run


@pytest.fixture(scope="module")
def masks(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masks")
    manifest = Predictor(run, device="cpu").run([data / "imagesTr"], out, probabilities=True, pictures=True)
    assert manifest["summary"]["done"] == 4
    return out


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj)


def dice(mask: np.ndarray, label: np.ndarray, held: list[int]) -> float:
    known = label != IGNORE
    a, b = np.isin(mask, held) & known, np.isin(label, held) & known
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_values_are_written_in_the_order_of_the_data_set(masks: Path) -> None:
    seen = set()
    for file in sorted(masks.glob("*.nii.gz")):
        scores, mask = voxels(masks / "probabilities" / file.name), voxels(file)
        expected = np.zeros(mask.shape, int)
        for r, value in enumerate(ORDER):
            expected = np.where(scores[..., r] > 0.5, value, expected)
        assert scores.shape[-1] == 3 and mask.dtype == np.uint8
        assert np.array_equal(mask, expected)
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 1, 2, 3}


def components(mask: np.ndarray, held: list[int]) -> tuple[np.ndarray, int]:
    return ndimage.label(np.isin(mask, held), np.ones((3, 3, 3)))


def test_stock_monai_alone_gives_the_same_masks(run: Path, data: Path, tmp_path: Path) -> None:
    small = {"smallest_mm3": {"tumor core": 1e6, "whole tumor": 40.0}}
    plan, kept = json.loads((run / "configs" / "plan.json").read_text()), {"all": {}, "small": small}
    kept["largest"] = {"keep_largest": list(HELD)}
    for name, changes in kept.items():
        copy = Path(shutil.copytree(run, tmp_path / name))
        (copy / "configs" / "plan.json").write_text(json.dumps(plan | changes))
    scans = tmp_path / "scans"
    scans.mkdir()
    for channel in range(4):  # two tumours, and noise
        parts = [voxels(data / f"imagesTr/b_{case}_{channel:04d}.nii.gz") for case in (0, 3)]
        scan = np.concatenate(parts) + np.random.default_rng(channel).normal(0, 0.5, (2 * EDGE, EDGE, EDGE))
        nibabel.save(nibabel.Nifti1Image(scan.astype(np.float32), AFFINE), scans / f"b_{channel:04d}.nii.gz")
    command = [sys.executable, "-c", STOCK, str(scans), *(str(tmp_path / name) for name in kept)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in kept:
        Predictor(tmp_path / name, device="cpu", quality=False).run([scans], tmp_path / f"{name}_ours")
        ours, stock = (voxels(tmp_path / f"{name}_{who}" / "b.nii.gz") for who in ("ours", "stock"))
        assert np.array_equal(ours, stock) and ours.dtype == stock.dtype
        found = [components(ours, held)[1] for held in HELD.values()]
        if name == "small":  # what leaves the core is the rest of the whole tumour
            parts, _ = components(ours, HELD["whole tumor"])
            assert set(np.unique(ours)) == {0, 2} and np.bincount(parts.ravel())[1:].min() * 1.8 >= 40
        else:
            assert found == [1, 1, 1] if name == "largest" else min(found) >= 2


@pytest.mark.parametrize("kept", [["enhancing tumor"], ["tumor core"], list(HELD)])
def test_what_leaves_a_region_keeps_the_value_of_the_others(kept: list[str]) -> None:
    """Against numpy: a small part of the core becomes the rest of the whole tumour, and not background."""
    scores = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(3, 16, 14, 12)), (0, 1.5, 1.5, 1.5))
    scores = scores / scores.std() * 0.2 + 0.3
    expected = np.zeros(scores.shape[1:], int)
    for p, value in zip(scores, ORDER, strict=True):
        expected[p > 0.5] = value
    for name in (name for name in HELD if name in kept):
        parts, number = components(expected, HELD[name])
        assert number > 1
        lost = (parts > 0) & (parts != np.bincount(parts[parts > 0]).argmax())
        expected[lost] = {"whole tumor": 0, "tumor core": 2, "enhancing tumor": 1}[name]
    painter = runpy.run_path(str(SCRIPTS / "inference.py"))["region_painter"]
    plan = {"labels": {str(value): value for value in range(4)}, "regions": HELD, "regions_class_order": ORDER}
    found = painter(plan | {"keep_largest": kept})(torch.from_numpy(scores))
    assert np.array_equal(found[0].numpy(), expected)


def test_scores_are_those_of_the_regions(run: Path, data: Path, tmp_path: Path, medseg: Any) -> None:
    report = evaluate_dataset(run, read_dataset(data), tmp_path / "scores", device="cpu", pictures=True)
    rows = {(row["case"], row["class"]): row for row in report["rows"]}
    assert len(rows) == 12
    for (case, name), row in rows.items():
        mask, label = voxels(tmp_path / f"scores/predictions/{case}.nii.gz"), voxels(data / f"labelsTr/{case}.nii.gz")
        assert row["dice"] == pytest.approx(dice(mask, label, HELD[name]))
    folders = ("--predictions", tmp_path / "scores/predictions", "--references", data / "labelsTr")
    assert medseg("evaluate", *folders, "--dataset-json", data / "dataset.json", "--out", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())["rows"]
    assert {(row["case"], row["class"]): row["dice"] for row in again} == {
        key: row["dice"] for key, row in rows.items()
    }
    assert medseg("evaluate", run, data, "--dataset-json", data, "--out", tmp_path / "no")[0] == 2


def test_manifest_and_page_speak_of_regions(masks: Path) -> None:
    manifest = json.loads((masks / "manifest.json").read_text())
    for entry in manifest["scans"]:
        mask = voxels(masks / f"{entry['name']}.nii.gz")
        assert {name: fact["voxels"] for name, fact in entry["labels"].items()} == {
            name: int(np.isin(mask, held).sum()) for name, held in HELD.items()
        }
    page = (masks / "review.html").read_text()
    found = page.partition('id="data"')[2].partition(">")[2].partition("</script>")[0]
    head = json.loads(found)
    assert [one["name"] for one in head["classes"]] == list(HELD)
    assert [one["name"] for one in head["voxels"]] == ["whole tumor, tumor core", "whole tumor", ", ".join(HELD)]
    for row in head["rows"]:
        mask = voxels(masks / f"{row['name']}.nii.gz")
        ml = 1.2 * 1.5 / 1000
        assert row["volumes"] == pytest.approx([np.isin(mask, held).sum() * ml for held in HELD.values()], abs=1e-3)
        assert row["total"] == pytest.approx((mask > 0).sum() * ml, abs=1e-3)


def test_documents_name_the_regions(run: Path) -> None:
    metadata = json.loads((run / "configs" / "metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert list(outputs["channel_def"].values()) == list(HELD) and outputs["num_channels"] == 3
    card = (run / "docs" / "README.md").read_text()
    assert "any of 3 regions, which may overlap" in card and "| tumor core | 1, 3 | 1 |" in card


def test_quality_is_predicted_per_region(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    monkeypatch.setattr(fitting, "WINDOWS_PER_STEP", 10_000)
    monkeypatch.setattr(fitting, "MOST", 24)
    monkeypatch.setattr(model, "TREES", 20)
    assert fit_quality(copy, "cpu") is not None
    predictor = Predictor(copy, device="cpu")
    scan = predictor.find_scans([data / "imagesTr"])[0]
    alone, both = predictor.predict(scan, probabilities=True), Predictor([copy, copy], device="cpu").predict(scan)
    assert list(alone.quality["dice"]) == [*HELD, "mean"] == list(both.quality["dice"])
    assert np.array_equal(alone.mask, both.mask)
    evidence, ml = alone.evidence[0], 1.2 * 1.5 / 1000
    inside = np.isin(alone.mask, HELD["whole tumor"])
    assert evidence.volume[0] == pytest.approx((~inside).sum() * ml)
    for r, held in enumerate(HELD.values()):
        p, there = alone.probabilities[r].astype(float), np.isin(alone.mask, held)
        sure = p[p > 0.5].sum()
        scores = sure / (p > 0.5).sum(), 2 * sure / ((p > 0.5).sum() + p.sum()), (p * (1 - p)).sum() / (p > 0.5).sum()
        assert evidence.probability[r + 1, :3] == pytest.approx(
            scores, rel=1e-4
        )  # the grids differ in their axes alone
        assert evidence.volume[r + 1] == pytest.approx(there.sum() * ml)
        parts, number = ndimage.label(there, np.ones((3, 3, 3)))
        largest = np.bincount(parts[parts > 0]).max() / there.sum()
        assert evidence.shape[r + 1, :2] == pytest.approx([largest, np.log10(number)])
        assert len(evidence.features[r + 1]) and evidence.intensity.shape == (4, 8)


def test_mirrored_passes_average_the_regions(run: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((copy / "configs" / "plan.json").read_text())
    (copy / "configs" / "plan.json").write_text(json.dumps(plan | {"patch_size": [EDGE] * 3, "flip_axes": [0]}))
    predictor = Predictor(copy, device="cpu", tta=True)
    prepared = predictor.prepare(predictor.find_scans([data / "imagesTr"])[0])
    image, network = prepared.images[0][0].as_tensor()[None], predictor.models[0].network
    with torch.inference_mode():
        expected = (network(image).sigmoid() + network(image.flip(2)).sigmoid().flip(2)) / 2
    found = predictor.segment(prepared, probabilities=True).probabilities
    assert np.sort(found, axis=None) == pytest.approx(np.sort(expected.numpy(), axis=None), abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("joint", [("sampling", "hard")]),
        ("semi", [("unlabelled_from", 0.0)]),
        ("two_stage", [("positives", "same_voxel")]),
    ],
)
def test_other_recipes_train(data: Path, tmp_path: Path, recipe: str, more: list[Any]) -> None:
    epochs = 3 if recipe == "two_stage" else 1
    rows = train(data, tmp_path / "run", recipe, epochs, [("plan::steps_per_epoch", 2), *more], labels=3)
    assert all(np.isfinite(float(row["loss"])) for row in rows) and float(rows[-1]["segmentation"]) > 0
    scores = json.loads((tmp_path / "run/eval/metrics.json").read_text())["summary"]["classes"]
    assert list(scores) == list(HELD)


def test_fine_tuning_for_other_structures(data: Path, tmp_path: Path) -> None:
    """From a network for three regions to one for a class: every layer but the last starts from its weights."""
    regions, run, tuned = read_dataset(data), tmp_path / "run", tmp_path / "tuned"
    small = [("plan::steps_per_epoch", 2), ("plan::patch_size", [16, 16, 16])]
    prepare_run(regions, split_cases(regions), run, settings=small, device="cpu")
    before = build_network(json.loads((run / "configs" / "plan.json").read_text())["network_def"]).state_dict()
    (run / "models").mkdir(exist_ok=True)
    torch.save(before, run / "models" / "model.pt")
    shutil.copytree(data, tmp_path / "data")
    description = tmp_path / "data" / "dataset.json"
    content = json.loads(description.read_text())
    content.pop("regions_class_order", None)
    description.write_text(json.dumps(content | {"labels": {"background": 0, "any": 1}}))
    for path in (tmp_path / "data" / "labelsTr").iterdir():
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image((label.get_fdata() > 0).astype(np.uint8), label.affine), path)
    dataset = read_dataset(tmp_path / "data")
    prepare_run(dataset, split_cases(dataset), tuned, init=run, settings=small, device="cpu")
    definition = json.loads((tuned / "configs" / "plan.json").read_text())["network_def"]
    torch.manual_seed(7)
    own = build_network(definition).state_dict()
    torch.manual_seed(7)
    after = load_initial(build_network(definition), run / "models" / "model.pt").state_dict()
    last = [name for name in after if after[name].shape != before[name].shape]
    assert {len(after[name]) for name in last} == {2} and len(last) == 2  # weight and bias
    assert all(torch.equal(after[name], own[name] if name in last else before[name]) for name in after)


def test_fine_tuning_needs_outputs_that_can_change(run: Path) -> None:
    plan = json.loads((run / "configs" / "plan.json").read_text())
    needed = plan | {"labels": {"background": 0, "any": 1}}
    del needed["regions"], needed["regions_class_order"]
    with pytest.raises(ConfigError, match=r'run has 3 outputs, this data set needs 2, and there is no "out_channels"'):
        inherit(needed, run)
    with pytest.raises(ConfigError, match=r"this data set has a, b\. Choose one with as many"):
        inherit(needed | {"channels": ["a", "b"]}, run)
