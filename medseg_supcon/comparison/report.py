"""A comparison for people: sentences, CSV tables, pictures, and one report as ``report.html`` and ``summary.md``."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medseg_supcon import __version__
from medseg_supcon.comparison import figures, statistics
from medseg_supcon.comparison.statistics import MEAN, compare_recipes, excludes_zero, too_few, verdict
from medseg_supcon.evaluation import EMPTY_RULE
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.text import counted, markdown_text

Row = dict[str, Any]
FEW_CASES = 10


@dataclass(frozen=True)
class Results:
    """Everything that a report is made of; rows start with the run's key: ``recipe``, ``labels``, ``seed``, ``variant``."""

    about: Row  # what was compared, as JSON values
    scores: Mapping[str, Sequence[Row]]  # condition (``clean`` first) -> a row per run, test case and class
    runs: Sequence[Row]  # a row per run: what it cost and how it ended
    histories: Sequence[Row]  # a row per run, with ``history``: the rows of its history.csv, as numbers


def write_comparison(out: Path, results: Results) -> Row:
    """Write the CSV tables, ``pictures/``, ``summary.md`` and ``report.html``; returns what they say, as JSON values."""
    about, clean, pictures = results.about, results.scores["clean"], out / "pictures"
    recipes, variants = list(about["recipes"]), about["variants"]
    compared = {  # in a grid the recipes are compared within every variant
        condition: [
            ({"variant": variant["name"]} if about["axes"] else {}) | row
            for variant in variants
            for row in compare_recipes([r for r in rows if r.get("variant", "") == variant["name"]], recipes)
        ]
        for condition, rows in results.scores.items()
    }
    differences = compared["clean"]
    headline = [row for row in differences if row["class"] == MEAN]
    degraded = [{"condition": c} | row for c, rows in results.scores.items() if c != "clean" for row in rows]
    of_means = [{"condition": c} | row for c, rows in compared.items() for row in rows if row["class"] == MEAN]
    robustness = with_changes(of_means, recipes) if degraded else []
    report: Row = {
        "about": about,
        "differences": differences,
        "robustness": robustness,
        "costs": _costs(results.runs, recipes),
        "runs": list(results.runs),
        "version": __version__,
        "caveats": caveats(about, differences, robustness),
    }
    tables = {"results": clean, "runs": results.runs, "differences": differences, "robustness": degraded}
    if about["axes"]:
        report["answers"] = _grid_answers(headline)
        report["table"] = table = statistics.grid_table(variants, results.runs, clean, headline)
        cells = [(row, recipe, of) for row in table for recipe, of in row["of"].items()]
        tables["grid"] = [{"labels": row["labels"], **row["levels"], "recipe": r, **of} for row, r, of in cells]
        figures.grid_figure(table, recipes, pictures / "grid.png")
        figures.grid_curves_figure(results.histories, variants, recipes, pictures / "grid_curves.png")
    else:
        report["answers"] = [*map(answer, headline), *on_degraded_scans(robustness)]
        report["means"] = tables["summary"] = statistics.recipe_means(clean, recipes)
        figures.efficiency_figure(report["means"], recipes, pictures / "label_efficiency.png")
        figures.differences_figure(headline, pictures / "differences.png")
        if len(about["classes"]) > 1:
            figures.differences_figure(differences, pictures / "differences_by_class.png")
        figures.learning_figure(results.histories, recipes, pictures / "learning.png")
        if degraded:
            figures.robustness_figure(robustness, recipes, pictures / "robustness.png")
    for name, rows in tables.items():
        if rows:
            write_csv(out / f"{name}.csv", [column for column in rows[0] if column != "by_seed"], rows)
    for name in ("report.html", "summary.md"):
        write_text(out / name, _render(report | {"headline": headline}, name.endswith(".html"), pictures))
    return report


def answer(row: Row) -> str:
    """Which recipe is better, by how much and how sure, in a sentence."""
    start = f"With {counted(row['labels'], 'labelled scan')}: {verdict(row)}."
    if row["difference"] is None:
        return start
    p = "" if row["p"] is None else f"p = {row['p']:.3g}, "
    number = f"{counted(row['cases'], 'test scan')}, {counted(row['seeds'], 'seed')}"
    both = f"{row['recipe']} scores {row['dice']:.4f}, {row['baseline']} {row['baseline_dice']:.4f}"
    return f"{start} {both}: {points(row['difference'])} Dice points (95 % interval {interval(row)}, {p}{number})."


def on_degraded_scans(robustness: Sequence[Row]) -> list[str]:
    """Whether a recipe differs from the baseline on degraded scans, a sentence for each recipe and budget."""
    degraded = [row for row in robustness if row["condition"] != "clean" and row["difference"] is not None]
    sentences = []
    for labels, recipe in dict.fromkeys((row["labels"], row["recipe"]) for row in degraded):
        rows = [row for row in degraded if (row["labels"], row["recipe"]) == (labels, recipe)]
        clear = [f"{points(r['difference'])} ({interval(r)}) with {r['condition']}" for r in rows if excludes_zero(r)]
        rest = ", ".join(row["condition"] for row in rows if not excludes_zero(row))
        baseline, few = rows[0]["baseline"], too_few(rows[0])
        text = f"{recipe} against {baseline} {', '.join(clear)}{few and f', {few}: too few to be sure'}"
        text += f"; no clear difference with {rest}" if rest else ""
        if not clear:
            text = f"no clear difference between {recipe} and {baseline} with {rest}"
        sentences.append(f"With {counted(labels, 'labelled scan')}, on degraded scans: {text}.")
    return sentences


def caveats(about: Row, differences: Sequence[Row], robustness: Sequence[Row] = ()) -> list[str]:
    """What a reader must know before they rely on a number; both kinds of differences are those that are shown."""
    seeds, cases = len(about["seeds"]), len(about["test"])
    clean = sum(row["class"] == MEAN and row["difference"] is not None for row in differences)
    degraded = sum(row["condition"] != "clean" and row["difference"] is not None for row in robustness)
    where = f" ({clean} on the scans as they are, {degraded} on degraded scans)" if degraded else ""
    more = ", not counting those of single classes" if len({row["class"] for row in differences}) > 2 else ""
    one = "the intervals reflect the choice of test scans, but not the randomness of training"
    few = "the intervals reflect little of the randomness of training, so they are too narrow"
    each = "even without any difference, about one 95 % interval in twenty excludes 0 by chance"
    sentences = [
        (seeds == 1, f"One seed: {one}. Another seed may reverse a small difference."),
        (1 < seeds < statistics.FEWEST_SEEDS, f"{seeds} seeds: {few}."),
        (cases < FEW_CASES, f"{counted(cases, 'test scan')}: too few to be sure about other scans."),
        (clean + degraded > 1, f"{clean + degraded} comparisons of the mean{where}{more}: {each}."),
    ]
    return [*dict.fromkeys(about["warnings"]), *(sentence for applies, sentence in sentences if applies)]


def _costs(runs: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Minutes and memory of a run of each recipe, over all its runs."""
    costs: list[Row] = []
    for recipe in dict.fromkeys(recipes):
        mine = [run for run in runs if run["recipe"] == recipe]
        total, steps = (sum(run[key] for run in mine) for key in ("minutes", "steps"))
        minutes, base = total / len(mine), costs[0]["minutes"] if costs else 0
        costs.append({
            "recipe": recipe,
            "runs": len(mine),
            "minutes": round(minutes, 2),
            "seconds_per_step": 60 * total / max(steps, 1),
            "relative_time": minutes / base if base else 1.0,
            "memory_gib": max((run["memory_gib"] for run in mine if run["memory_gib"]), default=None),
            "machine": ", ".join(sorted({run["machine"] for run in mine if run["machine"]})),
        })  # fmt: skip
    return costs


def with_changes(robustness: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Rows by budget and recipe, with the change of the recipe's and the baseline's Dice from the clean scans."""
    clean = {(r["recipe"], r["labels"], r.get("variant")): r for r in robustness if r["condition"] == "clean"}
    changed = []
    for row in sorted(robustness, key=lambda row: (row["labels"], recipes.index(row["recipe"]))):
        whole = clean[row["recipe"], row["labels"], row.get("variant")]
        pairs = {f"{key}_change": (row[key], whole[key]) for key in ("dice", "baseline_dice")}
        changed.append(row | {key: None if None in pair else pair[0] - pair[1] for key, pair in pairs.items()})
    return changed


def _grid_answers(headline: Sequence[Row]) -> list[str]:
    answers = []
    for labels, recipe in dict.fromkeys((row["labels"], row["recipe"]) for row in headline):
        rows = [row for row in headline if (row["labels"], row["recipe"]) == (labels, recipe)]
        better, worse = (sum(excludes_zero(row) == sign for row in rows) for sign in (1, -1))
        few = next((f" ({too_few(row)}: too few to be sure)" for row in rows if too_few(row)), "")
        answers.append(
            f"With {counted(labels, 'labelled scan')}, under the same settings: {recipe} is better than "
            f"{rows[0]['baseline']} in {better} of {counted(len(rows), 'variant')}, worse in {worse}; in "
            f"{len(rows) - better - worse} the interval includes 0{few}."
        )
    return answers


def interval(row: Row) -> str:
    return "-" if row["low"] is None else f"{points(row['low'])} to {points(row['high'])}"


def points(value: float | None) -> str:
    """A difference of Dice in points (hundredths), with its sign: ``+1.23``."""
    text = "-" if value is None else f"{100 * value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def settings_and_wiring(overlay: Mapping[str, Any]) -> tuple[Row, Row]:
    """What a person sets in an overlay, and what only connects parts of the configuration (``$@loss``)."""
    wiring = {key: value for key, value in overlay.items() if re.search(r"['\"][@$]", repr(value))}
    return {key: value for key, value in overlay.items() if key not in wiring}, wiring


def _render(report: Row, html: bool, pictures: Path) -> str:
    """The report in one format; names are shown as they are, whatever signs they have."""
    about = report["about"]
    with_labels = len(about["splits"]) > 1 or not about["axes"]
    levels = {variant["name"]: list(variant["levels"].values()) for variant in about["variants"]}

    def shown(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return Markup(markdown_text(value)) if plain and not html else value

    def pairs(settings: Mapping[str, Any]) -> str:
        texts = [f"{key}: {value}" for key, value in settings.items()]
        return ", ".join(t if len(t) < 110 else f"{t[:107]}..." for t in texts) or "nothing"

    options: Row = {"autoescape": True, "finalize": shown, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader(__package__), undefined=StrictUndefined, **options)
    environment.filters |= {"points": points, "interval": interval, "counted": counted, "pairs": pairs} | {
        "number": lambda value, digits=4: "-" if value is None else f"{value:.{digits}f}",
        "marked": lambda text, row: (text, ("", "up", "down")[excludes_zero(row)]),
        "p": lambda p: "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}",
        "inline": lambda name: "data:image/png;base64," + base64.b64encode((pictures / name).read_bytes()).decode(),
    }
    text = environment.get_template("report.j2").render(
        report,
        format="html.j2" if html else "markdown.j2",
        classes=list(dict.fromkeys(row["class"] for row in report["differences"])),
        # the cells that say of which budget and variant a row is
        place=lambda row: [str(row["labels"])] * with_labels + levels[row.get("variant", "")],
        place_head=["labels"] * with_labels + list(about["axes"]),
        overlays={name: settings_and_wiring(overlay) for name, overlay in about["overlays"].items()},
        levels=[(axis, level, settings) for axis, of in about["axes"].items() for level, settings in of.items()],
        empty_rule=EMPTY_RULE,
        fewest=(statistics.FEWEST_SEEDS, statistics.FEWEST_CASES),
    )
    return text if html else re.sub(r"\n{3,}", "\n\n", text)
