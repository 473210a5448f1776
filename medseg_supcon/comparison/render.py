"""Templates to text: tables in Markdown, and HTML pages that hold their pictures."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from medseg_supcon.comparison.statistics import verdict


def render(name: str, view: Mapping[str, Any]) -> str:
    """A template of this package, filled in; what the view lacks is an error. HTML is escaped."""
    environment = Environment(
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )
    environment.filters["points"] = points
    environment.filters["number"] = lambda v, digits=4: "-" if v is None else f"{v:.{digits}f}"
    environment.filters["p"] = lambda v: "-" if v is None else "< 0.0001" if v < 1e-4 else f"{v:.2g}"
    environment.filters["verdict"] = verdict
    return environment.get_template(name).render(view)


def points(value: float | None) -> str:
    """A difference of Dice in points (hundredths), with its sign.

    >>> points(0.0123), points(-0.004), points(0.0)
    ('+1.23', '-0.40', '0.00')
    """
    if value is None:
        return "-"
    text = f"{100 * value:+.2f}"
    return text[1:] if float(text) == 0 else text


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "test scan"), counted(3, "test scan")
    ('1 test scan', '3 test scans')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def settings_and_wiring(overlay: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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


def inline(path: Path) -> str:
    """A PNG as the address of an image that needs no file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows with one set of keys; what is no number or text is left out."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [key for key in rows[0] if key != "by_seed"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _source(name: str) -> str:
    # not joinpath(a, b): some of Python 3.10 take one part
    return (files("medseg_supcon.comparison") / "templates" / name).read_text(encoding="utf-8")
