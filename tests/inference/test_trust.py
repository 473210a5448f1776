"""Which runs predict without being trusted, and what damaged and malicious ones say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from toy_runs import UNET, blobs, plan_of, save_nifti, threshold_weights

from medseg_supcon.bundle import export_model
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.inference import Predictor
from medseg_supcon.networks import chain
from medseg_supcon.plan import plan_preprocessing

STOCK = [
    UNET,
    {**UNET, "_target_": "UNet"},
    chain(UNET, {"_target_": "torch.nn.Conv3d", "in_channels": 3, "out_channels": 3, "kernel_size": 1}),
    {**UNET, "act": ["prelu", {"init": 0.2}]},
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
    {"_target_": "torch.nn.Sequential.extend", "self": {"_target_": "os.system", "command": "touch {mark}"}},
    {"_target_": "torch.nn.modules.module.warnings.warn", "message": "{mark}"},
    {"_target_": "monai.networks.nets.ResNet", "pretrained": "{mark}"},
    json.loads('{"_target_": "torch.nn.Conv3d", "a": ' + '{"a": ' * 500 + "1" + "}" * 501),
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
    with pytest.raises(MedsegError, match=r"--trust|levels deep"):
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
    with pytest.raises(RunError, match=r"inference\.yaml: preprocessing.* --trust"):
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


PAYLOAD = "$open('{mark}', 'w')"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c: c | {"device": PAYLOAD}, "device"),
        (lambda c: c | {"more": PAYLOAD}, "more"),
        (lambda c: c | {"preprocessing": "%{folder}/other.yaml::preprocessing"}, "preprocessing"),
        (lambda c: c | {"preprocessing::transforms::0::reader": PAYLOAD}, "reader"),
        (lambda c: c | {"inferer": c["inferer"] | {"mode": "constant"}}, "inferer::mode"),
        (lambda c: {k: v for k, v in c.items() if k != "postprocessing"}, "postprocessing"),
    ],
)
@pytest.mark.parametrize("file", ["inference.yaml", "inference.json"])
def test_a_config_that_differs_is_refused_by_its_key(
    make_run: Callable[..., Path], tmp_path: Path, change: Any, names: str, file: str
) -> None:
    run, mark = make_run(), tmp_path / "mark"
    content = change(yaml.safe_load((run / "configs" / "inference.yaml").read_text()))
    (run / "other.yaml").write_text(f"preprocessing: {PAYLOAD}".replace("{mark}", str(mark)))
    text = json.dumps(content).replace("{mark}", str(mark)).replace("{folder}", str(run))
    (run / "configs" / file).write_text(text)
    with pytest.raises(RunError, match=rf"{file}: .*{names}.* pass --trust"):
        Predictor(run, device="cpu")
    with pytest.raises(RunError, match="pass --trust"):
        export_model(run, "torchscript", tmp_path / "model.ts")
    assert not mark.exists()


def test_a_config_cannot_expand_without_end(make_run: Callable[..., Path]) -> None:
    run = make_run()
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    started = time.perf_counter()
    for text in ("\n".join(lines), "a: " + "[" * 5000, "a: b\n" * 300_000):
        (run / "configs" / "inference.yaml").write_text(text)
        with pytest.raises(RunError, match=r"inference\.yaml"):
            Predictor(run, device="cpu")
    assert time.perf_counter() - started < 5


def test_plain_data_gives_what_the_config_gives(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The tensor of `plan_preprocessing` is that of the shipped inference.yaml, evaluated by MONAI."""
    window = {"a_min": 0.5, "a_max": 2.5, "b_min": -1.0, "b_max": 1.0, "clip": True}
    intensity = [
        {"_target_": "SplitDimd", "keys": "image", "output_postfixes": ["0"], "dim": 0, "keepdim": True},
        {"_target_": "ScaleIntensityRanged", "keys": "image_0", **window},
        {"_target_": "ConcatItemsd", "keys": ["image_0"], "name": "image", "dim": 0},
        {"_target_": "DeleteItemsd", "keys": ["image_0"]},
        {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True},
    ]
    run = make_run(orientation="PIL", spacing=[1.5, 0.8, 2.0], intensity=intensity)
    affine = np.array([[0, 1.3, 0.1, 2], [-0.9, 0, 0, 3], [0, 0.2, 2.0, 4], [0, 0, 0, 1]])
    scan = save_nifti(tmp_path / "a.nii", blobs((14, 12, 10)), affine)
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "inference.yaml"))
    parser["bundle_root"] = str(run)
    theirs = parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]
    ours = plan_preprocessing(plan_of(orientation="PIL", spacing=[1.5, 0.8, 2.0], intensity=intensity))(
        {"image": str(scan)}
    )["image"]
    assert ours.dtype == theirs.dtype and torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)


class Malice:
    """Its pickle runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("trust", [False, True])
def test_a_malicious_checkpoint_is_never_run(make_run: Callable[..., Path], tmp_path: Path, trust: bool) -> None:
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
        with pytest.raises(RunError, match="does not contain the weights"):
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
def test_a_plan_edited_wrongly_is_refused_by_its_key(make_run: Callable[..., Path], key: str, value: Any) -> None:
    """Before a scan is read, and in place of a fault somewhere in torch or MONAI for each of them."""
    run = make_run(weights=threshold_weights())
    (run / "configs" / "plan.json").write_text(json.dumps(plan_of(**{key: value})))
    with pytest.raises(ConfigError, match=rf'plan\.json: "{key}" must be'):
        Predictor(run, device="cpu")


def test_a_network_with_other_classes_than_the_plan(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(labels={"background": 0, "organ": 1})
    manifest = Predictor(run, device="cpu").run([save_nifti(tmp_path / "a.nii", blobs((8, 8, 8)))], tmp_path / "o")
    assert "3 channels, but the plan has 2 labels" in manifest["scans"][0]["error"]


def test_devices_that_do_not_exist(threshold_run: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(RunError, match="Try --device cpu"):
            Predictor(threshold_run, device=device)
