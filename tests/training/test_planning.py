"""A run appears whole or not at all, and none of the user's files are replaced or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg_supcon.bundle import is_planned
from medseg_supcon.datasets import read_dataset, split_cases
from medseg_supcon.errors import RunError
from medseg_supcon.training import prepare as _run
from medseg_supcon.training import prepare_run


@pytest.fixture
def prepare(phantoms: Path, trained_run: Path) -> Any:
    """Plan a run with the plan of ``trained_run``."""
    dataset = read_dataset(phantoms)
    plan = json.loads((trained_run / "configs" / "plan.json").read_text())

    def call(run: Path) -> dict[str, Any]:
        return prepare_run(dataset, split_cases(dataset), run, plan=plan, device="cpu")

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["configs/mine.txt", "docs/mine.txt", "LICENSE"])
def test_what_a_run_would_replace_is_refused_and_kept(prepare: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a person's own")
    with pytest.raises(RunError, match=f"contains {name.partition('/')[0]} that medseg did not write"):
        prepare(tmp_path)
    assert files(tmp_path) == {name: b"a person's own"}


@pytest.mark.parametrize("existed", [True, False])
def test_planning_that_breaks_off_leaves_the_folder_as_it_was(
    prepare: Any, tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    if existed:
        run.mkdir()
        (run / "notes.txt").write_text("a person's own")
    seen = []

    def stop(draft: Path) -> None:
        # whoever kills the process here leaves nothing that a later call would take for a plan
        seen.append(is_planned(run))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_run, "refresh_documents", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
    assert seen == [False] and run.exists() == existed
    if existed:
        assert files(run) == {"notes.txt": b"a person's own"}


def test_what_a_killed_planning_left_is_cleared_away(prepare: Any, tmp_path: Path) -> None:
    (tmp_path / ".planning" / "configs").mkdir(parents=True)
    (tmp_path / ".planning" / "configs" / "plan.json").write_text("half a pl")
    prepare(tmp_path)
    assert is_planned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LICENSE", "configs", "docs", "scripts"]
