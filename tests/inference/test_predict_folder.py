"""Many scans into a folder: the manifest, skipping, and nothing lost whatever fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from toy_runs import blobs, plan_of, save_nifti, threshold_weights

from medseg_supcon.errors import DataError, RunError
from medseg_supcon.inference import Predictor


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(3):
        save_nifti(tmp_path / "scans" / f"s{number}.nii.gz", blobs((12, 10, 9), number), np.diag([0.5, 2, 3, 1.0]))
    return tmp_path / "scans"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_manifest(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    predictor = Predictor(threshold_run, device="cpu")
    manifest = predictor.run([scans], tmp_path / "out", progress=lambda i, n, e: calls.append((i, n, e["name"])))
    assert calls == [(1, 3, "s0"), (2, 3, "s1"), (3, 3, "s2")]
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    digest = hashlib.sha256((threshold_run / "models" / "model.pt").read_bytes()).hexdigest()
    assert manifest["models"] == [{"name": "run", "sha256": digest}]
    assert manifest["packages"]["torch"] == torch.__version__
    for entry in manifest["scans"]:
        mask = np.asarray(nib.load(tmp_path / "out" / f"{entry['name']}.nii.gz").dataobj)
        assert entry["status"] == "done"
        assert entry["spacing_mm"] == [0.5, 2.0, 3.0]
        for name, value in (("organ", 4), ("lesion", 255)):
            label, where = entry["labels"][name], np.argwhere(mask == value)
            assert label["value"] == value
            assert label["voxels"] == len(where)
            assert label["volume_ml"] == pytest.approx(len(where) * 3 / 1000)
            edges = bool(((where == 0) | (where == np.array(mask.shape) - 1)).any())
            assert label["touches_border"] == edges


def test_finished_scans_are_skipped_and_overwrite_redoes(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    predictor, out = Predictor(threshold_run, device="cpu"), tmp_path / "out"
    predictor.run([scans / "s0.nii.gz"], out)
    before = (out / "s0.nii.gz").stat().st_mtime_ns
    manifest = predictor.run([scans], out)
    assert [entry["status"] for entry in manifest["scans"]] == ["skipped", "done", "done"]
    assert manifest["scans"][0]["labels"]  # kept from the first call
    assert manifest["scans"][0]["warnings"] == []
    assert (out / "s0.nii.gz").stat().st_mtime_ns == before
    manifest = predictor.run([scans / "s0.nii.gz"], out, overwrite=True)
    assert manifest["summary"] == {"done": 1, "skipped": 0, "failed": 0}
    assert (out / "s0.nii.gz").stat().st_mtime_ns > before
    names = [entry["name"] for entry in json.loads((out / "manifest.json").read_text())["scans"]]
    assert sorted(names) == ["s0", "s1", "s2"]


def test_a_mask_of_another_model_is_kept_and_said_so(
    make_run: Callable[..., Path], threshold_run: Path, scans: Path, tmp_path: Path
) -> None:
    Predictor(threshold_run, device="cpu").run([scans], tmp_path / "out")
    other = Predictor(make_run("other", seed=3), device="cpu")
    entry = other.run([scans], tmp_path / "out")["scans"][0]
    assert entry["status"] == "skipped"
    assert entry["warnings"] == ["the mask already existed and was made by another model"]
    assert other.run([scans], tmp_path / "out", overwrite=True)["summary"]["done"] == 3
    assert other.run([scans], tmp_path / "out")["scans"][0]["warnings"] == []


@pytest.mark.parametrize(
    ("change", "tta", "said"),
    [
        ({"spacing": [1.0, 1.0, 2.0]}, False, True),
        ({"keep_largest": ["organ"]}, False, True),
        ({"smallest_mm3": {"organ": 5.0}}, False, True),
        ({"inference": {"overlap": 0.25, "sw_batch_size": 2}}, False, True),
        ({"intensity": [{"_target_": "NormalizeIntensityd", "keys": "image"}]}, False, True),
        ({}, True, True),
        ({}, False, False),
        # These decide no mask.
        ({"epochs": 7, "batch_size": 3}, False, False),
        ({"inference": {"overlap": 0.5, "sw_batch_size": 1}}, False, False),
        ({"flip_axes": []}, True, False),
    ],
)
def test_a_mask_made_with_other_settings_is_kept_and_said_so(
    threshold_run: Path, scans: Path, tmp_path: Path, change: dict[str, Any], tta: bool, said: bool
) -> None:
    """The same weights: a plan edited since, or --tta, gives other masks."""
    scan, out = scans / "s0.nii.gz", tmp_path / "out"
    Predictor(threshold_run, device="cpu").run([scan], out)
    (threshold_run / "configs" / "plan.json").write_text(json.dumps(plan_of(**change)))
    (entry,) = Predictor(threshold_run, device="cpu", tta=tta).run([scan], out)["scans"]
    assert entry["status"] == "skipped"
    note = "the mask already existed and was made with other settings (plan.json or --tta)"
    assert entry["warnings"] == ([note] if said else [])


def test_a_failure_does_not_hide_what_made_the_mask_that_stays(
    make_run: Callable[..., Path], threshold_run: Path, scans: Path, tmp_path: Path
) -> None:
    """Another model fails on a scan that has a mask: the manifest still says that the first model made it."""
    scan, out = scans / "s0.nii.gz", tmp_path / "out"
    Predictor(threshold_run, device="cpu").run([scan], out)
    other, content = Predictor(make_run("other", seed=3), device="cpu"), scan.read_bytes()
    scan.write_bytes(b"broken")
    assert other.run([scan], out, overwrite=True)["summary"]["failed"] == 1
    written = json.loads((out / "manifest.json").read_text())
    assert sorted(entry["status"] for entry in written["scans"]) == ["done", "failed"]
    scan.write_bytes(content)
    (entry,) = other.run([scan], out)["scans"]
    assert entry["warnings"] == ["the mask already existed and was made by another model"]
    assert entry["labels"]
    assert len(json.loads((out / "manifest.json").read_text())["scans"]) == 1


def test_probabilities(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    predictor, out = Predictor(threshold_run, device="cpu"), tmp_path / "out"
    predictor.run([scans], out)
    # Masks alone are not all that was asked for.
    assert predictor.run([scans], out, probabilities=True)["summary"]["done"] == 3
    source, scores = nib.load(scans / "s1.nii.gz"), nib.load(out / "probabilities" / "s1.nii.gz")
    assert scores.shape == (12, 10, 9, 3)
    assert scores.get_data_dtype() == np.float32
    np.testing.assert_allclose(scores.affine, source.affine)
    values = scores.get_fdata()
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
    mask = np.asarray(nib.load(out / "s1.nii.gz").dataobj)
    np.testing.assert_array_equal(np.array([0, 4, 255])[values.argmax(-1)], mask)
    assert predictor.run([scans], out, probabilities=True)["summary"]["skipped"] == 3


def test_a_failing_scan_is_reported_and_the_rest_go_on(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "s1.nii.gz").write_bytes(b"broken")
    out = tmp_path / "out"
    manifest = Predictor(threshold_run, device="cpu").run([scans, tmp_path / "missing.nii"], out)
    assert files(out) == {"manifest.json", "quality.csv", "s0.nii.gz", "s2.nii.gz"}
    assert manifest["summary"] == {"done": 2, "skipped": 0, "failed": 2}
    errors = {entry["name"]: entry["error"] for entry in manifest["scans"] if entry["status"] == "failed"}
    assert set(errors) == {"s1", "missing"}
    assert str(scans / "s1.nii.gz") in errors["s1"] and "damaged" in errors["s1"]
    assert "no such file" in errors["missing"]


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EROFS, os.strerror(errno.EROFS))],
)
def test_a_mask_that_cannot_be_written_leaves_nothing(
    threshold_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    """The disk fills up while the second mask is written."""
    real, out = os.replace, tmp_path / "out"

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "s1.nii.gz":
            raise fault
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    manifest = Predictor(threshold_run, device="cpu").run([scans], out)
    assert [entry["status"] for entry in manifest["scans"]] == ["done", "failed", "done"]
    assert os.strerror(fault.errno or 0) in manifest["scans"][1]["error"]
    assert files(out) == {"manifest.json", "quality.csv", "s0.nii.gz", "s2.nii.gz"}


def test_a_full_disk_halfway_through_a_file(
    threshold_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"manifest\.json could not be written \(No space left"):
        Predictor(threshold_run, device="cpu").run([scans], out)
    assert files(out) == set()


def test_ctrl_c_keeps_what_is_finished_and_no_partial_file(
    threshold_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, out = Predictor(threshold_run, device="cpu"), tmp_path / "out"
    segment, calls = predictor.segment, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(*arguments)

    monkeypatch.setattr(predictor, "segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predictor.run([scans], out)
    assert files(out) == {"manifest.json", "s0.nii.gz", "s1.nii.gz"}
    statuses = [entry["status"] for entry in json.loads((out / "manifest.json").read_text())["scans"]]
    assert statuses == ["done", "done"]
    monkeypatch.undo()
    manifest = predictor.run([scans], out)
    assert manifest["scans"][1]["warnings"] == []
    assert [entry["status"] for entry in manifest["scans"]] == ["skipped", "skipped", "done"]


def test_ctrl_c_while_a_scan_is_reported_lists_it_once(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Predictor(threshold_run, device="cpu").run([scans], out, progress=_raise(KeyboardInterrupt()))
    assert [entry["name"] for entry in json.loads((out / "manifest.json").read_text())["scans"]] == ["s0"]


def test_a_folder_that_cannot_be_written_to(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="masks cannot be written there"):
        Predictor(threshold_run, device="cpu").run([scans], tmp_path / "file" / "out")


def test_a_mask_never_replaces_its_scan(threshold_run: Path, scans: Path) -> None:
    before = {path: path.read_bytes() for path in scans.iterdir()}
    for overwrite in (False, True):
        manifest = Predictor(threshold_run, device="cpu").run([scans], scans, overwrite=overwrite)
        assert manifest["summary"]["failed"] == 3
        assert "would replace the scan" in manifest["scans"][0]["error"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_unexpected_fault_of_one_scan(
    threshold_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(threshold_run, device="cpu")
    prepare = predictor.prepare
    monkeypatch.setattr(
        predictor,
        "prepare",
        lambda scan: _raise(ZeroDivisionError("odd"))() if scan.name == "s0" else prepare(scan),
    )
    manifest = predictor.run([scans], tmp_path / "out")
    assert [entry["status"] for entry in manifest["scans"]] == ["failed", "done", "done"]
    assert "ZeroDivisionError: odd" in manifest["scans"][0]["error"]


def test_keep_largest(make_run: Callable[..., Path], tmp_path: Path) -> None:
    scan = np.zeros((20, 20, 10), dtype=np.float32)
    scan[1:6, 1:6, 1:6] = 1.5
    scan[6, 6, 6] = 1.5  # touches by a corner: the same component
    scan[12:15, 12:15, 2:5] = 1.5
    scan[1:3, 15:18, 1:3] = 2.5
    scan[10, 2, 8] = 2.5
    path = save_nifti(tmp_path / "a.nii", scan)
    mask = Predictor(make_run(weights=threshold_weights(), keep_largest=["organ"]), device="cpu").predict(path).mask
    assert (mask == 4).sum() == 126
    assert mask[12:15, 12:15, 2:5].max() == 0
    assert (mask == 255).sum() == 13  # both of the lesion's


def test_smallest_components_in_mm3(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Voxels of 0.5 x 1 x 2 = 1 mm3: a component of 8 stays if the smallest volume is 8, and goes if it is 8.1."""
    scan = np.zeros((20, 20, 10), dtype=np.float32)
    scan[1:6, 1:6, 1:6] = 1.5  # 125
    scan[12:14, 12:14, 2:4] = 1.5  # 8
    scan[14, 14, 4] = 1.5  # the ninth, by a corner
    scan[16:18, 2:4, 2:4] = 1.5  # 8
    scan[1:3, 15:18, 1:3] = 2.5  # 12 of another class
    path = save_nifti(tmp_path / "a.nii", scan, np.diag([0.5, 1.0, 2.0, 1.0]))
    spacing, weights = [0.5, 1.0, 2.0], threshold_weights()
    for number, (smallest, left) in enumerate({8.0: 142, 8.1: 134, 9.5: 125, 126.0: 0}.items()):
        run = make_run(f"run{number}", weights=weights, spacing=spacing, smallest_mm3={"organ": smallest})
        mask = Predictor(run, device="cpu").predict(path).mask
        assert ((mask == 4).sum(), (mask == 255).sum()) == (left, 12)


def test_empty_masks_and_constant_scans_are_warned_of(threshold_run: Path, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", np.zeros((6, 6, 6), dtype=np.int16), codes=(0, 0))
    warnings = Predictor(threshold_run, device="cpu").predict(path).warnings
    assert any("mask is empty" in w for w in warnings)
    assert any("all voxels have one value" in w for w in warnings)
    assert any("no orientation" in w for w in warnings)


def test_written_files_are_reproducible(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    predictor = Predictor(threshold_run, device="cpu")
    for out in ("x", "y"):
        predictor.run([scans], tmp_path / out)
    assert (tmp_path / "x" / "s0.nii.gz").read_bytes() == (tmp_path / "y" / "s0.nii.gz").read_bytes()


def test_a_mask_of_another_scan_is_not_taken_for_finished(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    """Files of two patients with the same name, predicted one after the other into one folder."""
    predictor, out = Predictor(threshold_run, device="cpu"), tmp_path / "out"
    predictor.run([scans / "s0.nii.gz"], out)
    before = (out / "s0.nii.gz").read_bytes()
    for array, affine in (
        (blobs((12, 10, 8)), np.diag([0.5, 2, 3, 1.0])),
        (blobs((12, 10, 9)), np.diag([0.5, 2, 3.5, 1.0])),
    ):
        other = save_nifti(tmp_path / "other" / "s0.nii.gz", array, affine)
        manifest = predictor.run([other, scans / "s1.nii.gz"], out)
        assert "belongs to another scan" in manifest["scans"][0]["error"]
        assert str(other) in manifest["scans"][0]["error"]
        assert (out / "s0.nii.gz").read_bytes() == before
        # Its probabilities are not there, which is no reason to replace what is.
        assert predictor.run([other], out, probabilities=True)["summary"]["failed"] == 1
        assert (out / "s0.nii.gz").read_bytes() == before
    assert predictor.run([other], out, overwrite=True)["summary"]["done"] == 1


def test_scans_of_one_name_are_refused_however_they_were_found(threshold_run: Path, tmp_path: Path) -> None:
    """Found one folder at a time, they come together only here, and the last mask would be all that is left."""
    predictor = Predictor(threshold_run, device="cpu")
    one, two = (save_nifti(tmp_path / name / "a.nii", blobs((6, 5, 4))) for name in "xy")
    for given in (
        [*predictor.find_scans([one]), *predictor.find_scans([two])],
        [*predictor.find_scans([one]), two],
    ):
        manifest = predictor.run(given, tmp_path / "out")
        assert [entry["status"] for entry in manifest["scans"]] == ["failed", "failed"]
        assert "Rename one" in manifest["scans"][0]["error"]
    assert files(tmp_path / "out") == {"manifest.json"}
    twice = [*predictor.find_scans([one]), *predictor.find_scans([one]), one]
    assert predictor.run(twice, tmp_path / "out")["summary"] == {"done": 1, "skipped": 0, "failed": 0}


def test_one_prediction_is_of_one_scan(threshold_run: Path, scans: Path, tmp_path: Path) -> None:
    predictor = Predictor(threshold_run, device="cpu")
    with pytest.raises(DataError, match=r"contains 3 scans \(s0, s1, s2, \.\.\.\), expected one"):
        predictor.predict(scans)
    save_nifti(tmp_path / "single" / "a.nii", blobs((6, 5, 4)))
    assert predictor.predict(tmp_path / "single").name == "a"


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[:-4]])
def test_a_half_mask_is_redone(
    threshold_run: Path, scans: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    predictor, out = Predictor(threshold_run, device="cpu"), tmp_path / "out"
    predictor.run([scans], out)
    whole = (out / "s1.nii.gz").read_bytes()
    (out / "s1.nii.gz").write_bytes(damage(whole))
    manifest = predictor.run([scans], out)
    assert manifest["summary"] == {"done": 1, "skipped": 2, "failed": 0}
    assert (out / "s1.nii.gz").read_bytes() == whole


def test_names_as_long_as_names_can_be_and_of_no_text(threshold_run: Path, tmp_path: Path) -> None:
    names = ["n" * 248, "a scan, with blanks", "Schädel 頭", "two\nlines", os.fsdecode(b"no\xfftext")]
    scans = tmp_path / "scans"
    for name in names:
        save_nifti(scans / f"{name}.nii", blobs((6, 5, 4))).rename(scans / f"{name}.nii")
    manifest = Predictor(threshold_run, device="cpu").run([scans], tmp_path / "out")
    assert manifest["summary"] == {"done": 5, "skipped": 0, "failed": 0}
    assert {file.name for file in (tmp_path / "out").glob("*.nii.gz")} == {f"{name}.nii.gz" for name in names}
    (scans / f"{'n' * 248}.nii").rename(scans / f"{'n' * 251}.nii")  # with .nii.gz it is too long for a mask
    manifest = Predictor(threshold_run, device="cpu").run([scans], tmp_path / "out")
    failed = [entry for entry in manifest["scans"] if entry["status"] == "failed"]
    assert len(failed) == 1 and "Give the scan a shorter name" in failed[0]["error"]


@pytest.mark.parametrize("size", [1e-5, 5e3])
def test_a_voxel_size_that_cannot_be(make_run: Callable[..., Path], tmp_path: Path, size: float) -> None:
    """Metres or microns that the header does not declare: no memory is allocated for a grid of absurd size."""
    predictor = Predictor(make_run(orientation="PIL", spacing=[1.0, 1.0, 2.0]), device="cpu")
    good = save_nifti(tmp_path / "good.nii", blobs((8, 9, 7)))
    odd = save_nifti(tmp_path / "odd.nii", blobs((8, 9, 7)), np.diag([size, size, size, 1.0]))
    manifest = predictor.run([odd, good], tmp_path / "out")
    assert manifest["summary"] == {"done": 1, "skipped": 0, "failed": 1}
    sentence = next(entry["error"] for entry in manifest["scans"] if entry["status"] == "failed")
    assert str(odd) in sentence and "correct it" in sentence
