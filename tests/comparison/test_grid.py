"""A grid of settings as one file: read, trained on phantoms, and its table recomputed from results.csv."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import time

import pytest
import yaml
from in_this_process import run_jobs_here
from monai.bundle import ConfigParser
from tiny_run import TINY

from medseg_supcon.bundle import is_planned, load_commented, merge, read_recipe, set_key
from medseg_supcon.cli import commands as cli
from medseg_supcon.comparison import compare, design_comparison, is_done, make_variants, read_comparison
from medseg_supcon.comparison import jobs as _jobs
from medseg_supcon.comparison import runs as _runs
from medseg_supcon.datasets import read_dataset
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.training import is_of_plan

TESTED = ["phantom_05", "phantom_06"]
GRID = {
    "recipes": {
        "plain": {"recipe": "dice_ce", "segmentation_loss::dice_weight": 0.0},
        "staged": {
            "recipe": "two_stage",
            "stage_shares": {"contrast": 0.5, "classifier": 0.5, "fine_tune": 0},
        },
    },
    "variants": {
        "optimiser": {
            "SGD": {"optimizer::_target_": "torch.optim.SGD", "learning_rate": "1e-2"},
            "Adam": {"optimizer::_target_": "torch.optim.Adam", "plan::batch_size": 1},
        }
    },
    "epochs": 2,
    "labels": [2],
    "training_score": True,
    "robustness": False,
}


def write(folder, content):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(design, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jobs, "run_jobs", run_jobs_here)
        return compare(design, out, device="cpu", say=lambda _: None)


@pytest.fixture(scope="module")
def grid(phantoms, tmp_path_factory):
    """(design, file's content, folder, what compare returned)."""
    folder = tmp_path_factory.mktemp("grid")
    said = read_comparison(write(folder, GRID), settings=dict(TINY))
    design = design_comparison(read_dataset(phantoms), said, test_cases=TESTED)
    return design, said, folder / "out", run(design, folder / "out")


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def mean(values):
    values = [float(v) for v in values]
    return math.fsum(values) / len(values)


def test_every_cell_has_its_settings(grid):
    design, _, out, _ = grid
    assert [cell.name for cell in design.cells] == [
        "plain_SGD_labels2_seed0", "staged_SGD_labels2_seed0", "plain_Adam_labels2_seed0", "staged_Adam_labels2_seed0",
    ]  # fmt: skip
    for cell in design.cells:
        config = ConfigParser.load_config_file(str(out / "runs" / cell.name / "configs" / "train.yaml"))
        plan = json.loads((out / "runs" / cell.name / "configs" / "plan.json").read_text())
        assert config["optimizer"]["_target_"] == f"torch.optim.{cell.variant.name}"
        assert config["quality"] is False  # nobody reads the quality model of a cell
        assert config["learning_rate"] == (0.01 if cell.variant.name == "SGD" else 0.003)
        assert plan["batch_size"] == (2 if cell.variant.name == "SGD" else 1)
        assert (plan["epochs"], plan["steps_per_epoch"]) == (2, 3)
        if cell.recipe.name == "plain":
            assert config["segmentation_loss"]["dice_weight"] == 0
        else:
            assert config["stage_shares"]["fine_tune"] == 0


def test_the_table_is_the_mean_of_the_results(grid):
    _, _, out, _ = grid
    results = table(out / "results.csv")
    rows = table(out / "grid.csv")
    assert [(row["optimiser"], row["recipe"]) for row in rows] == [
        ("SGD", "plain"), ("SGD", "staged"), ("Adam", "plain"), ("Adam", "staged"),
    ]  # fmt: skip
    for row in rows:
        name = f"{row['recipe']}_{row['optimiser']}_labels2_seed0"
        mine = [r["dice"] for r in results if (r["variant"], r["recipe"]) == (row["optimiser"], row["recipe"])]
        assert float(row["test_dice"]) == pytest.approx(mean(mine), abs=1e-9)
        learnt = json.loads((out / "tests" / name / "training_scans" / "metrics.json").read_text())["rows"]
        assert float(row["training_dice"]) == pytest.approx(mean(r["dice"] for r in learnt), abs=1e-9)
        history = table(out / "runs" / name / "logs" / "history.csv")
        assert float(row["validation_dice"]) == float(history[-1]["val_mean_dice"])
        if row["recipe"] == "staged":
            assert float(row["contrastive_loss"]) == float(history[0]["contrastive"]) > 0
            baseline = next(r for r in rows if (r["optimiser"], r["recipe"]) == (row["optimiser"], "plain"))
            difference = float(row["test_dice"]) - float(baseline["test_dice"])
            assert float(row["difference"]) == pytest.approx(difference, abs=1e-9)
        else:
            assert row["contrastive_loss"] == row["difference"] == ""


def test_answers_and_caveats(grid):
    found = grid[3]
    (answer,) = found["answers"]
    better, worse, unclear = re.search(r"in (\d) of 2 variants, worse in (\d); in (\d)", answer).groups()
    assert int(better) + int(worse) + int(unclear) == 2
    assert any("sets its own batch_size" in text for text in found["caveats"])


def test_the_report_stands_alone(grid):
    _, _, out, found = grid
    html, text = (out / "report.html").read_text(), (out / "summary.md").read_text()
    assert all(s.startswith("data:image/png;base64,") for s in re.findall(r'src="([^"]*)', html))
    assert len(re.findall("<img", html)) == 2 and not re.search(r'(href|src)="https?:', html)
    for word in (
        "SGD",
        "Adam",
        "contrastive loss",
        "train",
        "valid.",
        "Differences from plain",
    ):
        assert word in html, word
    assert found["answers"][0] in text and "| SGD | - |" not in text and "| Adam |" in text


def test_a_level_more_adds_to_what_is_there(grid, phantoms, tmp_path):
    _, said, out, _ = grid
    copy = shutil.copytree(out, tmp_path / "out", copy_function=shutil.copy2)
    weights = {p: p.stat().st_mtime_ns for p in copy.glob("runs/*/models/model.pt")}

    def designed(**levels):
        asked = said.model_copy(update={"variants": {"optimiser": levels}})
        return design_comparison(read_dataset(phantoms), asked, test_cases=TESTED)

    more = designed(**said.variants["optimiser"], none={})
    plans = _runs.make_plans(more, copy, "cpu", False, say=lambda _: None)
    jobs = _runs.prepare_cells(more, copy, plans)
    done = {cell.name: is_done(json.loads(job.read_text())) for job, cell in jobs.items()}
    assert done == {cell.name: "none" not in cell.name for cell in more.cells} and len(done) == 6
    assert all(is_planned(copy / "runs" / name) for name in done)
    with pytest.raises(RunError, match="own settings"):
        run(designed(SGD={"learning_rate": 0.5}), copy)
    assert {p: p.stat().st_mtime_ns for p in weights} == weights


def test_the_article_s_grid(phantoms, trained_run):
    said = read_comparison("article")
    design = design_comparison(read_dataset(phantoms), said)
    assert len(design.cells) == len({cell.name for cell in design.cells}) == 36
    assert [list(levels) for levels in said.variants.values()] == [
        ["SGD", "RMSprop", "Adam"], ["fixed", "decayed"], ["with", "without"],
    ]  # fmt: skip
    for cell in [*design.cells[:4], *design.cells[-6:]]:
        tree = load_commented(trained_run / "configs" / "train.yaml")
        merge(tree, read_recipe(cell.recipe.recipe), "train.yaml")
        for key, value in cell.own:
            assert not is_of_plan(key)  # equal budgets
            set_key(tree, key, value, "train.yaml")
        parser = ConfigParser()
        parser.read_config(tree)
        parser["bundle_root"], parser["device"] = str(trained_run), "$torch.device('cpu')"
        optimizer = parser.get_parsed_content("optimizer")
        assert type(optimizer).__name__ == cell.variant.levels["optimiser"]
        policies = parser.get_parsed_content("train::two_views").policies
        shares = [policy.transforms[0].prob for policy in policies]  # of draws that are cut and resized
        augmented = cell.variant.levels["augmentation"] == "with"
        assert shares == [1.0 if augmented else 0.0, 0.0]
        assert [len(policy.transforms) for policy in policies] == [1, 2 if augmented else 1]
        assert parser.get("lr_decay") == (cell.variant.levels["learning rate"] == "decayed")
        loss = parser.get_parsed_content("contrastive_loss").loss
        of_article = ("same_voxel", "same_class", "other_view")
        assert ((loss.positives, loss.denominator, loss.keys) == of_article) == (cell.recipe.name == "two_stage")
        assert loss.class_weights == (None if cell.recipe.name == "two_stage" else "balanced")


def test_the_command_line_s_options_go_before_the_file_s(phantoms, tmp_path, monkeypatch, capsys):
    asked = {}

    def compared(design, out, **options):
        asked.update(options, design=design)
        return {"answers": ["so it is"], "caveats": []}

    monkeypatch.setattr("medseg_supcon.comparison.compare", compared)
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    file = write(tmp_path, GRID | {"seeds": [0, 1], "validation": 0, "settings": {"temperature": "7e-2"}})

    def run_cli(*more):
        given = ["compare", str(phantoms), "--out", str(tmp_path / "out"), "--config", str(file), *more]
        monkeypatch.setattr(sys, "argv", ["medseg", *given])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    assert run_cli() == 0 and "so it is" in capsys.readouterr().out
    design, config = asked["design"], asked["design"].config
    assert (config.seeds, list(design.splits), config.epochs) == ([0, 1], [2], 2)
    assert [len(split.training) for split in design.splits.values()] == [2]
    assert (config.robustness, config.training_score, asked["workers"]) == (False, True, None)
    assert config.settings == {"temperature": 0.07} and len(design.cells) == 8
    more = [
        "--seeds",
        "5",
        "--labels",
        "3",
        "--validation",
        "0.4",
        "--epochs",
        "9",
        "--robustness",
        "--workers",
        "2",
    ]
    assert run_cli(*more, "--set", "temperature=0.2", "--recipes", "joint,two_stage") == 0
    design, config = asked["design"], asked["design"].config
    assert (config.seeds, list(design.splits), config.epochs) == ([5], [3], 9)
    assert [len(split.training) for split in design.splits.values()] == [2]
    assert (config.robustness, asked["workers"], list(design.recipes)) == (True, 2, ["joint", "two_stage"])
    assert config.settings == {"temperature": 0.2}
    for option, value in (
        ("--seeds", "0,x"),
        ("--seeds", "-1"),
        ("--seeds", "9" * 10),
        ("--labels", "0"),
        ("--recipes", "a,,b"),
    ):
        assert run_cli(option, value) == 2 and f"{option} must be a list of" in capsys.readouterr().err
    file.write_text("seeds: [0]\n")
    assert run_cli() == 2 and "at least two" in capsys.readouterr().err


def test_a_plain_list_and_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("contrast_weight: 0.5\n")
    said = read_comparison(write(tmp_path, {"recipes": ["joint", "mine.yaml"], "labels": "all"}))
    assert [(r.name, r.recipe) for r in said.recipes] == [("joint", "joint"), ("mine", str(tmp_path / "mine.yaml"))]
    assert said.labels == ["all"] and said.seeds == [0] and said.variants == {}
    assert len(make_variants({})) == 1 and make_variants({})[0].name == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe": ["joint"]}, "Did you mean recipes"),
        ({"recipes": {"a": "joint"}}, "recipes must be"),
        ({"recipes": {"a": {"contrast_weight": 1}}}, "recipes must be"),
        ({"seeds": ["one"]}, "seeds must be"),
        ({"seeds": []}, "seeds must be"),
        ({"labels": [2.5]}, "labels must be"),
        ({"epochs": "many"}, "epochs must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"validation": 1}, "validation must be a share from 0 to 0.9; found 1"),
        ({"validation": "half"}, "validation must be"),
        ({"validation": True}, "validation must be"),
        ({"robustness": "maybe"}, "robustness must be"),
        ({"variants": {"a": ["x", "y"]}}, "variants must be"),
        ({"variants": ["a"]}, "variants must be"),
        ({"labels": [0]}, "labels must be a list of whole numbers from 1, or 'all'; found \\[0\\]"),
        ({"seeds": [True]}, "seeds must be"),
        ({"settings": ["a"]}, "settings must be a mapping KEY: VALUE"),
    ],
)
def test_a_file_s_faults_are_sentences(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        read_comparison(write(tmp_path, {**GRID, **change}))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="Known by name: article"):
        read_comparison("articel")
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    for text, says in (
        ("recipes: [", "not valid YAML"),
        (f"{bomb}recipes: *a39\n", "alias"),
        ("epochs: 2\nepochs: 3\n", "'epochs' is given twice"),
        ("[" * 5000, "not valid YAML"),
        ("epochs: 2001-13-40\n", "not valid YAML"),
        ("# R\xf6ntgen\n".encode("latin-1"), "not in UTF-8"),
    ):
        (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        start = time.process_time()
        with pytest.raises(ConfigError, match=says):
            read_comparison(tmp_path / "a.yaml")
        assert time.process_time() - start < 1
        if says != "not valid YAML" or text == "recipes: [":
            with pytest.raises(ConfigError, match=says):
                read_recipe(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="has no levels"):
        make_variants({"a": {}})
    with pytest.raises(ConfigError, match="use the same folder"):
        make_variants({"a": {"x y": {}, "X/y": {}}})
