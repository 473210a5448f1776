"""`medseg predict`: runs and paths in, masks out, and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg_supcon.inference._predictor import Predictor


def predict_paths(
    runs: Sequence[str | Path],
    scans: Sequence[str | Path],
    out: str | Path,
    *,
    probabilities: bool = False,
    tta: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    trust: bool = False,
    console: Console | None = None,
) -> int:
    """Segments the scans that files and folders hold, telling on stderr what becomes of each.

    Args:
        runs: a run, or several as an ensemble.
        scans: files, folders of files, DICOM series folders, mixed.
        out: folder for the masks and ``manifest.json``.
        probabilities, tta, overwrite, device, trust: as in `Predictor`.
        console: where messages go; None: stderr, whole lines whatever its width.

    Returns:
        0: all are done; 2: all failed; 3: some failed and the rest are done.

    Raises:
        RunError: a run or the folder cannot be used.
    """
    console = console or Console(stderr=True, soft_wrap=True, highlight=False)

    def tell(done: int, total: int, entry: dict[str, Any]) -> None:
        if entry["status"] == "failed":
            text = entry["error"]
        elif entry["status"] == "skipped":
            text = f"{entry['name']}: done before, skipped (--overwrite redoes it)"
        else:
            text = f"{entry['name']}: {entry['seconds']:.1f} s"
        for warning in entry.get("warnings", []):
            text += f"; {warning}"
        console.print(f"[{done}/{total}] {text}", markup=False)

    predictor = Predictor(list(runs), device=device, tta=tta, trust=trust)
    found = predictor.find_scans(scans)
    summary = predictor.run(found, out, probabilities, overwrite, tell)["summary"]
    counts = ", ".join(f"{count} {status}" for status, count in summary.items() if count)
    console.print(f"{counts}: {out} (manifest.json says more)", markup=False)
    if not summary["failed"]:
        return 0
    return 3 if summary["done"] + summary["skipped"] else 2
