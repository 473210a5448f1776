"""A run's model: its plan, network, weights and preprocessing, loaded once."""

from __future__ import annotations

import hashlib
import pickle
import warnings
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

from medseg_supcon.bundle.trust import check_trusted
from medseg_supcon.errors import RunError
from medseg_supcon.plan import literal, read_plan

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
        preprocessing_def: what the config says of it.
        sha256: of models/model.pt.
    """

    name: str
    plan: dict[str, Any]
    network: torch.nn.Module
    preprocessing: Compose
    simple: bool
    preprocessing_def: Any
    sha256: str


def load_model(run: str | Path, trust: bool = False) -> Model:
    """Loads a run; weights only, whatever `trust` says.

    Args:
        run: the run's folder.
        trust: run its config and plan even where they are not of the shape that medseg writes.

    Raises:
        RunError: it is no run, is incomplete or damaged, or holds foreign code and is not trusted.
        ConfigError: its plan was edited into what no plan can be.
    """
    run = Path(run)
    config, plan_file = run / "configs" / "inference.yaml", run / "configs" / "plan.json"
    weights = run / "models" / "model.pt"
    for file in (config, plan_file, weights):
        if not file.is_file():
            raise RunError(
                f"{file} is missing: is {run} a run that medseg train finished? Train it, or give another."
            )
    plan = read_plan(plan_file)
    if not trust:
        check_trusted(run, config, plan)
    try:
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update({"bundle_root": literal(str(run))})
        network = parser.get_parsed_content("network_def")
        preprocessing = parser.get_parsed_content("preprocessing")
    except Exception as error:  # whatever a plan makes a constructor of torch or MONAI raise
        cause = error.__cause__ or error
        raise RunError(
            f"{run}: network or preprocessing cannot be made from {plan_file} ({cause}). Mend it."
        ) from error
    transforms = list(preprocessing.flatten().transforms)
    if not isinstance(transforms[0], LoadImaged):
        raise RunError(
            f"{config}: preprocessing must begin with LoadImaged, found {type(transforms[0]).__name__}."
        )
    _load_weights(network, weights)
    simple = all(isinstance(t, SIMPLE) or type(t).__module__ == intensity.__name__ for t in transforms[1:])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name, steps, written = run.absolute().name, Compose(transforms[1:]), parser.config["preprocessing"]
    return Model(name, plan, network.eval(), steps, simple, written, digest)


def _load_weights(network: torch.nn.Module, file: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused right after
            state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{file} is damaged or holds more than weights, and was not loaded: such a file can run any "
            "code. Get the weights (a state dict) from where you trust them."
        ) from error
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno is None:
            raise
        raise RunError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from error
    except Exception as error:  # a damaged pickle can make torch raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{file} does not hold the weights of the plan's network, or is damaged: {reason}."
        ) from error
