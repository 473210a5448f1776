"""A plan follows its rules, its values work in MONAI, and a broken one is refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.nets import DynUNet
from monai.transforms import Compose, Invertd, Spacingd

from medseg_supcon.datasets import CaseFingerprint, Dataset, Fingerprint, fingerprint, read_dataset
from medseg_supcon.errors import ConfigError, DataError, RunError
from medseg_supcon.networks import build_network, definition_problem
from medseg_supcon.plan import make_plan, plan_warnings, read_plan, validate_plan, write_plan

LABELS = {"background": 0, "tumour": 1, "vessel": 2}


def planned(shape, spacing=(1, 1, 1), channels=("MRI",), labels=LABELS, counts=None, **options):
    """The plan for cases of given shapes and spacings (one, or a list of each)."""
    shapes = shape if isinstance(shape, list) else [shape] * 4
    spacings = spacing if isinstance(spacing, list) else [spacing] * len(shapes)
    rng = np.random.default_rng(0)
    counts = counts or tuple(900 // 3**c for c in range(len(labels)))
    cases = tuple(
        CaseFingerprint(f"c{i}", s, mm, "RAS", counts, rng.normal(50, 10, (len(channels), 500)).astype("f4"))
        for i, (s, mm) in enumerate(zip(shapes, spacings, strict=True))
    )
    dataset = Dataset(None, "toy", (), tuple(channels), dict(labels))
    return make_plan(Fingerprint(cases, tuple(channels), tuple(labels)), dataset, **options)


def build(plan):
    parser = ConfigParser({"network": plan["network_def"]})
    return parser.get_parsed_content("network")


def test_hippocampus_like_scans_on_a_cpu():
    plan = planned((35, 50, 36))
    assert plan["patch_size"] == [40, 56, 40]
    assert plan["spacing"] == [1, 1, 1]
    leaky = ("leakyrelu", {"negative_slope": 0.01, "inplace": True})
    by_hand = DynUNet(
        3,
        1,
        3,
        [3] * 4,
        [1, 2, 2, 2],
        [2] * 3,
        filters=[16, 32, 64, 128],
        norm_name=("instance", {"affine": True}),
        act_name=leaky,
    )
    assert repr(build(plan)) == repr(by_hand)
    assert (plan["batch_size"], plan["steps_per_epoch"]) == (2, 50)
    assert plan["intensity"] == [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}]


def test_network_is_the_same_for_stock_monai_and_without_evaluation():
    """The same modules, and the same random weights: the parts are made in the same order."""
    plan, weights = planned((64, 64, 20), (1, 1, 4)), []
    assert definition_problem(plan["network_def"]) is None
    for make in (build, lambda plan: build_network(plan["network_def"])):
        torch.manual_seed(0)
        weights.append(make(plan).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_spacing_is_the_median_unless_anisotropic():
    fine = [(0.8, 1.0, 1.5), (1.0, 1.2, 1.5), (0.9, 1.1, 1.5)]
    assert planned([(60, 60, 60)] * 3, fine)["spacing"] == [0.9, 1.1, 1.5]
    coarse = [(1.0, 1.0, z) for z in (3.0, 5.0, 5.0, 6.0, 8.0)]
    expected = np.percentile([3, 5, 5, 6, 8], 10)
    assert planned([(60, 60, 12)] * 5, coarse)["spacing"] == [1, 1, pytest.approx(expected)]


def test_anisotropic_scans_get_anisotropic_strides_and_patches():
    plan = planned((256, 256, 24), (0.7, 0.7, 5.0))
    assert plan["network_def"]["strides"][:3] == [[1, 1, 1], [2, 2, 1], [2, 2, 1]]
    # 0.7 and 5 mm, 1.4 and 5, 2.8 and 5: only then are the slices less than twice as far apart
    assert plan["network_def"]["kernel_size"][:3] == [[3, 3, 1], [3, 3, 1], [3, 3, 3]]
    across, _, through = plan["patch_size"]
    assert across > 2 * through
    assert build(plan)(torch.zeros(1, 1, *plan["patch_size"])).shape == (1, 3, *plan["patch_size"])


def test_a_large_scan_is_coarsened_on_a_cpu_alone():
    shape, spacing = (512, 512, 400), (0.8, 0.8, 1.0)
    on_cpu, on_gpu = planned(shape, spacing), planned(shape, spacing, device="cuda", memory_gib=40)
    assert on_gpu["spacing"] == [0.8, 0.8, 1.0]
    patches = np.prod(np.multiply(shape, spacing) / on_cpu["spacing"]) / 90_000
    assert 60 < patches < 65
    assert len(set(on_cpu["spacing"])) == 1, "the finest axes are coarsened first"


def test_gpu_plans_grow_with_the_memory():
    shape = (300, 300, 300)
    small, large = (planned(shape, device="cuda", memory_gib=gib) for gib in (4, 40))
    assert np.prod(small["patch_size"]) < np.prod(large["patch_size"]) == 128**3
    assert large["batch_size"] > small["batch_size"]
    assert large["steps_per_epoch"] == 250
    assert planned((40, 50, 40), device="cuda", memory_gib=40)["patch_size"] == [40, 56, 40]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 600)] * 3),
    st.tuples(*[st.floats(0.3, 8)] * 3),
    st.sampled_from(["cpu", "cuda"]),
)
def test_every_plan_is_valid_and_its_patch_fits_network_and_budget(shape, spacing, device):
    plan = planned(shape, spacing, device=device, memory_gib=16)
    validate_plan(plan)
    patch = np.array(plan["patch_size"])
    steps = plan["network_def"]["strides"]
    divisor = np.prod([(s,) * 3 if isinstance(s, int) else s for s in steps], axis=0)
    assert not (patch % divisor).any()
    budget = 90_000 if device == "cpu" else 128**3
    assert patch.prod() <= max(budget, divisor.prod())
    needed = np.ceil(np.round(np.multiply(shape, spacing) / plan["spacing"]) / divisor) * divisor
    assert (patch <= np.maximum(needed, divisor)).all(), "no axis is longer than the scan demands"


@pytest.mark.parametrize(
    ("shape", "spacing"), [((64, 64, 1), (1, 1, 5)), ((9, 7, 5), (1, 1, 1)), ((40, 40, 12), (1, 1, 3))]
)
def test_thin_and_tiny_scans_give_a_network_that_runs(shape, spacing):
    plan = planned(shape, spacing, channels=("T1", "T2"))
    with torch.no_grad():
        assert build(plan)(torch.zeros(1, 2, *plan["patch_size"])).shape == (1, 3, *plan["patch_size"])


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (["tumour"], [0]),
        (["left atrium"], []),
        (["kidney_R", "liver"], []),
        (["Hippocampus-Right"], []),
        (["lh cortex"], []),
        (["rightLung"], []),
        (["LeftKidney"], []),
        (["RKidney"], []),
        (["LV", "RV", "cleft"], [0]),
        (["liver", "brightness", "girl"], [0]),
        (["Anterior", "Posterior"], [0]),
    ],
)
def test_mirroring_stops_where_names_tell_sides(names, flips):
    assert (
        planned((40, 40, 40), labels={"background": 0, **{n: i + 1 for i, n in enumerate(names)}})["flip_axes"] == flips
    )


def test_class_weights_are_balanced():
    plan = planned((40, 40, 40), counts=(900, 0, 100))
    assert plan["class_frequencies"] == [0.9, 0, 0.1]
    assert plan["class_weights"] == [
        pytest.approx(1000 / 2700, rel=1e-3),
        0,
        pytest.approx(1000 / 300, rel=1e-3),
    ]
    with pytest.raises(DataError, match="no structure"):
        planned((40, 40, 40), counts=(900, 0, 0))


def transforms_of(plan):
    parser = ConfigParser({"steps": plan["intensity"]})
    return Compose(parser.get_parsed_content("steps"))


def test_ct_is_clipped_and_scaled():
    plan = planned((40, 40, 40), channels=("CT",))
    values = np.random.default_rng(0).normal(50, 10, (1, 500)).astype("f4")  # the first case; all draw alike
    assert [t["_target_"] for t in plan["intensity"]] == ["ScaleIntensityRanged"]
    stats = plan["fingerprint"]["foreground_intensity"]["CT"]
    scan = np.array([-1000.0, 40, 50, 60, 3000], dtype="f4")
    expected = (np.clip(scan, stats["percentile_00_5"], stats["percentile_99_5"]) - stats["mean"]) / stats["std"]
    found = transforms_of(plan)({"image": MetaTensor(scan.reshape(1, 5, 1, 1))})["image"]
    np.testing.assert_allclose(found.ravel(), expected, atol=2e-3)
    assert stats["mean"] == pytest.approx(values.mean(), abs=1)


def test_ct_and_pet_are_treated_apart_and_stay_in_place():
    plan = planned((40, 40, 40), channels=("PET", "CT"))
    stats = plan["fingerprint"]["foreground_intensity"]["CT"]
    rng = np.random.default_rng(1)
    scan = rng.normal(40, 30, (2, 6, 5, 4)).astype("f4")
    affine = torch.diag(torch.tensor([1.0, 1, 2, 1]))
    # The last word on geometry: what Invertd restores after normalisation is the scan's own grid.
    spacing = Spacingd("image", pixdim=(1, 1, 1))
    out = Compose([spacing, *transforms_of(plan).transforms])({"image": MetaTensor(scan, affine=affine)})
    assert set(out) == {"image"}
    resampled = spacing({"image": MetaTensor(scan, affine=affine)})["image"]
    pet, ct = resampled.numpy()
    np.testing.assert_allclose(out["image"][0], (pet - pet.mean()) / pet.std(), atol=1e-3)
    low, high = stats["percentile_00_5"], stats["percentile_99_5"]
    np.testing.assert_allclose(out["image"][1], (np.clip(ct, low, high) - stats["mean"]) / stats["std"], atol=2e-3)
    assert torch.equal(out["image"].affine, resampled.affine)
    out["pred"] = out["image"].clone()
    back = Invertd("pred", spacing, orig_keys="image", nearest_interp=False)(out)["pred"]
    assert back.shape == scan.shape
    assert torch.allclose(back.affine, affine.to(back.affine.dtype))


def test_channels_of_one_name_have_a_window_each():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(50, 10, 500), rng.normal(900, 50, 500), rng.normal(0, 1, 500)]).astype("f4")
    case = CaseFingerprint("a", (40, 40, 40), (1, 1, 1), "RAS", (900, 300, 100), values)
    channels = ("CT", "CT", "CT")
    found = Fingerprint((case,), channels, tuple(LABELS))
    plan = make_plan(found, Dataset(None, "toy", (), channels, dict(LABELS)))
    stats = plan["fingerprint"]["foreground_intensity"]
    assert list(stats) == ["CT", "CT (2)", "CT (3)"]
    assert [one["mean"] for one in stats.values()] == pytest.approx(values.mean(1), abs=0.5)
    out = transforms_of(plan)({"image": MetaTensor(values.reshape(3, 500, 1, 1))})["image"].squeeze()
    low, high = np.percentile(values, [0.5, 99.5], axis=1)[..., None]
    mean, std = values.mean(1, keepdims=True), values.std(1, keepdims=True)
    np.testing.assert_allclose(out, (values.clip(low, high) - mean) / std, atol=2e-3)


def test_plans_survive_the_disk_and_stay_short(tmp_path, phantoms):
    dataset = read_dataset(phantoms)
    plan = make_plan(fingerprint(dataset), dataset)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == json.loads(json.dumps(plan))
    text = (tmp_path / "plan.json").read_text()
    assert len(text.splitlines()) < 80
    assert '  "patch_size": [' in text


BROKEN = {
    "patch_size": [
        [40, 2000, 40],
        [10**400, 8, 8],
        [40, 56],
        [40, 56, 0],
        [40.5, 56, 40],
        "40",
        None,
        [True, 8, 8],
    ],
    "spacing": [
        [1e9, 1, 1],
        [1e-9, 1, 1],
        [1, 1, float("inf")],
        [1, 1],
        [1, 1, 0],
        [1, 1, "1"],
        [1, 1, float("nan")],
    ],
    "orientation": ["RAR", "XYZ", 3, "ras"],
    "labels": [{}, {"background": 0}, {"a": 0, "b": 0}, ["a", "b"], {"a": 0, "b": "1"}],
    "ignore_label": ["none", 1],
    "channels": [[], "MRI", [3]],
    "intensity": [{}, ["NormalizeIntensityd"], None],
    "flip_axes": [[3], 0, ["x"]],
    "batch_size": [0, 1.5, "2", 1_000_000, True],
    "steps_per_epoch": [0, 10**9],
    "epochs": [-1, None],
    "class_weights": [[1, 2], [1, 1, -1], None],
    "network_def": ["UNet", None, {"spatial_dims": 3}],
    "inference": [
        {"overlap": 1, "sw_batch_size": 4},
        {"overlap": 0.5},
        [],
        {"overlap": None, "sw_batch_size": 4},
    ],
    "keep_largest": [["liver"], "tumour"],
    "smallest_mm3": [{"liver": 5}, {"background": 5}, {"tumour": 0}, {"tumour": "5"}, ["tumour"]],
    "name": [7],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values])
def test_a_plan_edited_wrongly_is_refused_by_its_key(tmp_path, key, value):
    plan = copy.deepcopy(GOOD)
    validate_plan(plan)
    plan[key] = value
    with pytest.raises(ConfigError, match=rf'plan.json: "{key}" must be'):
        validate_plan(plan)


GOOD = planned((35, 50, 36))


def test_missing_and_misspelt_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"'patch_sise'.*'patch_size'"):
        validate_plan({**GOOD, "patch_sise": [8, 8, 8]})
    with pytest.raises(ConfigError, match="'spacing' is missing"):
        validate_plan({key: value for key, value in GOOD.items() if key != "spacing"})
    with pytest.raises(ConfigError, match=r"divisible by \[16, 16, 16\].*\[48, 64, 48\]"):
        validate_plan(GOOD, divisor=[16, 16, 16])
    validate_plan(GOOD, divisor=[8, 8, 8])
    with pytest.raises(RunError, match="medseg plan"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="line 1"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(("voxels", "spacing", "lost"), [(1, 1, True), (40, 1, True), (80, 1, False), (1, 3, False)])
def test_structures_that_the_spacing_makes_vanish(voxels, spacing, lost):
    """Most cases have voxels of 3 mm; one has a structure of few voxels of `spacing` mm."""
    rng = np.random.default_rng(0)
    values = rng.normal(50, 10, (1, 500)).astype("f4")
    cases = [CaseFingerprint(f"c{i}", (40, 40, 40), (3, 3, 3), "RAS", (900, 300, 100), values) for i in range(4)]
    small = CaseFingerprint("small", (90, 90, 90), (spacing,) * 3, "RAS", (900, voxels, 0), values)
    found = Fingerprint((*cases, small), ("MRI",), tuple(LABELS))
    plan = make_plan(found, Dataset(None, "toy", (), ("MRI",), dict(LABELS)))
    assert plan["spacing"] == [3, 3, 3]
    warnings = plan_warnings(plan)
    assert len(warnings) == lost
    if lost:
        assert "'tumour' (case small: " in warnings[0] and "3 x 3 x 3 mm" in warnings[0]
    assert plan_warnings({**plan, "spacing": [spacing] * 3}) == [], "the plan's spacing decides, however it was set"
