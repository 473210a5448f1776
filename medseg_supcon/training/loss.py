"""From a batch of two views to the loss, and what the validation's metrics look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_supcon.losses import IGNORE_INDEX, DiceSupConLoss
from medseg_supcon.training.ranks import sum_over_ranks

Target = dict[str, Tensor]
SMOOTH = 1e-5  # MONAI's, in numerator and denominator of Dice


def prepare_views(
    batchdata: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Target]:
    """MONAI ``prepare_batch``: (B, 2, C, *patch) views become 2B patches, view 1 and 2 of a scan side by side.

    Returns:
        image (2B, C, *patch) and the target: ``label`` (2B, 1, *patch) class indices with -1 for voxels without a
        label, ``pair_ids`` (2B, 1, *patch), ``view_ids`` (2B,) 0 or 1, ``scan_ids`` (2B,).
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
    """Calls ``DiceSupConLoss`` as a MONAI trainer calls a loss: ``loss(prediction, target)``.

    The prediction is ``ContrastiveNetwork``'s, logits (2B, C, *patch) and features (2B, F, *patch); the target is that
    of :func:`prepare_views`.
    """

    def __init__(self, loss: DiceSupConLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def terms(self) -> dict[str, Tensor]:
        return self.loss.terms

    def forward(self, prediction: tuple[Tensor, Tensor], target: Target) -> Tensor:
        logits, features = prediction
        ids = {name: target.get(name) for name in ("pair_ids", "view_ids", "scan_ids")}
        loss: Tensor = self.loss(logits, target["label"], features, **ids)
        return loss


class DiceCrossEntropy(nn.Module):
    """Dice loss of the foreground classes plus cross-entropy, over the batch of all ranks.

    MONAI's ``DiceCELoss`` has no ``ignore_index``. Dice is taken over the whole batch, which is steadier when a
    patch lacks a class.

    Args:
        dice_weight, ce_weight: factors of the two terms.
        class_weights: (C,) weights of the cross-entropy, or ``None``.
        ignore_index: label of voxels left out.

    Shape:
        logits (B, C, *spatial) and labels (B, 1, *spatial) of class indices give a scalar; 0, attached to the
        graph, if every voxel is ignored.

    Example:
        >>> loss = DiceCrossEntropy()
        >>> float(loss(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), -1)))
        0.0
    """

    class_weights: Tensor | None

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.dice_weight, self.ce_weight, self.ignore_index = dice_weight, ce_weight, ignore_index
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.float(), labels.long()
        known, target = (labels != self.ignore_index).to(logits.dtype), labels.clamp_min(0)
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights
        total = F.cross_entropy(logits, labels[:, 0], weights, ignore_index=self.ignore_index, reduction="sum")
        # the mean by hand: if every voxel is ignored, torch's is 0 / 0
        sums = sum_over_ranks(torch.stack((total, (weights[target] * known).sum())))
        ce = sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
        if self.dice_weight == 0:
            return self.ce_weight * ce
        p = logits.softmax(1)[:, 1:] * known
        y = torch.zeros_like(logits).scatter_(1, target, 1.0)[:, 1:] * known
        axes = [0, *range(2, p.ndim)]
        tp, p_sum, y_sum = sum_over_ranks(torch.stack([x.sum(axes) for x in (p * y, p, y)]))
        fp, fn = p_sum - tp, y_sum - tp
        dice: Tensor = (1 - (2 * tp + SMOOTH) / (2 * (tp + 0.5 * fp + 0.5 * fn) + SMOOTH)).mean()
        return self.dice_weight * dice + self.ce_weight * ce


def label_pairs(output: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """``ignite`` output transform: predicted and reference class indices, (1, X, Y, Z) each; -1 stays for the metric."""
    predictions = [torch.as_tensor(o["pred"]).argmax(0, keepdim=True) for o in output]
    return predictions, [torch.as_tensor(o["label"]) for o in output]
