"""Which runs predict without being trusted, and what damaged and malicious ones say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import UNET, blobs, plan_of, save_nifti, threshold_weights

from medseg_supcon.bundle import export_model
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.inference import Predictor

STOCK = [
    UNET,
    {**UNET, "_target_": "UNet"},
    "$torch.nn.Sequential(monai.networks.nets.UNet(3, 1, 8, channels=(8, 8), strides=(2,)), "
    "torch.nn.Conv3d(8, 3, 1))",
    "$monai.networks.nets.BasicUNet(3, in_channels=1, out_channels=3, features=[8, 8, 8, 8, 8, 8])",
]
EVIL = [
    "$__import__('os').system('touch {mark}')",
    "$torch.nn.Sequential(*[open('{mark}', 'w')])",
    "$torch.nn.Sequential(torch.os.system('touch {mark}'))",
    "$torch.nn.Conv3d(1, 3, kernel_size=(lambda: open('{mark}', 'w') and 1)())",
    "$torch.nn.modules.module.warnings.sys.modules['os'].system('touch {mark}')",
    "$[torch.nn.Conv3d(1, 3, 1) for _ in [open('{mark}', 'w')]][0]",
    {"_target_": "os.system", "command": "touch {mark}"},
    {"_target_": "torch.load", "f": "{mark}"},
    {
        "_target_": "torch.nn.Conv3d",
        "in_channels": "$open('{mark}', 'w') and 1",
        "out_channels": 3,
        "kernel_size": 1,
    },
    {"_target_": "torch.nn.Conv3d", "_mode_": "debug"},
    {
        "_target_": "monai.networks.nets.UNet",
        "act": {"_target_": "subprocess.run", "args": ["touch", "{mark}"]},
    },
    {"_target_": "monai.networks.nets.UNet", "spatial_dims": "%{mark}::x"},
    {"_target_": "monai.bundle.run", "config_file": "{mark}"},
]


def _fill(value: Any, mark: Path) -> Any:
    return json.loads(json.dumps(value).replace("{mark}", str(mark)))


@pytest.mark.parametrize("definition", STOCK)
def test_stock_networks_need_no_trust(make_run: Callable[..., Path], definition: Any) -> None:
    Predictor(make_run(network_def=definition), device="cpu")


@pytest.mark.parametrize("definition", EVIL)
def test_a_network_definition_that_is_code_is_refused(
    make_run: Callable[..., Path], tmp_path: Path, definition: Any
) -> None:
    run, mark = make_run(), tmp_path / "mark"
    plan = plan_of(network_def=_fill(definition, mark))
    (run / "configs" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"--trust"):
        Predictor(run, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    "transform",
    [
        {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x"},
        {"_target_": "NormalizeIntensityd", "keys": "image", "divisor": "$__import__('os').getpid()"},
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 1.0},
        {"_target_": "os.NormalizeIntensityd", "keys": "image"},
        "$print",
    ],
)
def test_intensity_that_is_code_is_refused(make_run: Callable[..., Path], transform: Any) -> None:
    run = make_run()
    (run / "configs" / "plan.json").write_text(json.dumps(plan_of(intensity=[transform])))
    with pytest.raises(MedsegError, match=r"--trust|list of transform configs"):
        Predictor(run, device="cpu")


def test_a_foreign_config_runs_only_when_trusted(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    config = run / "configs" / "inference.yaml"
    # Cropping is no part of the shipped preprocessing; the way back is MONAI's own inverse then.
    crop = "    - _target_: CenterSpatialCropd\n      keys: image\n      roi_size: [8, 8, 8]\n"
    before, after = config.read_text().split("    - _target_: Spacingd", 1)
    config.write_text(before + crop + "    - _target_: Spacingd" + after)
    with pytest.raises(RunError, match=r"inference\.yaml is not the inference config"):
        Predictor(run, device="cpu")
    path = save_nifti(tmp_path / "a.nii", blobs((12, 12, 12)) + 3)
    mask = Predictor(run, device="cpu", trust=True).predict(path).mask
    assert mask.shape == (12, 12, 12)
    with pytest.raises(RunError, match="--trust"):
        export_model(run, "torchscript", tmp_path / "model.ts")
    assert export_model(run, "torchscript", tmp_path / "model.ts", trust=True)["max_abs_difference"] < 1e-4


def test_a_run_may_say_where_its_data_is(make_run: Callable[..., Path]) -> None:
    run = make_run()
    config = run / "configs" / "inference.yaml"
    lines = config.read_text().splitlines()
    free = {"amp:": "amp: false", "dataset_dir:": "dataset_dir: /data"}
    config.write_text("\n".join(free.get(line.split(" ")[0], line) for line in lines))
    assert "/data" in config.read_text()
    Predictor(run, device="cpu")


def test_a_run_of_an_earlier_version_needs_no_trust(make_run: Callable[..., Path]) -> None:
    """Its config says what the shipped one said before masks with -1 took int8."""
    run = make_run()
    config = run / "configs" / "inference.yaml"
    before = (
        '      dtype: "$np.result_type(*[np.min_scalar_type(int(v)) if v == int(v) else np.float32 for v in '
        '@label_values])"'
    )
    lines = config.read_text().splitlines()
    earlier = [before if "min_scalar_type" in line else line for line in lines]
    assert earlier != lines
    config.write_text("\n".join(earlier))
    Predictor(run, device="cpu")
    config.write_text("\n".join(earlier).replace("np.float32 for v", "np.float64 for v"))
    with pytest.raises(RunError, match="--trust"):
        Predictor(run, device="cpu")


class Malice:
    """Its pickle runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("trust", [False, True])
def test_a_malicious_checkpoint_is_never_run(
    make_run: Callable[..., Path], tmp_path: Path, trust: bool
) -> None:
    run, mark = make_run(), tmp_path / "mark"
    for write in (
        lambda file: torch.save({"weight": Malice(mark)}, file),
        lambda file: file.write_bytes(pickle.dumps(Malice(mark))),
    ):
        write(run / "models" / "model.pt")
        with pytest.raises(RunError, match=r"model\.pt"):
            Predictor(run, device="cpu", trust=trust)
        assert not mark.exists()


def test_damaged_and_unfit_weights(make_run: Callable[..., Path]) -> None:
    run = make_run()
    file = run / "models" / "model.pt"
    whole = file.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-50]):
        file.write_bytes(content)
        with pytest.raises(RunError, match=r"model\.pt"):
            Predictor(run, device="cpu")
    for state in ({"weight": torch.zeros(2)}, [1, 2], {"weight": torch.zeros(3, 1, 1, 1, 1)}):
        torch.save(state, file)
        with pytest.raises(RunError, match="does not hold the weights"):
            Predictor(run, device="cpu")


@pytest.mark.parametrize("file", ["configs/plan.json", "configs/inference.yaml", "models/model.pt"])
def test_an_incomplete_run(make_run: Callable[..., Path], file: str) -> None:
    run = make_run()
    (run / file).unlink()
    with pytest.raises(RunError, match="is missing"):
        Predictor(run, device="cpu")


def test_a_broken_plan(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    (run / "configs" / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Predictor(run, device="cpu")
    plan = plan_of()
    del plan["spacing"], plan["labels"]
    (run / "configs" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="'labels' is missing"):
        Predictor(run, device="cpu")
    shutil.rmtree(run)
    with pytest.raises(RunError, match="is missing"):
        Predictor(run, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing", "wide"),
        ("spacing", [1.0, 1.0]),
        ("patch_size", [16, 16]),
        ("inference", {}),
        ("inference", {"overlap": 0.5, "sw_batch_size": 0}),
        ("keep_largest", "organ"),
        ("flip_axes", [5]),
        ("intensity", ["ScaleIntensityd"]),
    ],
)
def test_a_plan_edited_wrongly_is_refused_by_its_key(
    make_run: Callable[..., Path], key: str, value: Any
) -> None:
    """Before a scan is read, and in place of a fault somewhere in torch or MONAI for each of them."""
    run = make_run(weights=threshold_weights())
    (run / "configs" / "plan.json").write_text(json.dumps(plan_of(**{key: value})))
    with pytest.raises(ConfigError, match=rf'plan\.json: "{key}" must be'):
        Predictor(run, device="cpu")


def test_a_network_with_other_classes_than_the_plan(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(labels={"background": 0, "organ": 1})
    manifest = Predictor(run, device="cpu").run(
        [save_nifti(tmp_path / "a.nii", blobs((8, 8, 8)))], tmp_path / "o"
    )
    assert "3 channels and the plan names 2 labels" in manifest["scans"][0]["error"]


def test_devices_that_do_not_exist(threshold_run: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(RunError, match="Try --device cpu"):
            Predictor(threshold_run, device=device)
