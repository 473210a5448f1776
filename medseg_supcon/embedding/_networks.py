"""The networks and projection heads of a run, before training and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import nn

from medseg_supcon.data import literal
from medseg_supcon.errors import RunError
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training import load_tensors

BEFORE, AFTER = "before training", "after training"
HEAD = "projection."  # its part of the names in checkpoint.pt


def networks_of(run: Path, device: torch.device) -> dict[str, ContrastiveNetwork]:
    """The run's network as its seed (and its ``--init``) made it, and as training left it; in evaluation mode.

    Raises:
        RunError: the weights do not fit the plan's network.
    """
    before = _begun(run, "network")
    after = _config(run).get_parsed_content("network_def")
    try:
        after.load_state_dict(load_tensors(run / "models" / "model.pt"))
    except RuntimeError as error:
        raise RunError(
            f"{run}: models/model.pt does not fit network_def of the plan ({str(error).splitlines()[0]})."
        ) from None
    made = {BEFORE: before, AFTER: after}
    return {when: ContrastiveNetwork(network).to(device).eval() for when, network in made.items()}


def heads_of(run: Path) -> tuple[dict[str, nn.Module], str]:
    """The projection head before and after training, or none and a sentence that says why."""
    parser = _config(run)
    checkpoint = run / "models" / "checkpoint.pt"
    if parser.get("projection") is None:
        return {}, "The run has no projection head: features only."
    if "contrast_weight" in parser and parser.get_parsed_content("contrast_weight") == 0:
        return {}, "The run's contrast weight is 0, its projection head was not trained: features only."
    if not checkpoint.exists():
        return {}, "The run has no models/checkpoint.pt, which holds the projection head: features only."
    saved = load_tensors(checkpoint)["state"]["loss"]
    prefixes = sorted({key.split(HEAD, 1)[0] for key in saved if HEAD in key}, key=len)
    if not prefixes:
        return {}, "The run has not kept its projection head: features only."
    prefix = prefixes[0] + HEAD
    heads: dict[str, nn.Module] = {when: _begun(run, "projection").eval() for when in (BEFORE, AFTER)}
    heads[AFTER].load_state_dict(
        {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    )
    return heads, ""


def _config(run: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = literal(str(run))
    parser["device"] = (
        "$torch.device('cpu')"  # what a run began from does not depend on where it is looked at
    )
    return parser


def _begun(run: Path, key: str) -> Any:
    """``network`` or ``projection`` as the run's seed makes it; the head is drawn after the network."""
    parser = _config(run)
    set_determinism(seed=int(parser.get_parsed_content("seed")))
    network = parser.get_parsed_content("network")
    made = network if key == "network" else parser.get_parsed_content(key)
    set_determinism(seed=None)
    return made
