"""A run's network as TorchScript or ONNX, held against the network itself before it is handed out."""

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
import yaml
from monai.bundle import ConfigParser
from torch import Tensor, nn

from medseg_supcon.bundle.model import load_model
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.files import remove_leftovers, write_whole
from medseg_supcon.networks import size_divisor
from medseg_supcon.plan import literal

CONFIGS = ("inference", "evaluate", "train")


def self_contained(config: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle config whose ``plan`` is the plan's content instead of a file's.

    The plan becomes an expression, not a sub-tree: its ``_target_`` entries must stay data until the config
    builds them.

    Args:
        config: a config's content with a key ``plan``; one without is copied as it is.
        plan: the content of ``plan.json``.

    Example:
        >>> from monai.bundle import ConfigParser
        >>> config = self_contained({"plan": "$open('plan.json')"}, {"name": "import a@b#c"})
        >>> ConfigParser(config).get_parsed_content("plan")
        {'name': 'import a@b#c'}
    """
    whole = copy.deepcopy(dict(config))
    if "plan" in whole:
        whole["plan"] = literal(dict(plan))
    return whole


def extra_files(run: Path, plan: Mapping[str, Any]) -> dict[str, str]:
    """name -> JSON text of a run's plan, metadata and configs, each config self-contained."""
    files = {"plan.json": json.dumps(plan)}
    metadata = run / "configs" / "metadata.json"
    if metadata.is_file():
        files["metadata.json"] = metadata.read_text(encoding="utf-8")
    for name in CONFIGS:
        path = run / "configs" / f"{name}.yaml"
        if path.is_file():
            files[f"{name}.json"] = json.dumps(self_contained(_config(path), plan))
    return files


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = ConfigParser.load_config_file(str(path))
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}). Restore it.") from error
    if not isinstance(config, Mapping):
        raise RunError(f"{path} holds no config, but {type(config).__name__}. Restore it.")
    return config


TOLERANCE = 1e-4  # of a logit, relative to the largest where that is above 1
ONNX_OPSET = 17

Size = tuple[int, ...]


def export_model(
    run: Path, format: Literal["torchscript", "onnx"], out: Path, trust: bool = False
) -> dict[str, Any]:
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
        ``file``, ``format``, ``method`` ("script", "trace", "onnx", ...), ``max_abs_difference`` (the
        largest of a logit from the network's), ``sizes`` (that were compared) and ``any_size`` (False: the
        file takes patches of the plan's size only).

    Raises:
        ConfigError: an unknown format, a plan that no plan can be, or a package for ONNX is not installed.
        RunError: no trained weights, they do not fit, or the exported network gives other values.
    """
    if format not in ("torchscript", "onnx"):
        raise ConfigError(f"--format {format}: known are torchscript and onnx.")
    if format == "onnx":
        _need("onnx", "onnxruntime")
    model = load_model(run, trust)
    plan, network = model.plan, model.network
    sizes = _probe_sizes(network, plan)
    attempts = (
        _torchscript_attempts(run, network, plan)
        if format == "torchscript"
        else _onnx_attempts(run, network, plan)
    )
    result: dict[str, Any] = {}

    def write(file: IO[bytes]) -> None:  # the exporters open it by its name
        result.update(_first_that_agrees(attempts, Path(file.name), network, plan, sizes))

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent)
        write_whole(out, write)
    except OSError as error:
        raise RunError(
            f"{out} could not be written ({error.strerror or error}). Free space, or choose another --out."
        ) from error
    return {"file": str(out), "format": format, **result}


Attempt = tuple[str, bool, Callable[[Path], None], Callable[[Path], Callable[[Tensor], Tensor]]]


def _first_that_agrees(
    attempts: Sequence[Attempt],
    file: Path,
    network: nn.Module,
    plan: Mapping[str, Any],
    sizes: Sequence[Size],
) -> dict[str, Any]:
    """Write the file in the first of several ways that gives the network's values."""
    faults = []
    for method, any_size, write, load in attempts:
        compared = list(sizes) if any_size else list(sizes[:1])
        try:
            with _quiet():
                write(file)
                difference, scale = _difference(load(file), network, plan, compared)
        except OSError:
            raise
        except Exception as error:  # exporters refuse a network in whatever way the part they meet does
            faults.append(
                f"{method}: {str(error).strip().partition(chr(10))[0][:200] or type(error).__name__}"
            )
            continue
        if difference <= TOLERANCE * max(1.0, scale):
            return {
                "method": method,
                "any_size": any_size,
                "max_abs_difference": difference,
                "sizes": compared,
            }
        faults.append(
            f"{method}: differs by {difference:.3g} from the network, whose largest logit is {scale:.3g}"
        )
    raise RunError(f"The network cannot be exported so that it gives the same values. {'; '.join(faults)}.")


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
    def writer(axes: dict[int, str] | None) -> Callable[[Path], None]:
        return lambda file: _write_onnx(file, network, plan, axes, extra_files(run, plan))

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
    extra: Mapping[str, str],
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
    onnx.helper.set_model_props(
        model, {name: extra[name] for name in ("plan.json", "metadata.json") if name in extra}
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])


def _probe_sizes(network: nn.Module, plan: Mapping[str, Any]) -> list[Size]:
    """The plan's patch, and the next larger one that the network takes."""
    patch = tuple(int(n) for n in plan["patch_size"])
    divisors = size_divisor(network, in_channels=len(plan["channels"]), spatial_dims=len(patch))
    return [patch, tuple(n + d for n, d in zip(patch, divisors, strict=True))]


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
    """torch says on every call that TorchScript is old, and prints its graph; what comes out is compared."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Exporting to ONNX needs {' and '.join(missing)}, not installed here. Install it with: "
            "pip install medseg-supcon[export]"
        )
