"""The command ``medseg review``: a page to look at scans and masks, worst first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_supcon.cli.terminal import EXIT_SOME_FAILED, OverwriteOption, out, printable, refuse_to_overwrite, say
from medseg_supcon.errors import DataError
from medseg_supcon.text import counted

BESIDE = ("images*", "scans*", "*/images*", "*/scans*")  # where scans are looked for, from the parent of MASKS


def review(
    masks: Annotated[Path, typer.Argument(help="A folder of masks that medseg predict wrote, or any other one.")],
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML file to write.")],
    scans: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="The scans: files, folders or DICOM series folders. Can be repeated. "
            "Default: folders beside MASKS whose name begins with images or scans.",
        ),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Label maps to show and to compare the masks with.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, metavar="N", help="Number of masks in the page, worst first.")] = 300,
    overwrite: OverwriteOption = False,
) -> None:  # fmt: skip
    """Write one HTML page to look at scans and masks, worst first, and to judge them. It opens without a network."""
    from medseg_supcon.inference import find_scans
    from medseg_supcon.quality import folder_entries, write_page

    refuse_to_overwrite(file, overwrite)
    if scans is None:
        parent = masks.absolute().parent
        scans = [path for pattern in BESIDE for path in sorted(parent.glob(pattern)) if path.is_dir()]
        scans = [path for path in scans if path.resolve() != masks.resolve()]
        found = [scan for path in scans for scan in find_scans([path])]
    else:
        found = find_scans(scans)
        for text in (text for scan in found for text in (scan.problem, *scan.warnings) if text is not None):
            say(text)
    entries, labels, notes = folder_entries(masks, found, references)
    if not any(entry.scan for entry in entries):
        where = ", ".join(map(str, scans)) or f"the folders beside {masks}"
        raise DataError(f"{masks}: no mask has the name of a scan in {where}. Give the scans with --scans.")
    result = write_page(file, entries, labels, masks.absolute().name, notes, most)
    for note in result["notes"]:
        say(note, "note")
    out.print(f"Wrote {printable(file)}: {_summary(result)}, {file.stat().st_size / 1e6:.1f} MB. Open it in a browser.")
    if result["problems"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def _summary(result: dict[str, Any]) -> str:
    verdicts = {verdict: number for verdict, number in result["verdicts"].items() if verdict is not None}
    parts = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    return counted(result["shown"], "mask") + (f" ({parts})" if parts else "")
