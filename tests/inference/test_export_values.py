"""An exported network is kept only if it gives the network's own values, at every size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medseg_supcon import files
from medseg_supcon.bundle import export as _export
from medseg_supcon.bundle import export_model
from medseg_supcon.errors import RunError


@pytest.mark.parametrize("which", [1, 2])
def test_a_network_that_gives_nan_is_not_handed_out(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """NaN compares as neither above nor below a tolerance, at the first size or at a later one."""
    run, calls = make_run(), []

    def load(file: Path) -> Callable[[Tensor], Tensor]:
        def exported(image: Tensor) -> Tensor:
            calls.append(image.shape)
            network = torch.jit.load(str(file))
            output = network(image)
            return output * torch.nan if len(calls) == which else torch.as_tensor(output)

        return exported

    attempts = _export._torchscript_attempts

    def faulty(*arguments: object) -> list[_export.Attempt]:
        method, any_size, write, _ = attempts(*arguments)[0]  # type: ignore[arg-type]
        return [(method, any_size, write, load)]

    monkeypatch.setattr(_export, "_torchscript_attempts", faulty)
    with pytest.raises(RunError, match="script: differs by nan from the network"):
        export_model(run, "torchscript", tmp_path / "model.ts")
    assert not (tmp_path / "model.ts").exists()


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_the_file_is_whole_and_nothing_else_is_left(make_run: Callable[..., Path], tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    folder = tmp_path / "exported"
    folder.mkdir()
    files.temporary_name(folder).write_bytes(b"half, of an export that was killed")
    (folder / ".model.1.part").write_text("a person's own")
    file = folder / "model"
    file.write_bytes(b"an earlier one")
    result = export_model(make_run(), format, file)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == [".model.1.part", "model"]
    load = torch.jit.load if format == "torchscript" else _export._load_onnx
    image = torch.zeros(1, 1, *result["sizes"][0])
    assert load(file)(image).shape[2:] == image.shape[2:]  # type: ignore[no-untyped-call]
