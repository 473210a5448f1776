"""How a plan normalises intensities: stock MONAI transforms only, as config dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg_supcon.data._fingerprint import readable

__all__ = ["intensity_transforms"]


def intensity_transforms(
    channels: Sequence[str], foreground: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Transform configs for key ``image`` that bring a scan to about zero mean and unit variance.

    CT is in absolute units: clipped to the 0.5 and 99.5 percentiles of the structures' intensities, then
    shifted and scaled by their mean and standard deviation (nnU-Net's rule). Any other channel has no common
    scale and is normalised per scan. Where both kinds occur, the channels are taken apart, treated each in
    its way, and stacked again.

    Args:
        channels: names in order, of which several may be equal; "CT" in any case is CT.
        foreground: per channel "mean", "std", "percentile_00_5", "percentile_99_5" inside the structures.
    """
    is_ct = [name.strip().lower() == "ct" for name in channels]
    if not any(is_ct):
        return [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}]
    if len(channels) == 1:
        return [_window("image", foreground[0])]
    postfixes = [str(index) for index in range(len(channels))]
    keys = [f"image_{postfix}" for postfix in postfixes]
    steps: list[dict[str, Any]] = [
        {"_target_": "SplitDimd", "keys": "image", "output_postfixes": postfixes, "dim": 0, "keepdim": True}
    ]
    for key, stats, ct in zip(keys, foreground, is_ct, strict=True):
        steps.append(_window(key, stats) if ct else {"_target_": "NormalizeIntensityd", "keys": key})
    steps.append({"_target_": "ConcatItemsd", "keys": keys, "name": "image", "dim": 0})
    steps.append({"_target_": "DeleteItemsd", "keys": keys})
    return steps


def _window(key: str, stats: Mapping[str, float]) -> dict[str, Any]:
    low, high = stats["percentile_00_5"], stats["percentile_99_5"]
    if not high > low:
        low, high = low - 0.5, low + 0.5
    mean, std = stats["mean"], stats["std"] or 1.0
    return {
        "_target_": "ScaleIntensityRanged",
        "keys": key,
        "a_min": readable(low, 6),
        "a_max": readable(high, 6),
        "b_min": readable((low - mean) / std, 6),
        "b_max": readable((high - mean) / std, 6),
        "clip": True,
    }
