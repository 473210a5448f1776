"""A network from its definition in plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from medseg_supcon.errors import ConfigError

from ._tap import CONVOLUTIONS, FeatureTap


def build_network(
    network_def: Mapping[str, Any] | str, *, in_channels: int | None = None, num_classes: int | None = None
) -> nn.Module:
    """The network that a plan's ``network_def`` describes.

    Args:
        network_def: a dict with ``_target_`` (a class and its arguments) or a ``$`` expression over ``torch``
            and ``monai``, in the notation of MONAI bundles.
        in_channels: channels of the scans; ``None``: not checked.
        num_classes: C, background included; ``None``: not checked.

    Raises:
        ConfigError: the definition names no class, an argument is wrong, the result is not a network, or it
            does not take ``in_channels`` or give ``num_classes`` channels.

    Example:
        >>> build_network(
        ...     {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
        ... )
        Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    shown = _short(network_def)
    if isinstance(network_def, str) and not network_def.startswith("$"):
        raise ConfigError(
            f"network_def is the text {shown}: it must be a dict with _target_, or begin with $."
        )
    if isinstance(network_def, Mapping) and "_target_" not in network_def:
        raise ConfigError(f"network_def {shown} has no _target_: name the network's class there.")
    definition = dict(network_def) if isinstance(network_def, Mapping) else network_def
    try:
        network = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
    # whatever a class or an expression raises; the innermost cause says what is wrong with it
    except Exception as error:
        raise ConfigError(
            f"The network of the plan cannot be built from network_def {shown}: {_innermost(error)}. Correct "
            "the class name or its arguments in configs/plan.json."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network_def {shown} gives a {type(network).__name__}, not a torch.nn.Module.")
    _check_channels(network, shown, in_channels, num_classes)
    return network


def _check_channels(network: nn.Module, shown: str, in_channels: int | None, num_classes: int | None) -> None:
    # every network of MONAI defines the layer that reads the scan first
    taken = next((m.in_channels for m in network.modules() if isinstance(m, CONVOLUTIONS)), in_channels)
    if in_channels is not None and taken != in_channels:
        raise ConfigError(
            f"network_def {shown} takes {taken} channel(s), but the scans have {in_channels}: "
            f"set in_channels to {in_channels}."
        )
    if num_classes is None:
        return
    found = FeatureTap(network).out_channels
    if found != num_classes:
        raise ConfigError(
            f"network_def {shown} gives {found} channel(s), but the plan has {num_classes} classes, "
            f"background included: set its out_channels to {num_classes}."
        )


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(network_def: object) -> str:
    text = repr(network_def)
    return text if len(text) <= 200 else f"{text[:200]}..."
