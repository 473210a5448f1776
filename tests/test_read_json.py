"""One reader of JSON: whatever is wrong with a file is a sentence, and nothing passes that other programs misread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg_supcon.errors import ConfigError, DataError, RunError, nearest
from medseg_supcon.files import read_json

FAULTS: dict[str, tuple[bytes, str]] = {
    "levels": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels deep"),
    "levels that Python still reads": (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "levels deep"),
    "digits": (b'{"a": ' + b"9" * 5_000 + b"}", "too long"),
    "digits that Python still reads": (b'{"a": -' + b"9" * 30 + b"}", "30 digits"),
    "NaN": (b'{"a": [NaN]}', "NaN"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity"),
    "overflow": (b'{"a": 1e999}', "too large"),
    "a key twice": (b'{"a": {"b": 1, "b": 1}}', "'b' twice"),
    "half a character in a name": (rb'{"labels": {"\ud83d": 1}}', "half a character"),
    "half a character in a value": (rb'{"labels": {"1": "x\udfff"}}', "half a character"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "Latin-1": ('{"a": "ä"}'.encode("latin-1"), "UTF-8"),
    "empty": (b"", "empty file"),
    "blank": (b" \n", "empty file"),
    "a list": (b"[1]", "object"),
    "null": (b"null", "object"),
    "cut": (b'{"a": 1,\n', "line 2"),
    "single quotes": (b"{'a': 1}", "double quotes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_sentence(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "file.json"
    content, word = FAULTS[fault]
    path.write_bytes(content)
    for kind in (DataError, ConfigError, RunError):
        with pytest.raises(kind, match=word) as error:
            read_json(path, kind)
        sentence = str(error.value)
        assert str(path) in sentence and sentence.endswith(".") and len(sentence) < 400
        sentence.encode()  # can be printed and written
    with pytest.raises(RunError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path)


def test_a_sound_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    content = {"ä": [1, 2.5, None, True, "\U0001f600", {"b": 2**62}], "name of bytes": "\udcff"}
    (tmp_path / "file.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert read_json(tmp_path / "file.json") == content


def test_nearest() -> None:
    assert nearest("Patch-Size", ["spacing", "patch_size"]) == "patch_size"
    assert nearest("fold:", ["image", "label", "fold"]) == "fold"
    assert nearest("xyz", ["spacing"]) is None
