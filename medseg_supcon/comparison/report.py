"""A comparison for people: sentences, CSV tables, pictures, and one report as ``report.html`` and ``summary.md``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from medseg_supcon import __version__
from medseg_supcon.comparison import figures
from medseg_supcon.comparison.results import (
    RUN_SCORES,
    Results,
    best_variants,
    grid_table,
    level_means,
    means_of_tests,
)
from medseg_supcon.comparison.statistics import (
    FEWEST_CASES,
    FEWEST_SEEDS,
    LEFT_OUT_RULE,
    MEAN,
    P_RULE,
    compare_recipes,
    excludes_zero,
    recipe_means,
    too_few,
    verdict,
)
from medseg_supcon.evaluation import EMPTY_RULE
from medseg_supcon.files import write_csv, write_text
from medseg_supcon.text import counted, markdown_text

Row = dict[str, Any]
FEW_CASES = 10
TITLES = dict(zip(RUN_SCORES, ("loss", "train", "valid.", "test"), strict=True))


def write_comparison(out: Path, results: Results) -> Row:
    """Write the CSV tables, ``pictures/``, ``summary.md`` and ``report.html``.

    Returns:
        everything that the report says, as JSON values.
    """
    about, clean, pictures = results.about, results.scores["clean"], out / "pictures"
    recipes = list(about["recipes"])
    differences = _compare(clean, about)
    degraded = {c: rows for c, rows in results.scores.items() if c != "clean"}
    robustness = [
        {"condition": condition} | row
        for condition, rows in (results.scores if degraded else {}).items()
        for row in _compare(rows, about)
        if row["class"] == MEAN
    ]
    report: Row = {
        "about": about,
        "differences": differences,
        "robustness": with_changes(robustness, recipes),
        "costs": costs_of(results.runs, recipes),
        "runs": list(results.runs),
        "version": __version__,
    }
    report["caveats"] = caveats(about, differences, report["robustness"])
    _write_table(out / "results.csv", clean)
    _write_table(out / "runs.csv", results.runs)
    _write_table(out / "differences.csv", differences)
    if degraded:
        _write_table(
            out / "robustness.csv", [{"condition": c} | row for c, rows in degraded.items() for row in rows]
        )
    if about["axes"]:
        report |= _grid(out, results, differences)
    else:
        report["means"] = recipe_means(clean, recipes)
        _write_table(out / "summary.csv", report["means"])
        headline = [row for row in differences if row["class"] == MEAN]
        report["answers"] = [*map(answer, headline), *on_degraded_scans(report["robustness"])]
        figures.efficiency_figure(report["means"], recipes, pictures / "label_efficiency.png")
        figures.differences_figure(headline, pictures / "differences.png")
        if len(about["classes"]) > 1:
            figures.differences_figure(differences, pictures / "differences_by_class.png")
        figures.learning_figure(results.histories, recipes, pictures / "learning.png")
        if degraded:
            figures.robustness_figure(report["robustness"], recipes, pictures / "robustness.png")
    view = _view(report) | {"pictures": pictures, "examples": results.examples}
    for format_, name in (("html.j2", "report.html"), ("markdown.j2", "summary.md")):
        write_text(out / name, _render(view | {"format": format_}))
    return report


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    write_csv(path, [key for key in rows[0] if key != "by_seed"], rows)


def _compare(rows: Iterable[Row], about: Row) -> list[Row]:
    """`compare_recipes`; in a grid within every variant, with ``variant`` first."""
    if not about["axes"]:
        return compare_recipes(rows, about["recipes"])
    rows = list(rows)
    return [
        {"variant": variant["name"]} | row
        for variant in about["variants"]
        for row in compare_recipes([r for r in rows if r["variant"] == variant["name"]], about["recipes"])
    ]


def answer(row: Row, where: str = "") -> str:
    """Which recipe is better, by how much and how sure, in a sentence."""
    start = f"With {counted(row['labels'], 'labelled scan')}{where}: {verdict(row)}."
    if row["difference"] is None:
        return start
    recipe, baseline = (
        f"{row[name]} ({row[variant]})" if variant in row else row[name]
        for name, variant in (("recipe", "variant"), ("baseline", "baseline_variant"))
    )
    p = "" if row["p"] is None else f"p = {row['p']:.3g}, "
    return (
        f"{start} {recipe} scores {row['dice']:.4f}, {baseline} {row['baseline_dice']:.4f}: {points(row['difference'])} "
        f"Dice points (95 % interval {interval(row)}, {p}{counted(row['cases'], 'test scan')}, "
        f"{counted(row['seeds'], 'seed')})."
    )


def on_degraded_scans(robustness: Sequence[Row]) -> list[str]:
    """Whether a recipe differs from the baseline on degraded scans, a sentence for each recipe and budget.

    >>> row = {"labels": 8, "recipe": "b", "baseline": "a", "difference": 0.02, "low": 0.01, "high": 0.03, "seeds": 5,
    ...        "cases": 9}
    >>> on_degraded_scans([row | {"condition": "noise"}, row | {"condition": "blur", "low": -0.01}])[0]
    'With 8 labelled scans, on degraded scans: b against a +2.00 (+1.00 to +3.00) with noise; no clear difference with blur.'
    """
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in robustness:
        if row["condition"] != "clean" and row["difference"] is not None:
            groups.setdefault((row["labels"], row["recipe"]), []).append(row)
    sentences = []
    for (labels, recipe), rows in groups.items():
        differ = [
            f"{points(row['difference'])} ({interval(row)}) with {row['condition']}"
            for row in rows
            if excludes_zero(row)
        ]
        rest = ", ".join(row["condition"] for row in rows if not excludes_zero(row))
        baseline, few = rows[0]["baseline"], too_few(rows[0])
        if all(row["low"] == row["high"] == 0 for row in rows):
            text = f"{recipe} and {baseline} give the same result with {rest}"
        elif not differ:
            text = f"no clear difference between {recipe} and {baseline} with {rest}"
        else:
            text = f"{recipe} against {baseline} {', '.join(differ)}{few and f', {few}: too few to be sure'}"
            text += f"; no clear difference with {rest}" if rest else ""
        sentences.append(f"With {counted(labels, 'labelled scan')}, on degraded scans: {text}.")
    return sentences


def caveats(about: Row, differences: Sequence[Row], robustness: Sequence[Row] = ()) -> list[str]:
    """What a reader must know before they rely on a number.

    Args:
        about: of `Results`.
        differences: every difference that is shown, on the scans as they are.
        robustness: the differences under every condition; those of ``clean`` are not counted again.
    """
    sentences = list(dict.fromkeys(about["warnings"]))
    seeds, cases = len(about["seeds"]), len(about["test"])
    if seeds == 1:
        sentences.append(
            "One seed: the intervals cover the choice of test scans, not the chance of training. Another seed may "
            "reverse a small difference."
        )
    elif seeds < FEWEST_SEEDS:
        sentences.append(
            f"{seeds} seeds: the intervals cover little of the chance of training and are too narrow."
        )
    if cases < FEW_CASES:
        sentences.append(f"{counted(cases, 'test scan')}: too few for a firm statement about other scans.")
    clean = sum(row["class"] == MEAN and row["difference"] is not None for row in differences)
    degraded = sum(row["condition"] != "clean" and row["difference"] is not None for row in robustness)
    if clean + degraded > 1:
        where = f" ({clean} on the scans as they are, {degraded} on degraded scans)" if degraded else ""
        more = (
            ", not counting those of single classes" if len({row["class"] for row in differences}) > 2 else ""
        )
        sentences.append(
            f"{clean + degraded} comparisons of the mean{where}{more}: each interval is a 95 % interval by itself, so one "
            "in twenty excludes 0 by chance even without a difference."
        )
    return sentences


def costs_of(runs: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Minutes and memory of a run of each recipe, over all its runs."""
    costs: list[Row] = []
    for recipe in dict.fromkeys(recipes):
        mine = [run for run in runs if run["recipe"] == recipe]
        total, steps = sum(run["minutes"] for run in mine), sum(run["steps"] for run in mine)
        minutes = total / len(mine)
        costs.append(
            {
                "recipe": recipe,
                "runs": len(mine),
                "minutes": round(minutes, 2),
                "seconds_per_step": 60 * total / max(steps, 1),
                "relative_time": minutes / costs[0]["minutes"] if costs and costs[0]["minutes"] else 1.0,
                "memory_gib": max((run["memory_gib"] for run in mine if run["memory_gib"]), default=None),
                "machine": ", ".join(sorted({run["machine"] for run in mine if run["machine"]})),
            }
        )
    return costs


def with_changes(robustness: Sequence[Row], recipes: Sequence[str]) -> list[Row]:
    """Rows by budget and recipe, with the change of the recipe's and the baseline's Dice from the clean scans."""
    ordered = sorted(robustness, key=lambda row: (row["labels"], recipes.index(row["recipe"])))
    clean = {(r["recipe"], r["labels"], r.get("variant")): r for r in ordered if r["condition"] == "clean"}

    def change(row: Row, key: str) -> float | None:
        whole = clean[row["recipe"], row["labels"], row.get("variant")][key]
        return None if row[key] is None or whole is None else row[key] - whole

    return [row | {f"{key}_change": change(row, key) for key in ("dice", "baseline_dice")} for row in ordered]


def _grid(out: Path, results: Results, differences: Sequence[Row]) -> Row:
    """What only a grid's report has; draws its pictures and writes ``grid.csv``."""
    about, clean, pictures = results.about, results.scores["clean"], out / "pictures"
    recipes, variants = about["recipes"], about["variants"]
    table = grid_table(variants, recipes, results.runs, means_of_tests(clean))
    headline = [row for row in differences if row["class"] == MEAN]
    paired = {(row["variant"], row["recipe"], row["labels"]): row for row in headline}
    rows = [
        {"labels": row["labels"], **row["levels"], "recipe": recipe, **of}
        | {
            key: paired.get((row["variant"], recipe, row["labels"]), {}).get(key)
            for key in ("difference", "low", "high", "p")
        }
        for row in table
        for recipe, of in row["of"].items()
    ]
    _write_table(out / "grid.csv", rows)
    figures.grid_figure(table, recipes, pictures / "grid.png")
    figures.grid_curves_figure(results.histories, variants, recipes, pictures / "grid_curves.png")
    answers = []
    for labels, recipe in dict.fromkeys((row["labels"], row["recipe"]) for row in headline):
        mine = [row for row in headline if (row["labels"], row["recipe"]) == (labels, recipe)]
        better, worse = (sum(excludes_zero(row) == sign for row in mine) for sign in (1, -1))
        few = next((f" ({too_few(row)}: too few to be sure)" for row in mine if too_few(row)), "")
        answers.append(
            f"With {counted(labels, 'labelled scan')}, under the same settings: {recipe} is better than "
            f"{mine[0]['baseline']} in {better} of {counted(len(mine), 'variant')}, worse in {worse}; in "
            f"{len(mine) - better - worse} the interval includes 0{few}."
        )
    best = best_variants(table, recipes, clean)
    answers += [answer(row, ", each at its best variant by validation Dice") for row in best]
    return {"answers": answers, "table": table, "best": best, "level_means": level_means(table, recipes)}


class Cell(str):
    """A table's cell with a CSS class."""

    kind = ""

    @classmethod
    def of(cls, text: str, kind: str) -> Cell:
        """A text and its class."""
        cell = cls(text)
        cell.kind = kind
        return cell


def _marked(text: str, row: Row) -> Cell:
    return Cell.of(text, ("", "up", "down")[excludes_zero(row)])


def _view(report: Row) -> Row:
    """What the template shows, with the cells of tables whose columns depend on the comparison."""
    about = report["about"]
    recipes, baseline = list(dict.fromkeys(about["recipes"])), about["recipes"][0]
    with_labels = len(about["splits"]) > 1 or not about["axes"]
    level_names = {variant["name"]: list(variant["levels"].values()) for variant in about["variants"]}

    def place(row: Row) -> list[str]:
        """The budget and variant of a row."""
        return [str(row["labels"])] * with_labels + level_names[row.get("variant", "")]

    overlays = {name: settings_and_wiring(overlay) for name, overlay in about["overlays"].items()}
    whats = {
        name: f"{what[:1].upper()}{what[1:]} " if what else "" for name, what in about["descriptions"].items()
    }
    view = report | {
        "headline": [row for row in report["differences"] if row["class"] == MEAN],
        "classes": list(dict.fromkeys(row["class"] for row in report["differences"])),
        "place": place,
        "place_head": ["labels"] * with_labels + list(about["axes"]),
        "overlays": overlays,
        "descriptions": whats,
        "levels": [(axis, n, s) for axis, levels in about["axes"].items() for n, s in levels.items()],
        "conditions": list(dict.fromkeys(row["condition"] for row in report["robustness"])),
        "matrix": _matrix(report["robustness"], baseline),
        "rules": [P_RULE, LEFT_OUT_RULE, EMPTY_RULE],
        "fewest_seeds": FEWEST_SEEDS,
        "fewest_cases": FEWEST_CASES,
    }
    if about["axes"]:
        return view | _grid_view(report, recipes)
    return view | {"mean_rows": _mean_rows(report, recipes)}


def _mean_rows(report: Row, recipes: Sequence[str]) -> list[Row]:
    rows = []
    for labels in dict.fromkeys(row["labels"] for row in report["means"]):
        for recipe in recipes:
            key = (recipe, labels)
            hd95 = [r["test_hd95_mm"] for r in report["runs"] if (r["recipe"], r["labels"]) == key]
            hd95 = [value for value in hd95 if value is not None]
            cells = [
                number(row["dice"]) + (f" ± {number(row['seed_std'])}" if row["seed_std"] is not None else "")
                for row in report["means"]
                if (row["recipe"], row["labels"]) == key
            ]
            cells.append(number(sum(hd95) / len(hd95) if hd95 else None, 2))
            rows.append({"labels": labels, "recipe": recipe, "cells": cells})
    return rows


def _matrix(robustness: Sequence[Row], baseline: str) -> list[Row]:
    """A row per budget, variant and recipe, with a cell for each condition: Dice and its change from clean scans."""
    cells: dict[tuple[Any, ...], list[str]] = {}

    def add(row: Row, recipe: str, text: str) -> None:
        cells.setdefault((row["labels"], row.get("variant", ""), recipe), []).append(text)

    def text(dice: float | None, change: float | None) -> str:
        return number(dice, 3) + (f" ({points(change)})" if change else "")

    compared = {row["recipe"] for row in robustness}
    for row in robustness:
        if row["recipe"] == robustness[0]["recipe"] and baseline not in compared:
            add(row, baseline, text(row["baseline_dice"], row["baseline_dice_change"]))
        add(row, row["recipe"], _marked(text(row["dice"], row["dice_change"]), row))
    return [
        {"labels": labels, "variant": variant, "recipe": recipe, "cells": mine}
        for (labels, variant, recipe), mine in sorted(cells.items(), key=lambda item: item[0][:2])
    ]


def _grid_view(report: Row, recipes: Sequence[str]) -> Row:
    table = report["table"]
    values = {
        (r, s): [row["of"][r][s] for row in table if row["of"][r][s] is not None]
        for r in recipes
        for s in RUN_SCORES
    }
    columns = [key for key, column in values.items() if column]

    def score_cells(row: Row) -> list[str]:
        """Bold: the best of its column; losses of different settings cannot be ranked."""
        best = {key: max(values[key]) for key in columns if key[1] != "contrastive_loss"}
        scores = {(r, s): row["of"][r][s] for r, s in columns}
        return [
            Cell.of(number(v, 3), "best" if v is not None and v == best.get(key) else "")
            for key, v in scores.items()
        ]

    return {
        "score_head": [TITLES[score] for _, score in columns],
        "score_cells": score_cells,
        "groups": [("", len(report["about"]["axes"]) + (len(report["about"]["splits"]) > 1))]
        + [(recipe, sum(r == recipe for r, _ in columns)) for recipe in recipes],
        "level_means": [
            row | {"cells": [number(row["of"][recipe], 3) for recipe in recipes]}
            for row in report["level_means"]
        ],
    }


def interval(row: Row) -> str:
    """The ends of a difference's interval in points."""
    return "-" if row["low"] is None else f"{points(row['low'])} to {points(row['high'])}"


def number(value: float | None, digits: int = 4) -> str:
    """A number, or ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of Dice in points (hundredths), with its sign.

    >>> points(0.0123), points(-0.004), points(0.0)
    ('+1.23', '-0.40', '0.00')
    """
    if value is None:
        return "-"
    text = f"{100 * value:+.2f}"
    return text[1:] if float(text) == 0 else text


def settings_and_wiring(overlay: Mapping[str, Any]) -> tuple[Row, Row]:
    """What a person sets in an overlay, and what only connects parts of the configuration.

    >>> settings_and_wiring({"contrast_weight": 0.1, "train::loss": "$@loss.to(@device)"})
    ({'contrast_weight': 0.1}, {'train::loss': '$@loss.to(@device)'})
    """

    def wires(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(wires(part) for part in value.values())
        return isinstance(value, str) and value[:1] in ("@", "$")

    wiring = {key: value for key, value in overlay.items() if wires(value)}
    return {key: value for key, value in overlay.items() if key not in wiring}, wiring


def _render(view: Row) -> str:
    """The report in one format; names with special signs are shown as they are."""
    environment = Environment(
        autoescape=True,
        finalize=_in_markdown if view["format"] == "markdown.j2" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # not joinpath(a, b): some of Python 3.10 take one part
        loader=FunctionLoader(
            lambda name: (files(__package__) / "templates" / name).read_text(encoding="utf-8")
        ),
    )
    shown: dict[str, Callable[..., str]] = {
        "points": points,
        "number": number,
        "interval": interval,
        "verdict": verdict,
        "marked": _marked,
        "counted": counted,
        "p": lambda p: "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}",
        "inline": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"),
    }
    environment.filters |= shown
    return environment.get_template("report.j2").render(view)


def _in_markdown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else Markup(markdown_text(value))
