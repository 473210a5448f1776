"""Names that spreadsheets and Markdown would take for something else."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from medseg_supcon.bundle import write_model_card
from medseg_supcon.files import write_csv
from medseg_supcon.text import counted, markdown_text, suggestion


def test_formulas_in_a_table_are_text_and_numbers_are_numbers(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+SUM(A1)", "-x", "@x", "\tx", "\rx", "a=b", "scan-1"]
    rows = [{"=name": name, "value": value} for name, value in zip(names, range(-4, 4), strict=True)]
    rows += [{"=name": "-0.5", "value": -0.5}, {"=name": None, "value": None}]
    write_csv(tmp_path / "t.csv", ["=name", "value"], rows)
    with (tmp_path / "t.csv").open(newline="") as stream:
        (head, *body) = csv.reader(stream)
    assert head == ["'=name", "value"]
    assert [row[0] for row in body] == [*(f"'{name}" for name in names[:6]), "a=b", "scan-1", "-0.5", ""]
    assert [row[1] for row in body] == [*map(str, range(-4, 4)), "-0.5", ""]


def test_markdown_shows_names_as_they_are() -> None:
    text = markdown_text("a|b\r\n# `rm` <script>alert(1)</script> [x](javascript:y) *z*")
    assert "\n" not in text and "<" not in text.replace("&lt;", "")
    for sign in "|`[]*":
        assert text.count(sign) == text.count(f"\\{sign}"), sign
    assert markdown_text(None) is None and markdown_text(-1.5) == -1.5


def test_words() -> None:
    assert counted(0, "epoch") == "0 epochs"
    assert suggestion(3, ["a"]) == "Known: a."


def test_a_model_card_shows_class_names_as_they_are(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    plan = json.loads((run / "configs" / "plan.json").read_text())
    names = dict(
        zip(
            ["<script>alert(1)</script>|`x`\n# y", *list(plan["labels"])[1:]],
            plan["labels"].values(),
            strict=True,
        )
    )
    plan |= {"labels": names, "name": "a|<b>\n# c"}
    (run / "configs" / "plan.json").write_text(json.dumps(plan))
    write_model_card(run)
    card = (run / "docs" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "\n# y" not in card and "\n# c" not in card
    row = next(line for line in card.splitlines() if "script" in line)
    assert row.replace("\\|", "").count("|") == 4
