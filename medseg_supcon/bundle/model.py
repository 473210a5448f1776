"""A run's model: its plan, network, weights and preprocessing, loaded once."""

from __future__ import annotations

import errno
import hashlib
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai import transforms as mt
from monai.bundle import ConfigParser
from monai.transforms.intensity import dictionary as intensity

from medseg_supcon.bundle.folder import has_folds
from medseg_supcon.bundle.trust import is_plain_run
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.networks import build_network
from medseg_supcon.plan import literal, plan_preprocessing, read_plan

SIMPLE = (mt.Orientationd, mt.Spacingd, mt.EnsureTyped, mt.SplitDimd, mt.ConcatItemsd, mt.DeleteItemsd)


@dataclass(frozen=True)
class Model:
    """What a run predicts with."""

    name: str  # the run folder's
    plan: dict[str, Any]
    network: torch.nn.Module  # in eval mode, on the CPU
    preprocessing: mt.Compose  # what follows the loading of a scan (a dict with ``image``)
    simple: bool  # it only turns, resamples and changes intensities, so that the way back is a closed form
    preprocessing_def: Any  # its definition in the plan or config
    sha256: str  # of models/model.pt
    warnings: tuple[str, ...]  # what users should know before they use its masks


def load_model(run: str | Path, trust: bool = False) -> Model:
    """Load a run. With `trust`, code in its config and plan is run even if medseg did not write it; weights are only read.

    Raises:
        RunError: it is not a run, is incomplete or damaged, has weights that are NaN or infinite, or contains foreign
            code and is not trusted.
        ConfigError: its plan is invalid.
    """
    run = Path(run)
    if has_folds(run):
        raise RunError(f"{run} is a folder of folds, not one run. Pass one of them, such as {run / 'fold_0'}.")
    config, plan_file = run / "configs" / "inference.yaml", run / "configs" / "plan.json"
    weights = run / "models" / "model.pt"
    for file in (config, plan_file, weights):
        if not file.is_file():
            raise RunError(f"{file} is missing. {run} has not been trained to the end: train it, or pass another run.")
    plan = read_plan(plan_file)
    network, preprocessing, definition = _built(run, plan, trust)
    load, *transforms = preprocessing.flatten().transforms or [None]
    if not isinstance(load, mt.LoadImaged):
        raise RunError(f"{config}: preprocessing must start with LoadImaged, found {type(load).__name__}.")
    state = load_tensors(weights)
    try:
        network.load_state_dict(state)
    except Exception as error:  # other names or shapes, or not a mapping of tensors at all
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise RunError(f"{weights} does not contain the weights of the plan's network: {reason}.") from error
    simple = all(isinstance(t, SIMPLE) or type(t).__module__ == intensity.__name__ for t in transforms)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name, steps = run.absolute().name, mt.Compose(transforms)
    return Model(name, plan, network.eval(), steps, simple, definition, digest, _training_warnings(run))


def _training_warnings(run: Path) -> tuple[str, ...]:
    """A sentence if a checkpoint says that training was interrupted."""
    try:  # mapped: tensors are not read
        saved = torch.load(run / "models" / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        finished, epochs = saved["finished"], f"{int(saved['epoch'])} of {int(saved['max_epochs'])}"
    except Exception:  # none, damaged, or of another program: nothing is known
        return ()
    text = f"the training of {run} was interrupted after {epochs} epochs; these are the best weights so far."
    return (f"{text} To finish it: medseg train --resume",) if finished is False else ()


def scan_preprocessing(run: Path, trust: bool = False) -> mt.Compose:
    """A run's preprocessing of a scan's file (key ``image``): `load_model`'s, with the loading."""
    return _built(run, read_plan(run / "configs" / "plan.json"), trust)[1]


def inference_of_cases(run: str | Path, cases: Sequence[Mapping[str, Any]], out: str) -> ConfigParser:
    """A run's inference.yaml for cases (``{"name", "image": path or paths}``) instead of the scans in a folder.

    evaluate.yaml uses it. A mask in the folder ``out`` gets the name of its case.
    """
    images = [case["image"] for case in cases]
    first = [image if isinstance(image, str) else image[0] for image in images]
    names = {file: f"{case['name']}.nii.gz" for file, case in zip(first, cases, strict=True)}
    parser = ConfigParser()
    parser.read_config(f"{run}/configs/inference.yaml")
    changes = {"bundle_root": str(run), "output_dir": out, "mask_names": names}
    parser.update({key: literal(value) for key, value in changes.items()})
    return parser


def _built(run: Path, plan: dict[str, Any], trust: bool) -> tuple[torch.nn.Module, mt.Compose, Any]:
    """Network, preprocessing and its definition: of the plan as plain data, or of a trusted run's inference.yaml."""
    config, plan_file = run / "configs" / "inference.yaml", run / "configs" / "plan.json"
    plain = is_plain_run(run, plan, trust)
    try:
        if plain:  # nothing of the run is evaluated
            definition = [plan["orientation"], plan["spacing"], plan["intensity"]]
            return build_network(plan["network_def"]), plan_preprocessing(plan), definition
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update({"bundle_root": literal(str(run))})
        network, preprocessing = (parser.get_parsed_content(key) for key in ("network_def", "preprocessing"))
    except MemoryError:
        raise
    except ConfigError as error:
        raise RunError(f"{plan_file}: {error}") from error
    except Exception as error:  # whatever a class of torch or MONAI raises for its arguments
        what = f"the network or the preprocessing cannot be built from {plan_file} ({error.__cause__ or error})"
        raise RunError(f"{run}: {what}. Correct the plan.") from error
    if not (isinstance(network, torch.nn.Module) and isinstance(preprocessing, mt.Compose)):
        raise RunError(f"{config}: network_def must be a network, and preprocessing a Compose of transforms.")
    return network, preprocessing, parser.config["preprocessing"]


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """Load a file of finite tensors and plain values; nothing in it is run, even with ``--trust``.

    Raises:
        RunError: the file is missing, cannot be read, is damaged, or contains a tensor with NaN or infinity, or
            anything else than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused right after
            content = torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise RunError(f"{path} {_why_not_loaded(error)}") from error
    if name := _not_finite(content, ""):
        raise RunError(f"{path}: {name} contains NaN or infinity. Copy the file again, or train again.")
    return content


def _why_not_loaded(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist. Train the run first: medseg train DATASET --out RUN."
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # those: a file that was cut short
        return f"cannot be read ({error.strerror}). Check its permissions."
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        # without torch's message, which advises to run what is in the file
        return "was not loaded: it is damaged, or it contains code. Get the weights from a source that you trust."
    reason = " ".join(str(error).split())[:150].rstrip(".") or "it is empty or cut short"
    return f"is damaged or not a file of weights: {reason}. Copy it again."


def _not_finite(content: Any, name: str) -> str | None:
    """The name of the first tensor with a value that is not finite."""
    if isinstance(content, torch.Tensor):
        return None if not content.is_floating_point() or content.isfinite().all() else name or "the tensor"
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        parts = content.items()
    elif isinstance(content, list | tuple):
        parts = enumerate(content)
    names = (_not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, names), None)
