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
from monai.bundle import ConfigParser
from monai.transforms import (
    Compose,
    ConcatItemsd,
    DeleteItemsd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    Spacingd,
    SplitDimd,
)
from monai.transforms.intensity import dictionary as intensity

from medseg_supcon.bundle.trust import check_plan_trusted, is_plain_run
from medseg_supcon.errors import ConfigError, MedsegError, RunError
from medseg_supcon.networks import build_network
from medseg_supcon.plan import literal, plan_preprocessing, read_plan

SIMPLE = (Orientationd, Spacingd, EnsureTyped, SplitDimd, ConcatItemsd, DeleteItemsd)


@dataclass(frozen=True)
class Model:
    """What a run predicts with.

    Attributes:
        name: the run folder's name.
        plan: its plan.json.
        network: in eval mode, on the CPU.
        preprocessing: what follows the loading of a scan (a dict with ``image``).
        simple: it only turns, resamples and changes intensities, so that the way back is a closed form.
        preprocessing_def: its definition in the plan or config.
        sha256: of models/model.pt.
        warnings: what users should know before they use its masks.
    """

    name: str
    plan: dict[str, Any]
    network: torch.nn.Module
    preprocessing: Compose
    simple: bool
    preprocessing_def: Any
    sha256: str
    warnings: tuple[str, ...] = ()


def load_model(run: str | Path, trust: bool = False) -> Model:
    """Load a run; weights only, even with `trust`.

    Args:
        run: the run's folder.
        trust: run its config and plan even if they are not what medseg writes.

    Raises:
        RunError: it is not a run, is incomplete or damaged, has weights that are NaN or infinite, or contains foreign
            code and is not trusted.
        ConfigError: its plan is invalid.
    """
    run = Path(run)
    config, plan_file = run / "configs" / "inference.yaml", run / "configs" / "plan.json"
    weights = run / "models" / "model.pt"
    for file in (config, plan_file, weights):
        if not file.is_file():
            raise RunError(f"{file} is missing. {run} has not been trained to the end: train it, or pass another run.")
    plan = read_plan(plan_file)
    network, preprocessing, definition = _built(run, plan, trust)
    transforms = list(preprocessing.flatten().transforms)
    if not isinstance(transforms[0], LoadImaged):
        raise RunError(f"{config}: preprocessing must start with LoadImaged, found {type(transforms[0]).__name__}.")
    try:
        network.load_state_dict(load_tensors(weights))
    except MedsegError:
        raise
    except Exception as error:  # other names or shapes, or not a mapping of tensors at all
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise RunError(f"{weights} does not contain the weights of the plan's network: {reason}.") from error
    simple = all(isinstance(t, SIMPLE) or type(t).__module__ == intensity.__name__ for t in transforms[1:])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name, steps = run.absolute().name, Compose(transforms[1:])
    return Model(name, plan, network.eval(), steps, simple, definition, digest, _training_warnings(run))


def _training_warnings(run: Path) -> tuple[str, ...]:
    """A sentence if a checkpoint says that training was interrupted."""
    path = run / "models" / "checkpoint.pt"
    try:  # mapped: tensors are not read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        unfinished = checkpoint["finished"] is False
        epochs = f"{int(checkpoint['epoch'])} of {int(checkpoint['max_epochs'])}"
    except Exception:  # none, damaged, or of another program: nothing is known
        return ()
    if not unfinished:
        return ()
    return (
        f"the training of {run} was interrupted after {epochs} epochs; these are the best weights so far. To finish it: "
        "medseg train --resume",
    )


def scan_preprocessing(run: Path, trust: bool = False) -> Compose:
    """A run's preprocessing of a scan's file (key ``image``): `load_model`'s, with the loading.

    Raises:
        RunError, ConfigError: as `load_model`.
    """
    return _built(run, read_plan(run / "configs" / "plan.json"), trust)[1]


def inference_of_cases(run: str | Path, cases: Sequence[Mapping[str, Any]], out: str) -> ConfigParser:
    """A run's inference.yaml for the cases of a data list instead of the scans in a folder; evaluate.yaml uses it.

    Args:
        run: the run's folder.
        cases: ``{"name", "image": path or paths}``; a mask gets the name of its case.
        out: folder of the masks.
    """
    images = [case["image"] for case in cases]
    first = [image if isinstance(image, str) else image[0] for image in images]
    names = {file: f"{case['name']}.nii.gz" for file, case in zip(first, cases, strict=True)}
    parser = ConfigParser()
    parser.read_config(f"{run}/configs/inference.yaml")
    changes = {"bundle_root": str(run), "output_dir": out, "mask_names": names}
    parser.update({key: literal(value) for key, value in changes.items()})
    return parser


def _built(run: Path, plan: dict[str, Any], trust: bool) -> tuple[torch.nn.Module, Compose, Any]:
    """Network, preprocessing and its definition: of the plan, or of the config if it is code and trusted."""
    if is_plain_run(run, plan):
        return _from_plan(run, plan)
    check_plan_trusted(run, plan, trust)
    return _evaluated(run, run / "configs" / "inference.yaml")


def _from_plan(run: Path, plan: dict[str, Any]) -> tuple[torch.nn.Module, Compose, Any]:
    """Network and preprocessing of plan.json as plain data: nothing of the run is evaluated."""
    definition = [plan["orientation"], plan["spacing"], plan["intensity"]]
    try:
        return build_network(plan["network_def"]), plan_preprocessing(plan), definition
    except ConfigError as error:
        raise RunError(f"{run / 'configs' / 'plan.json'}: {error}") from error
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # whatever a transform of MONAI raises for its arguments
        raise _cannot_be_built(run, error) from error


def _evaluated(run: Path, config: Path) -> tuple[torch.nn.Module, Compose, Any]:
    """Network and preprocessing of a trusted run's inference.yaml."""
    try:
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update({"bundle_root": literal(str(run))})
        network = parser.get_parsed_content("network_def")
        preprocessing = parser.get_parsed_content("preprocessing")
    except Exception as error:  # whatever a config makes a constructor of torch or MONAI raise
        raise _cannot_be_built(run, error.__cause__ or error) from error
    if not (isinstance(network, torch.nn.Module) and isinstance(preprocessing, Compose)):
        raise RunError(f"{config}: network_def must be a network, and preprocessing a Compose of transforms.")
    return network, preprocessing, parser.config["preprocessing"]


def _cannot_be_built(run: Path, cause: BaseException) -> RunError:
    plan = run / "configs" / "plan.json"
    return RunError(f"{run}: the network or the preprocessing cannot be built from {plan} ({cause}). Correct the plan.")


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """Load a file of finite tensors and plain values; nothing in it is run, even with ``--trust``.

    Raises:
        RunError: the file is missing, cannot be read, is damaged, contains a tensor with NaN or infinity, or anything
            else.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused right after
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist. Train the run first: medseg train DATASET --out RUN.") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a file that was cut short
            raise RunError(f"{path} is damaged: {error}. Copy it again.") from error
        raise RunError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = " ".join(str(error).split())[:150].rstrip(".") or "it is empty or cut short"
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise RunError(  # without torch's message, which advises to run what is in the file
                f"{path} was not loaded: it is damaged, or it contains more than weights and could run any code. Get "
                "the weights (a state dict) from a source that you trust."
            ) from error
        raise RunError(f"{path} is damaged or not a file of weights: {reason}.") from error
    if name := _not_finite(content, ""):
        raise RunError(
            f"{path}: {name} contains NaN or infinity, so the network is useless. Copy the file again, or train again."
        )
    return content


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
