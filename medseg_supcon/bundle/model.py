"""A run's model: its plan, network, weights and preprocessing, loaded once."""

from __future__ import annotations

import hashlib
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

from medseg_supcon.bundle.tensors import load_tensors
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
        preprocessing_def: what the plan or config says of it.
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
    network, preprocessing, written = _built(run, plan, trust)
    transforms = list(preprocessing.flatten().transforms)
    if not isinstance(transforms[0], LoadImaged):
        raise RunError(
            f"{config}: preprocessing must begin with LoadImaged, found {type(transforms[0]).__name__}."
        )
    _load_weights(network, weights)
    simple = all(isinstance(t, SIMPLE) or type(t).__module__ == intensity.__name__ for t in transforms[1:])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name, steps = run.absolute().name, Compose(transforms[1:])
    return Model(name, plan, network.eval(), steps, simple, written, digest)


def scan_preprocessing(run: Path, trust: bool = False) -> Compose:
    """A run's preprocessing of a scan's file (key ``image``), `load_model`'s with the loading.

    Raises:
        RunError, ConfigError: as `load_model`.
    """
    return _built(run, read_plan(run / "configs" / "plan.json"), trust)[1]


def _built(run: Path, plan: dict[str, Any], trust: bool) -> tuple[torch.nn.Module, Compose, Any]:
    """Network, preprocessing and what is written of it: of the plan, or of the config where it is code and trusted."""
    if is_plain_run(run, plan):
        return _from_plan(run, plan)
    check_plan_trusted(run, plan, trust)
    return _evaluated(run, run / "configs" / "inference.yaml")


def _from_plan(run: Path, plan: dict[str, Any]) -> tuple[torch.nn.Module, Compose, Any]:
    """Network and preprocessing of plan.json as plain data: nothing of the run is evaluated."""
    written = [plan["orientation"], plan["spacing"], plan["intensity"]]
    try:
        return build_network(plan["network_def"]), plan_preprocessing(plan), written
    except ConfigError as error:
        raise RunError(f"{run / 'configs' / 'plan.json'}: {error}") from error
    except (MedsegError, MemoryError):
        raise
    except Exception as error:  # whatever a transform of MONAI raises for its arguments
        raise _cannot_be_made(run, error) from error


def _evaluated(run: Path, config: Path) -> tuple[torch.nn.Module, Compose, Any]:
    """Network and preprocessing of a trusted run's inference.yaml."""
    try:
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update({"bundle_root": literal(str(run))})
        network = parser.get_parsed_content("network_def")
        preprocessing = parser.get_parsed_content("preprocessing")
    except Exception as error:  # whatever a config makes a constructor of torch or MONAI raise
        raise _cannot_be_made(run, error.__cause__ or error) from error
    if not (isinstance(network, torch.nn.Module) and isinstance(preprocessing, Compose)):
        raise RunError(f"{config}: network_def must be a network, and preprocessing a Compose of transforms.")
    return network, preprocessing, parser.config["preprocessing"]


def _cannot_be_made(run: Path, cause: BaseException) -> RunError:
    plan = run / "configs" / "plan.json"
    return RunError(f"{run}: network or preprocessing cannot be made from {plan} ({cause}). Correct it.")


def _load_weights(network: torch.nn.Module, file: Path) -> None:
    state = load_tensors(file)
    try:
        network.load_state_dict(state)
    except Exception as error:  # other names or shapes, or not a mapping of tensors at all
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{file} does not hold the weights of the plan's network: {reason}.") from error
