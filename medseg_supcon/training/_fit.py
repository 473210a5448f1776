"""What a plan takes from an earlier run, and from its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medseg_supcon.data import read_plan
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.networks import build_network, round_patch, size_divisor

FROM_INIT = ("channels", "orientation", "spacing", "intensity", "patch_size", "network_def")
GROWTHS = 8  # of a patch that is too small for the network


def inherit(plan: dict[str, Any], init: Path) -> None:
    """Take from an earlier run what its weights depend on."""
    if not all((init / name).is_file() for name in ("configs/plan.json", "models/model.pt")):
        raise RunError(
            f"--init {init}: not a trained run (configs/plan.json and models/model.pt are needed)."
        )
    earlier = read_plan(init / "configs" / "plan.json")
    if len(earlier["channels"]) != len(plan["channels"]):
        raise ConfigError(
            f"--init {init} was trained on {len(earlier['channels'])} channel(s) per scan, this data set has "
            f"{len(plan['channels'])}. Choose a run with the same channels."
        )
    if len(earlier["labels"]) != len(plan["labels"]):
        raise ConfigError(
            f"--init {init} knows {len(earlier['labels'])} classes ({', '.join(earlier['labels'])}), this data set has "
            f"{len(plan['labels'])}. Fine-tune on a data set with the same classes."
        )
    plan.update({key: earlier[key] for key in FROM_INIT})


def fit_patch(plan: dict[str, Any]) -> None:
    """Round the patch to what the network divides by, and enlarge it until the network can train on it.

    A norm has nothing to normalise where the deepest level is a single voxel; the shortest axis grows then.
    """
    channels = len(plan["channels"])
    network = build_network(plan["network_def"], in_channels=channels, num_classes=len(plan["labels"]))
    divisor = size_divisor(network, in_channels=channels)
    patch = [int(n) for n in round_patch(plan["patch_size"], divisor)]
    skeleton = network.to("meta").train()
    for _ in range(GROWTHS):
        try:
            skeleton(torch.empty(2, channels, *patch, device="meta"))
            break
        except ValueError:  # torch's "Expected more than 1 spatial element when training"
            axis = patch.index(min(patch))
            patch[axis] += max(divisor[axis], 8)
    plan["patch_size"] = patch
