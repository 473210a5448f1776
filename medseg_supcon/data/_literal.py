"""Texts that a MONAI config must take as they are: names and paths of a person's files."""

from __future__ import annotations

from typing import Any

__all__ = ["literal"]

SIGNS = "#@%$"  # :: in MONAI's eyes, a reference, a macro, an expression
ESCAPED = {"#": r"\x23", "@": r"\x40", "%": r"\x25", "import": r"\x69mport"}


def literal(value: Any) -> Any:
    """`value` as a bundle config has to say it, so that `ConfigParser` gives back the very same.

    MONAI reads ``#`` in any text as ``::``, and texts that begin with ``@``, ``%`` or ``$`` as references, macros
    and expressions. A text without such a sign stays as it is; any other value becomes an expression that escapes
    them, in which a ``_target_`` stays data, too.

    Args:
        value: a text, or a list or dictionary of texts, numbers and more of these.

    Example:
        >>> from monai.bundle import ConfigParser
        >>> from medseg_supcon.data import literal
        >>> literal("/data/scans"), literal("/data/site#2")
        ('/data/scans', "$'/data/site\\\\x232'")
        >>> ConfigParser({"folder": literal("/data/site#2")}).get_parsed_content("folder")
        '/data/site#2'
    """
    text = repr(value)
    if isinstance(value, str) and not any(sign in value for sign in SIGNS):
        return value
    for word, escaped in ESCAPED.items():
        text = text.replace(word, escaped)
    return f"${text}"
