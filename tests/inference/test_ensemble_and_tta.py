"""Ensembles are means of probabilities; test-time augmentation is the mean over mirrorings."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from toy_runs import UNET, blobs, save_nifti

from medseg_supcon.errors import RunError
from medseg_supcon.inference import Predictor


def test_an_ensemble_is_the_mean_of_its_members(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Also if the members' grids and orientations differ."""
    runs = [
        make_run("one", network_def=UNET, seed=1),
        make_run("two", network_def=UNET, seed=2, spacing=[1.5, 1.0, 2.0], orientation="LIP"),
    ]
    path = save_nifti(tmp_path / "a.nii", blobs((18, 21, 14)), np.diag([-1.1, 0.9, 2.0, 1.0]))
    single = [Predictor(run, device="cpu").predict(path, probabilities=True).probabilities for run in runs]
    both = Predictor(runs, device="cpu").predict(path, probabilities=True)
    assert single[0] is not None and single[1] is not None and both.probabilities is not None
    assert np.abs(single[0] - single[1]).max() > 0.1
    mean = (single[0].astype(np.float64) + single[1]) / 2
    np.testing.assert_allclose(both.probabilities, mean, atol=1e-6)
    np.testing.assert_array_equal(both.mask, np.array([0, 4, 255])[both.probabilities.argmax(0)])
    np.testing.assert_array_equal(Predictor(runs, device="cpu").predict(path).mask, both.mask)


def test_one_run_with_probabilities_gives_the_mask_that_it_gives_without(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    predictor = Predictor(make_run(network_def=UNET, spacing=[1.3, 1.2, 1.1]), device="cpu")
    path = save_nifti(tmp_path / "a.nii", blobs((18, 21, 14)))
    with_scores = predictor.predict(path, probabilities=True)
    assert (with_scores.mask != predictor.predict(path).mask).sum() <= 1
    twice = Predictor([tmp_path / "run", tmp_path / "run"], device="cpu").predict(path)
    assert (with_scores.mask != twice.mask).sum() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "organ": 1, "lesion": 2}},
        {"labels": {"background": 0, "lesion": 255, "organ": 4}},  # the same names and values, other classes
        {"channels": ["CT"]},
    ],
)
def test_runs_for_different_tasks_do_not_mix(make_run: Callable[..., Path], change: dict[str, object]) -> None:
    with pytest.raises(RunError, match=r"differ in (labels|channels)"):
        Predictor([make_run("one"), make_run("two", **change)], device="cpu")


@pytest.mark.parametrize("axes", [[], [0], [0, 2]])
def test_mirrorings(make_run: Callable[..., Path], tmp_path: Path, axes: list[int]) -> None:
    """One window holds the whole scan, so that the mean can be written down."""
    run = make_run(network_def=UNET, flip_axes=axes)
    scan = blobs((16, 16, 16))
    prediction = Predictor(run, device="cpu", tta=True).predict(save_nifti(tmp_path / "a.nii", scan), True)
    network = ConfigParser({"network": UNET}).get_parsed_content("network").eval()
    network.load_state_dict(torch.load(run / "models" / "model.pt", weights_only=True))
    x, total, count = torch.from_numpy(scan)[None, None], torch.zeros(3, 16, 16, 16, dtype=torch.float64), 0
    for n in range(len(axes) + 1):
        for flips in combinations([a + 2 for a in axes], n):
            with torch.inference_mode():
                total += torch.softmax(network(x.flip(flips)).double(), 1).flip(flips)[0]
            count += 1
    assert prediction.probabilities is not None
    np.testing.assert_allclose(prediction.probabilities, (total / count).numpy(), atol=1e-4)
