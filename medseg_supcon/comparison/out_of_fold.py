"""Scores of out-of-fold masks: each is made by the fold that was not trained on its scan, and all are pooled.

RUNS/eval/
  metrics.csv  metrics.json   a row per case and class, with its fold; written last
  review.html                 the scans with masks and label maps, lowest Dice first
  report.md                   means, each fold's share, the post-processing and what it changed, the worst cases
  predictions/                the masks
  before/                     the same masks and scores without the chosen post-processing
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medseg_supcon import __version__
from medseg_supcon.comparison.postprocessing import Mask, choose_postprocessing
from medseg_supcon.datasets import class_indices, load_items, mask_labels
from medseg_supcon.errors import RunError
from medseg_supcon.evaluation import summarise, write_metrics
from medseg_supcon.files import read_json, write_text
from medseg_supcon.plan import read_plan
from medseg_supcon.quality import Entry, write_page
from medseg_supcon.scans import Scan, read_nifti
from medseg_supcon.text import markdown_text

WORST = 10  # cases in the report
MOST_SHOWN = 300  # in the page
Row = dict[str, Any]


@dataclass(frozen=True)
class OutOfFold:
    """What one fold predicts for the others: a run, and the cases that it was not trained on."""

    run: Path
    items: list[Row]  # of datalist.json
    dataset_dir: str

    @property
    def index(self) -> int:
        return int(self.run.name.rpartition("_")[2])

    def mask(self, folder: Path, item: Mapping[str, Any]) -> Path:
        return folder / "predictions" / f"{item['name']}.nii.gz"

    def has_masks(self) -> bool:
        """Whether the run's own scores have all masks beside them."""
        return all(self.mask(self.run / "eval", item).is_file() for item in self.items)

    def rows(self) -> list[Row]:
        """The run's scores of these cases, with the fold."""
        rows = read_json(self.run / "eval" / "metrics.json")["rows"]
        return [row | {"fold": self.index} for row in rows]

    def digest(self) -> str:
        """Of the weights."""
        return hashlib.sha256((self.run / "models" / "model.pt").read_bytes()).hexdigest()


def is_scored(folder: Path, parts: Sequence[OutOfFold]) -> bool:
    """Whether the pooled scores are there, and of the weights that the folds have now."""
    return _is_of(folder / "eval" / "metrics.json", parts)


def masks_are_kept(folder: Path, parts: Sequence[OutOfFold]) -> bool:
    """Whether the masks without chosen post-processing are there, and of the weights that the folds have now."""
    return _is_of(folder / "eval" / "before" / "metrics.json", parts)


def _is_of(metrics: Path, parts: Sequence[OutOfFold]) -> bool:
    with suppress(OSError, RunError, KeyError):
        masks = [part.mask(metrics.parent, item) for part in parts for item in part.items]
        return read_json(metrics)["models"] == _digests(parts) and all(mask.is_file() for mask in masks)
    return False


def _digests(parts: Sequence[OutOfFold]) -> dict[str, str]:
    return {part.run.name: part.digest() for part in parts}


def forget_scores(folder: Path) -> None:
    """Remove the pooled scores before the folds change."""
    for name in ("metrics.json", "metrics.csv", "review.html", "report.md"):
        (folder / "eval" / name).unlink(missing_ok=True)


def keep_masks(folder: Path, parts: Sequence[OutOfFold]) -> None:
    """Copy the folds' masks and scores to ``eval/before``."""
    _collect(folder / "eval" / "before", parts)


def _collect(out: Path, parts: Sequence[OutOfFold], **more: Any) -> Row:
    (out / "metrics.json").unlink(missing_ok=True)
    shutil.rmtree(out / "predictions", ignore_errors=True)
    (out / "predictions").mkdir(parents=True)
    for part in parts:
        for item in part.items:
            shutil.copyfile(part.mask(part.run / "eval", item), part.mask(out, item))
    rows = sorted((row for part in parts for row in part.rows()), key=lambda row: str(row["case"]))
    return write_metrics(rows, out, models=_digests(parts), **more)


def choose(
    folder: Path, parts: Sequence[OutOfFold], patients: Mapping[str, str], base: Mapping[str, Any]
) -> tuple[Row, list[Row]]:
    """`choose_postprocessing` on the masks in ``eval/before``; nothing for regions, which change with one another."""
    plan = read_plan(parts[0].run / "configs" / "plan.json")
    if plan.get("regions"):
        return dict(base), []

    def masks() -> Iterator[Mask]:
        for part in parts:
            for item in load_items(part.items, part.dataset_dir):
                path, label = part.mask(folder / "eval" / "before", item), Path(item["label"])
                volume = read_nifti(path)
                shape = volume.data.shape
                classes = class_indices(volume.data, plan | {"ignore_label": None}, path)
                known = class_indices(read_nifti(label).data.reshape(shape), plan, label)
                yield Mask(patients.get(item["name"], item["name"]), classes, known, 1000 * volume.grid.voxel_ml)

    return choose_postprocessing(masks(), list(plan["labels"]), base)


def score(folder: Path, parts: Sequence[OutOfFold], tried: Sequence[Row], sentences: Sequence[str]) -> None:
    """Pool the folds' masks and scores, and write the page and the report."""
    out, plan = folder / "eval", read_plan(parts[0].run / "configs" / "plan.json")
    before = read_json(out / "before" / "metrics.json")["summary"]
    rows = [row for part in parts for row in part.rows()]
    means = dice_of_cases(rows)
    entries = []
    for part in parts:
        for item in load_items(part.items, part.dataset_dir):
            name, mask = str(item["name"]), part.mask(part.run / "eval", item)
            entries.append((means.get(name, 2.0), name, Entry(name, mask, _scan(item), Path(item["label"]))))
    worst = [entry for *_, entry in sorted(entries, key=lambda row: row[:2])]
    note = "Each mask was made by the fold that was not trained on its scan. The lowest Dice comes first."
    write_page(out / "review.html", worst[:MOST_SHOWN], mask_labels(plan), str(plan["name"]), [note, *sentences])
    shares = [
        {"fold": part.index, "cases": len(part.items), "dice": summarise(part.rows())["mean"]["dice"]} for part in parts
    ]
    report = _report(plan, summarise(rows), before, shares, sentences, means, folder)
    write_text(out / "report.md", report)
    _collect(out, parts, before=before, folds=shares, postprocessing=list(tried), notes=list(sentences))


def dice_of_cases(rows: Sequence[Row]) -> dict[str, float]:
    """Mean Dice over the classes of each case that has one."""
    known: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] is not None:
            known.setdefault(row["case"], []).append(row["dice"])
    return {case: fmean(dice) for case, dice in known.items()}


def _scan(item: Mapping[str, Any]) -> Scan:
    images = [item["image"]] if isinstance(item["image"], str) else item["image"]
    return Scan(str(item["name"]), tuple(map(Path, images)))


def _report(
    plan: Row, summary: Row, before: Row, shares: Sequence[Row], sentences: Sequence[str], means: Mapping[str, float],
    folder: Path,
) -> str:  # fmt: skip
    """A page in Markdown."""

    def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        lines = [head, ["---"] * len(head), *([markdown_text(cell) for cell in row] for row in rows)]
        return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"

    def number(value: float | None, digits: int = 4) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    classes = [
        (name, number(before["classes"][name]["dice"]), number(of["dice"]), number(of["hd95_mm"], 2), of["n"])
        for name, of in summary["classes"].items()
    ]
    mean = ("mean", number(before["mean"]["dice"]), number(summary["mean"]["dice"]))
    classes.append((*mean, number(summary["mean"]["hd95_mm"], 2), ""))
    worst = sorted(means, key=lambda case: (means[case], case))[:WORST]
    return (
        f"# {markdown_text(str(plan['name']))}: {len(shares)} folds\n\n"
        f"Scores of {summary['cases']} scans, each segmented by the fold that was not trained on it. `medseg predict "
        f"{markdown_text(folder.name)}` uses all folds together, and was not scored.\n\n"
        + table(("class", "Dice before post-processing", "Dice", "HD95 mm", "scans"), classes)
        + "".join(f"- {markdown_text(sentence)}\n" for sentence in sentences)
        + "\n## Folds\n\n"
        + table(("fold", "scans", "mean Dice"), [(s["fold"], s["cases"], number(s["dice"])) for s in shares])
        + "## Lowest Dice\n\nreview.html shows all of them, in this order.\n\n"
        + table(("scan", "mean Dice"), [(case, number(means[case])) for case in worst])
        + f"medseg_supcon {__version__}. Not a medical device.\n"
    )
