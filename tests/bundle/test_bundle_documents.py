"""metadata.json, model card and JSON twins are written from the run and agree with it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle.workflows import _apply_logging_file

from medseg_supcon.bundle import (
    dump_commented,
    load_commented,
    merge,
    read_recipe,
    write_metadata,
    write_model_card,
    write_twins,
)
from medseg_supcon.errors import RunError

REQUIREMENTS = Path(__file__).with_name("metadata_requirements.json")


def metadata(run: Path) -> dict[str, Any]:
    write_metadata(run)
    found: dict[str, Any] = json.loads((run / "configs" / "metadata.json").read_text())
    return found


def test_metadata_of_a_trained_run(trained_run: Path) -> None:
    found = json.loads((trained_run / "configs" / "metadata.json").read_text())
    jsonschema.validate(found, json.loads(REQUIREMENTS.read_text()))
    assert found["schema"].endswith("/meta_schema_20240725.json")
    assert found["version"] in found["changelog"]
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    outputs = found["network_data_format"]["outputs"]["pred"]
    assert list(outputs["channel_def"].values()) == list(plan["labels"])
    assert outputs["num_channels"] == len(plan["labels"])
    report = json.loads((trained_run / "eval" / "metrics.json").read_text())
    assert found["eval_metrics"]["mean_dice"] == pytest.approx(report["summary"]["mean"]["dice"], abs=5e-5)
    assert found["eval_metrics"]["cases"] == report["summary"]["cases"]


def test_metadata_against_monais_own_schema(trained_run: Path) -> None:
    if not os.environ.get("MEDSEG_META_SCHEMA"):
        pytest.skip("MEDSEG_META_SCHEMA does not name MONAI's meta_schema_20240725.json")
    schema = json.loads(Path(os.environ["MEDSEG_META_SCHEMA"]).read_text())
    jsonschema.validate(json.loads((trained_run / "configs" / "metadata.json").read_text()), schema)


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ({"bg": 0, "a": 255}, "uint8"),
        ({"bg": 0, "a": 256}, "uint16"),
        ({"bg": -1, "a": 200}, "int16"),
        ({"bg": 0, "a": 0.5}, "float32"),
    ],
)
def test_mask_type_is_the_smallest(planned_run: Callable[..., Path], labels: dict[str, float], dtype: str) -> None:
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    found = metadata(planned_run(labels=labels, network_def=network))
    masks = found["network_data_format"]["post_processed_outputs"]["pred"]
    assert (masks["dtype"], masks["value_range"]) == (dtype, [min(labels.values()), max(labels.values())])


def test_a_persons_words_are_kept_and_the_rest_follows_the_plan(planned_run: Callable[..., Path]) -> None:
    run = planned_run()
    edited = metadata(run) | {
        "authors": "A. N. Other",
        "version": "2.0.0",
        "changelog": {"2.0.0": "retrained"},
    }
    (run / "configs" / "metadata.json").write_text(json.dumps(edited | {"monai_version": "0.9"}))
    again = metadata(run)
    assert (again["authors"], again["version"], again["changelog"]) == (
        "A. N. Other",
        "2.0.0",
        {"2.0.0": "retrained"},
    )
    assert again["monai_version"] != "0.9"


def test_shape_at_n_1_is_the_patch(planned_run: Callable[..., Path]) -> None:
    shape = metadata(planned_run())["network_data_format"]["inputs"]["image"]["spatial_shape"]
    for n in (1, 2, 5):
        sizes = [eval(text, {"n": n}) for text in shape]
        assert sizes == [16 + 2 * (n - 1), 24 + 2 * (n - 1), 16 + 2 * (n - 1)]


def test_value_range_only_where_all_channels_are_clipped(planned_run: Callable[..., Path]) -> None:
    window = {"_target_": "ScaleIntensityRanged", "keys": "image", "b_min": -1.5, "b_max": 2, "clip": True}
    other = {"_target_": "NormalizeIntensityd", "keys": "image"}
    unknown: list[list[dict[str, Any]]] = [[window, other], [{**window, "clip": False}], []]
    for intensity, expected in (([window], [-1.5, 2.0]), *((steps, []) for steps in unknown)):
        image = metadata(planned_run(intensity=intensity))["network_data_format"]["inputs"]["image"]
        assert image["value_range"] == expected


def test_scores_leave_out_what_has_none(planned_run: Callable[..., Path]) -> None:
    run = planned_run()
    assert metadata(run)["eval_metrics"] == {}
    classes = {"left horn": {"dice": None, "surface_dice": 1.0}}
    (run / "eval").mkdir()
    report = {"summary": {"cases": 3, "mean": {"dice": 0.51234}, "classes": classes}}
    (run / "eval" / "metrics.json").write_text(json.dumps(report))
    assert metadata(run)["eval_metrics"] == {"cases": 3, "mean_dice": 0.5123, "left_horn_surface_dice": 1.0}


def test_card_of_a_trained_run_gives_its_figures(trained_run: Path) -> None:
    card = (trained_run / "docs" / "README.md").read_text()
    summary = json.loads((trained_run / "eval" / "metrics.json").read_text())["summary"]
    for name, of in summary["classes"].items():
        assert f"| {name} | {of['dice']:.3f} ± " in card
    for words in (
        "Not a medical device",
        "2 epochs",
        "inference.yaml",
        "evaluate.yaml",
        "train.yaml",
        "UNet",
        "curves.png",
    ):
        assert words in card
    assert "None yet" not in card
    assert "{{" not in card and "{%" not in card


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("joint", "with Dice, cross-entropy and a supervised contrastive loss"),
        ("dice_ce", "with Dice and cross-entropy on two"),
        ("semi", "pseudo-labels"),
        ("two_stage", "then cross-entropy, then Dice"),
    ],
)
def test_what_is_said_of_the_loss_is_the_recipes(planned_run: Callable[..., Path], recipe: str, says: str) -> None:
    run = planned_run()
    (run / "configs" / "metadata.json").unlink()
    tree = load_commented(run / "configs" / "train.yaml")
    merge(tree, read_recipe(recipe), "train.yaml")
    (run / "configs" / "train.yaml").write_text(dump_commented(tree))
    write_model_card(run)
    card = (run / "docs" / "README.md").read_text()
    loss = next(line for line in card.splitlines() if line.startswith("- Loss: "))
    for text in (metadata(run)["description"], f"with {loss.removeprefix('- Loss: ')}"):
        assert says in text
        assert ("contrast" in text) == (recipe != "dice_ce")
    # its stages do not weigh the contrast: a number that nothing reads is no fact about the run
    assert ("- contrast_weight: " in card) == (recipe != "two_stage")
    assert ("- temperature: 0.1" in card) == (recipe != "dice_ce") and "- seed: 0" in card


def test_card_of_an_untrained_run_says_so(planned_run: Callable[..., Path]) -> None:
    run = planned_run(ignore_label=9)
    write_model_card(run)
    card = (run / "docs" / "README.md").read_text()
    assert "this run is not trained" in card
    assert "Voxels of value 9 are not annotated" in card


def test_one_of_a_thing_is_singular(planned_run: Callable[..., Path]) -> None:
    run = planned_run()
    path = run / "configs" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 1, "steps_per_epoch": 1, "batch_size": 1}))
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "history.csv").write_text("epoch,step,seconds\n1,1,60\n")
    write_model_card(run)
    card = (run / "docs" / "README.md").read_text()
    assert "1 epoch of 1 step, with 1 scan per step" in card and "Trained: 1 epoch, 1 step, 1.0 minute," in card


def test_twins_have_equal_content(trained_run: Path) -> None:
    names = sorted(p.stem for p in (trained_run / "configs").glob("*.yaml"))
    assert {"train", "evaluate", "inference"} <= set(names)
    for name in names:
        source = (trained_run / "configs" / f"{name}.yaml").read_text()
        assert json.loads((trained_run / "configs" / f"{name}.json").read_text()) == yaml.safe_load(source)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(content=st.dictionaries(st.text("abc_", min_size=1), VALUES, max_size=4))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_config_has_an_equal_twin(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs" / "a.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    write_twins(tmp_path)
    assert json.loads((tmp_path / "configs" / "a.json").read_text(encoding="utf-8")) == content


def test_faults_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"plan\.json does not exist"):
        write_metadata(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "plan.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        write_model_card(tmp_path)
    (tmp_path / "configs" / "bad.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"bad\.yaml is not valid YAML"):
        write_twins(tmp_path)


def test_logging_conf_is_within_monais_rules(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, ignite = logging.getLogger(), logging.getLogger("ignite")
    handlers, level = root.handlers[:], root.level
    try:
        _apply_logging_file(str(trained_run / "configs" / "logging.conf"))
        logging.getLogger("ours").info("a word")
        logging.getLogger("ignite.engine.engine.SupervisedTrainer").info("too much")
        printed = capsys.readouterr()
        assert "a word" in printed.err and "too much" not in printed.err
        assert printed.out == ""
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        ignite.setLevel(logging.NOTSET)
