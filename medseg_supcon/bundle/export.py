"""A run's network as TorchScript or ONNX, compared with the network before the file is written."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from medseg_supcon.bundle.folder import find_run, read_config
from medseg_supcon.bundle.model import load_model
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.files import remove_leftovers, write_whole
from medseg_supcon.networks import size_divisor
from medseg_supcon.plan import literal

CONFIGS = ("inference", "evaluate", "train")
TOLERANCE = 1e-4  # of a logit, relative to the largest if that is above 1
ONNX_OPSET = 17

Size = tuple[int, ...]
Forward = Callable[[Tensor], Tensor]
Attempt = tuple[str, bool, Callable[[Path], None], Callable[[Path], Forward]]  # method, any size, writer, reader


def self_contained(config: Mapping[str, Any], plan: Mapping[str, Any], scripts: str = "") -> dict[str, Any]:
    """A bundle config that contains the plan and the text of ``scripts/inference.py`` instead of reading their files.

    The plan becomes an expression, not a sub-tree: its ``_target_`` entries must stay data until the config builds them.

    >>> from monai.bundle import ConfigParser
    >>> config = self_contained({"plan": "$open('plan.json')"}, {"name": "import a@b#c"})
    >>> ConfigParser(config).get_parsed_content("plan")
    {'name': 'import a@b#c'}
    """
    whole = dict(config)
    if "plan" in whole:
        whole["plan"] = literal(dict(plan))
    if "scripts" in whole:
        source = literal(scripts)
        text = source[1:] if source.startswith("$") else repr(source)
        whole["scripts"] = f"$(lambda names: exec({text}, names) or names)({{'__name__': 'scripts'}})"
    return whole


def _extra_files(run: Path, plan: dict[str, Any]) -> dict[str, str]:
    """name -> JSON text of a run's plan, metadata and configs, each config self-contained."""
    files = {"plan.json": json.dumps(plan)}
    metadata, scripts = run / "configs" / "metadata.json", run / "scripts" / "inference.py"
    if metadata.is_file():
        files["metadata.json"] = metadata.read_text(encoding="utf-8")
    source = scripts.read_text(encoding="utf-8") if scripts.is_file() else ""
    paths = {f"{name}.json": run / "configs" / f"{name}.yaml" for name in CONFIGS}
    configs = {name: read_config(path) for name, path in paths.items() if path.is_file()}
    return files | {name: json.dumps(self_contained(config, plan, source)) for name, config in configs.items()}


def export_model(run: Path, format: Literal["torchscript", "onnx"], out: Path, trust: bool = False) -> dict[str, Any]:
    """Write a run's network for use without this package, and compare it with the network.

    A TorchScript file loads with ``torch.jit.load`` alone, takes any size that the network takes, and contains
    ``metadata.json``, ``plan.json`` and the configs as extra files, as ``monai.bundle ckpt_export`` does; the
    ``inference.json`` inside reads no file of the run. An ONNX file maps ``image`` (B, C, X, Y, Z) to
    ``pred`` (B, classes, X, Y, Z), logits, float32, with ``plan.json`` and ``metadata.json`` as properties.

    Args:
        run: a trained run; ``models/model.pt`` is exported.
        format: ``"torchscript"`` or ``"onnx"``.
        out: file to write; an earlier one is replaced.
        trust: build the network of a run even if its plan or inference config is code.

    Returns:
        ``file``, ``format``, ``method`` ("script", "trace", "onnx", ...), ``max_abs_difference`` (the largest
        difference of a logit from the network's), ``sizes`` (that were compared) and ``any_size`` (False: the
        file takes patches of the plan's size only).

    Raises:
        ConfigError: the format is unknown, the plan is invalid, or a package for ONNX is not installed.
        RunError: no trained weights, they do not match the plan, or the exported network gives other values.
    """
    if format not in ("torchscript", "onnx"):
        raise ConfigError(f"--format {format} is unknown. Use torchscript or onnx.")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        needs = f"Export to ONNX needs {' and '.join(missing)}, which is not installed"
        raise ConfigError(f"{needs}. Run: pip install 'medseg-supcon[export]'")
    run = find_run(run)
    model = load_model(run, trust)
    attempts_for = _torchscript_attempts if format == "torchscript" else _onnx_attempts
    attempts = attempts_for(_extra_files(run, model.plan), model.network, model.plan)
    result: dict[str, Any] = {"file": str(out), "format": format}

    def write(file: IO[bytes]) -> None:  # the exporters open it by its name
        result.update(_first_that_agrees(attempts, Path(file.name), model.network, model.plan))

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent)
        write_whole(out, write)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{out} could not be written ({reason}). Free disk space, or choose another --out.") from error
    return result


def _first_that_agrees(
    attempts: Sequence[Attempt], file: Path, network: nn.Module, plan: dict[str, Any]
) -> dict[str, Any]:
    """Write the file in the first of several ways that gives the network's values."""
    patch = tuple(int(n) for n in plan["patch_size"])
    divisors = size_divisor(network, in_channels=len(plan["channels"]), spatial_dims=len(patch))
    sizes = [patch, tuple(n + d for n, d in zip(patch, divisors, strict=True))]
    faults = []
    for method, any_size, write, load in attempts:
        compared = sizes if any_size else sizes[:1]
        try:
            # torch's deprecation warnings and printed graphs say nothing: the result is compared
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
                warnings.simplefilter("ignore")
                write(file)
                difference, scale = _difference(load(file), network, plan, compared)
        except OSError:
            raise
        except Exception as error:  # exporters raise whatever the part that they cannot export raises
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            faults.append(f"{method}: {reason}")
            continue
        if difference <= TOLERANCE * max(1.0, scale):
            return {"method": method, "any_size": any_size, "max_abs_difference": difference, "sizes": compared}
        faults.append(f"{method}: differs by {difference:.3g} from the network, whose largest logit is {scale:.3g}")
    raise RunError(f"No exported file gives the same values as the network. {'; '.join(faults)}.")


def _torchscript_attempts(extra: dict[str, str], network: nn.Module, plan: dict[str, Any]) -> list[Attempt]:
    def save(module: Any, file: Path) -> None:
        buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.jit.save(module, buffer, _extra_files=extra)
        file.write_bytes(buffer.getbuffer())

    def load(file: Path) -> Forward:
        loaded: Forward = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
        return loaded

    def trace(file: Path) -> None:
        example = _noise(plan, plan["patch_size"])
        save(torch.jit.trace(network, example, check_trace=False), file)  # type: ignore[no-untyped-call]

    def script(file: Path) -> None:
        save(torch.jit.script(network), file)

    return [("script", True, script, load), ("trace", True, trace, load), ("trace", False, trace, load)]


def _onnx_attempts(extra: dict[str, str], network: nn.Module, plan: dict[str, Any]) -> list[Attempt]:
    """By tracing, many times faster and without onnxscript; last, with a fixed size, by torch.export."""

    def write(axes: dict[int, str] | None, file: Path) -> None:
        import onnx

        options: dict[str, Any] = {"input_names": ["image"], "output_names": ["pred"], "dynamo": axes is None}
        if axes is None:
            options |= {"external_data": False, "verbose": False}
        else:
            options |= {"opset_version": ONNX_OPSET, "dynamic_axes": {"image": axes, "pred": axes}}
        torch.onnx.export(network, (_noise(plan, plan["patch_size"]),), str(file), **options)
        model = onnx.load(str(file))
        onnx.helper.set_model_props(model, {k: v for k, v in extra.items() if k in ("plan.json", "metadata.json")})
        onnx.checker.check_model(model)
        onnx.save(model, str(file))

    spatial = {2 + i: name for i, name in enumerate("xyz"[: len(plan["patch_size"])])}
    return [
        ("onnx", True, partial(write, {0: "batch", **spatial}), _load_onnx),
        ("onnx", False, partial(write, {0: "batch"}), _load_onnx),
        ("onnx by torch.export", False, partial(write, None), _load_onnx),
    ]


def _load_onnx(file: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])


def _noise(plan: dict[str, Any], size: Sequence[int]) -> Tensor:
    return torch.randn(1, len(plan["channels"]), *size, generator=torch.Generator().manual_seed(0))


def _difference(exported: Forward, network: nn.Module, plan: dict[str, Any], sizes: list[Size]) -> tuple[float, float]:
    """Largest absolute difference over all sizes, and the largest logit."""
    largest, scale = torch.zeros(()), torch.zeros(())
    with torch.inference_mode():
        for size in sizes:
            image = _noise(plan, size)
            expected = network(image)
            largest = torch.maximum(largest, (exported(image) - expected).abs().max())  # NaN stays NaN
            scale = torch.maximum(scale, expected.abs().max())
    return float(largest), float(scale)
