"""Files that appear whole or not at all, and folders for one process at a time."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_supcon import files

INSIDE = """
import sys
from pathlib import Path
from medseg_supcon.files import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INSIDE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with files.folder_lock(tmp_path, wait=False) as free:
            assert not free
        other.kill()
    with files.folder_lock(tmp_path, wait=False) as free:
        assert free
    assert list(tmp_path.iterdir()) == []


FORKED = """
import os
import sys
import time
from pathlib import Path
from medseg_supcon.files import folder_lock

with folder_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        print("forked", flush=True)
        time.sleep(60)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_killed_process_s_children_hold_no_lock(tmp_path: Path) -> None:
    """A loader's workers live on for a while."""
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "forked\n"
        with files.folder_lock(tmp_path, wait=False) as free:
            assert not free, "the one that forked is at work"
        other.kill()
        other.wait()
        try:
            with files.folder_lock(tmp_path, wait=False) as free:
                assert free
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_where_nothing_can_be_locked_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "no locks here")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with files.folder_lock(tmp_path), files.folder_lock(tmp_path, wait=False) as free:
        assert free


def test_texts_and_tables_replace_the_whole_file_or_nothing(tmp_path: Path) -> None:
    table = tmp_path / "made" / "table.csv"
    left = files.temporary_name(tmp_path / "made")
    rows = [{"a": 1, "b": "x, y", "more": [1]}, {"a": None, "b": "\u00b2"}]
    files.write_csv(table, ["a", "b"], rows)
    with table.open(newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == [{"a": "1", "b": "x, y"}, {"a": "", "b": "\u00b2"}]
    left.write_text("of a process that was killed")
    with pytest.raises(AttributeError):  # in the middle of writing
        files.write_text(table, None)
    assert table.read_text(encoding="utf-8").startswith("a,b")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["table.csv"]
