"""From a batch of two-view items to the network's input and the loss's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medseg_supcon.losses import DiceSupConLoss

Target = dict[str, Tensor]


def prepare_views(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Target]:
    """MONAI ``prepare_batch``: (B, 2, C, *patch) views become 2B patches, view 1 and 2 of a scan side by side.

    Returns:
        image (2B, C, *patch) and the target: ``label`` (2B, 1, *patch) class indices with -1 where nobody
        labelled, ``pair_ids`` (2B, 1, *patch), ``view_ids`` (2B,) 0 or 1, ``scan_ids`` (2B,).
    """
    image: Tensor = batchdata["image"]
    scans, views = image.shape[:2]

    def to(x: Tensor) -> Tensor:
        return x.flatten(0, 1).to(device=device, non_blocking=non_blocking, **kwargs)

    view_ids = torch.arange(views, device=device).repeat(scans)
    scan_ids = torch.arange(scans, device=device).repeat_interleave(views)
    target = {"label": to(batchdata["label"]), "view_ids": view_ids, "scan_ids": scan_ids}
    if "pair_ids" in batchdata:
        target["pair_ids"] = to(batchdata["pair_ids"])
    return to(image), target


class TwoViewLoss(nn.Module):
    """Gives ``DiceSupConLoss`` the face a MONAI trainer calls: ``loss(prediction, target)``.

    Args:
        loss: the joint loss.

    Shape:
        prediction: logits (2B, C, *patch) and features (2B, F, *patch), as ``ContrastiveNetwork`` gives them;
        target: what :func:`prepare_views` returns.
    """

    def __init__(self, loss: DiceSupConLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def terms(self) -> dict[str, Tensor]:
        """The terms of the last call, detached."""
        return self.loss.terms

    def forward(self, prediction: tuple[Tensor, Tensor], target: Target) -> Tensor:
        logits, features = prediction
        loss: Tensor = self.loss(
            logits,
            target["label"],
            features,
            pair_ids=target.get("pair_ids"),
            view_ids=target["view_ids"],
            scan_ids=target["scan_ids"],
        )
        return loss
