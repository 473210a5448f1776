"""A run's network as TorchScript or ONNX, compared with the network before the file is handed out."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from medseg_supcon.bundle.configs import read_config
from medseg_supcon.bundle.model import load_model
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.files import remove_leftovers, write_whole
from medseg_supcon.networks import size_divisor
from medseg_supcon.plan import literal

CONFIGS = ("inference", "evaluate", "train")
SCRIPTS = "scripts/inference.py"
TOLERANCE = 1e-4  # of a logit, relative to the largest if that is above 1
ONNX_OPSET = 17

Size = tuple[int, ...]
Attempt = tuple[str, bool, Callable[[Path], None], Callable[[Path], Callable[[Tensor], Tensor]]]


def self_contained(config: Mapping[str, Any], plan: Mapping[str, Any], scripts: str = "") -> dict[str, Any]:
    """A bundle config that contains the plan and the scripts instead of reading their files.

    The plan becomes an expression, not a sub-tree: its ``_target_`` entries must stay data until the config
    builds them.

    Args:
        config: a config's content; its keys ``plan`` and ``scripts`` are replaced, if it has them.
        plan: the content of ``plan.json``.
        scripts: the text of ``scripts/inference.py``.

    Example:
        >>> from monai.bundle import ConfigParser
        >>> config = self_contained({"plan": "$open('plan.json')"}, {"name": "import a@b#c"})
        >>> ConfigParser(config).get_parsed_content("plan")
        {'name': 'import a@b#c'}
    """
    whole = copy.deepcopy(dict(config))
    if "plan" in whole:
        whole["plan"] = literal(dict(plan))
    if "scripts" in whole:
        source = literal(scripts)
        text = source[1:] if source.startswith("$") else repr(source)
        whole["scripts"] = f"$(lambda names: exec({text}, names) or names)({{'__name__': 'scripts'}})"
    return whole


def extra_files(run: Path, plan: Mapping[str, Any]) -> dict[str, str]:
    """name -> JSON text of a run's plan, metadata and configs, each config self-contained."""
    files = {"plan.json": json.dumps(plan)}
    metadata, scripts = run / "configs" / "metadata.json", run / SCRIPTS
    if metadata.is_file():
        files["metadata.json"] = metadata.read_text(encoding="utf-8")
    source = scripts.read_text(encoding="utf-8") if scripts.is_file() else ""
    for name in CONFIGS:
        path = run / "configs" / f"{name}.yaml"
        if path.is_file():
            files[f"{name}.json"] = json.dumps(self_contained(read_config(path), plan, source))
    return files


def export_model(run: Path, format: Literal["torchscript", "onnx"], out: Path, trust: bool = False) -> dict[str, Any]:
    """Write a run's network for use without this package, and compare it with the network.

    A TorchScript file loads with ``torch.jit.load`` alone, takes any size that the network takes, and carries
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
        raise ConfigError(
            f"Export to ONNX needs {' and '.join(missing)}, which is not installed. Run: "
            "pip install 'medseg-supcon[export]'"
        )
    model = load_model(run, trust)
    plan, network = model.plan, model.network
    attempts_for = _torchscript_attempts if format == "torchscript" else _onnx_attempts
    attempts = attempts_for(run, network, plan)
    result: dict[str, Any] = {}

    def write(file: IO[bytes]) -> None:  # the exporters open it by its name
        result.update(_first_that_agrees(attempts, Path(file.name), network, plan))

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent)
        write_whole(out, write)
    except OSError as error:
        raise RunError(
            f"{out} could not be written ({error.strerror or error}). Free disk space, or choose another --out."
        ) from error
    return {"file": str(out), "format": format, **result}


def _first_that_agrees(
    attempts: Sequence[Attempt], file: Path, network: nn.Module, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the file in the first of several ways that gives the network's values."""
    patch = tuple(int(n) for n in plan["patch_size"])
    divisors = size_divisor(network, in_channels=len(plan["channels"]), spatial_dims=len(patch))
    sizes = [patch, tuple(n + d for n, d in zip(patch, divisors, strict=True))]
    faults = []
    for method, any_size, write, load in attempts:
        compared = sizes if any_size else sizes[:1]
        try:
            with _quiet():
                write(file)
                difference, scale = _difference(load(file), network, plan, compared)
        except OSError:
            raise
        except Exception as error:  # exporters refuse a network in whatever way the part they meet does
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            faults.append(f"{method}: {reason}")
            continue
        if difference <= TOLERANCE * max(1.0, scale):
            return {
                "method": method,
                "any_size": any_size,
                "max_abs_difference": difference,
                "sizes": compared,
            }
        faults.append(f"{method}: differs by {difference:.3g} from the network, whose largest logit is {scale:.3g}")
    raise RunError(f"No exported file gives the same values as the network. {'; '.join(faults)}.")


def _torchscript_attempts(run: Path, network: nn.Module, plan: Mapping[str, Any]) -> list[Attempt]:
    extra = extra_files(run, plan)
    example = _noise(plan, tuple(plan["patch_size"]))

    def save(module: Any, file: Path) -> None:
        buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.jit.save(module, buffer, _extra_files=extra)
        file.write_bytes(buffer.getbuffer())

    def load(file: Path) -> Callable[[Tensor], Tensor]:
        loaded: Callable[[Tensor], Tensor] = torch.jit.load(  # type: ignore[no-untyped-call]
            str(file), map_location="cpu"
        )
        return loaded

    def traced(file: Path) -> None:
        module = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        save(module, file)

    return [
        ("script", True, lambda file: save(torch.jit.script(network), file), load),
        ("trace", True, traced, load),
        ("trace", False, traced, load),
    ]


def _onnx_attempts(run: Path, network: nn.Module, plan: Mapping[str, Any]) -> list[Attempt]:
    extra = extra_files(run, plan)
    properties: dict[str, str] = {name: extra[name] for name in ("plan.json", "metadata.json") if name in extra}

    def writer(axes: dict[int, str] | None) -> Callable[[Path], None]:
        return lambda file: _write_onnx(file, network, plan, axes, properties)

    spatial = {2 + i: name for i, name in enumerate("xyz"[: len(plan["patch_size"])])}
    return [
        ("onnx", True, writer({0: "batch", **spatial}), _load_onnx),
        ("onnx", False, writer({0: "batch"}), _load_onnx),
        ("onnx by torch.export", False, writer(None), _load_onnx),
    ]


def _write_onnx(
    file: Path,
    network: nn.Module,
    plan: Mapping[str, Any],
    axes: dict[int, str] | None,
    properties: dict[str, str],
) -> None:
    """With ``axes`` by tracing: many times faster, and needs no onnxscript; without by torch.export."""
    import onnx

    tracing: dict[str, Any] = {"opset_version": ONNX_OPSET, "dynamic_axes": {"image": axes, "pred": axes}}
    torch.onnx.export(
        network,
        (_noise(plan, tuple(plan["patch_size"])),),
        str(file),
        dynamo=axes is None,
        input_names=["image"],
        output_names=["pred"],
        **({"external_data": False, "verbose": False} if axes is None else tracing),
    )
    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])


def _noise(plan: Mapping[str, Any], size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, len(plan["channels"]), *size, generator=generator)


def _difference(
    exported: Callable[[Tensor], Tensor], network: nn.Module, plan: Mapping[str, Any], sizes: Sequence[Size]
) -> tuple[float, float]:
    """Largest absolute difference over all sizes, and the largest logit."""
    largest, scale = torch.zeros(()), torch.zeros(())
    with torch.inference_mode():
        for size in sizes:
            image = _noise(plan, size)
            expected = network(image)
            largest = torch.maximum(largest, (exported(image) - expected).abs().max())  # NaN stays NaN
            scale = torch.maximum(scale, expected.abs().max())
    return float(largest), float(scale)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's deprecation warnings and printed graphs; the result is compared anyway."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
