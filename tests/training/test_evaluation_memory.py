"""A GPU that holds the network but not a whole scan's logits does not end a training without scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from medseg_supcon.training import run_config


@pytest.mark.parametrize("enough", [True, False])
def test_logits_go_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, trained_run: Path, tmp_path: Path, enough: bool
) -> None:
    stitch, where = SlidingWindowInferer.__call__, []

    def scarce(self: Any, *args: Any, **kwargs: Any) -> Any:
        where.append(self.device)
        if self.device is None or not enough:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")
        return stitch(self, *args, **kwargs)

    monkeypatch.setattr(SlidingWindowInferer, "__call__", scarce)

    def evaluate() -> None:
        run_config(trained_run, "evaluate", "infer", device="cpu", output_dir=str(tmp_path))

    if not enough:
        with pytest.raises(torch.OutOfMemoryError):
            evaluate()
    else:
        evaluate()
        scores = [
            json.loads((f / "metrics.json").read_text())["rows"] for f in (tmp_path, trained_run / "eval")
        ]
        assert scores[0] == scores[1] != []
    assert where == [None, torch.device("cpu")]
