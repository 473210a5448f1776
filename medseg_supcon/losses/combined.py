"""Dice and contrast together, with each term kept for logging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medseg_supcon.losses.checks import check_number


class DiceSupConLoss(nn.Module):
    """segmentation_loss + w(step) * contrastive_loss, with a linear warm-up of w.

    Step t = 1, 2, ... (one for each forward pass in training mode) has w = weight * min(1, t / warmup_steps). The
    first is above 0, so every parameter has a gradient from the start, as DDP needs.

    Args:
        segmentation_loss: called with (logits, labels): MONAI's DiceCELoss, say.
        contrastive_loss: called with (features, labels) and pair_ids, view_ids, scan_ids, logits: a
            `VoxelSupConLoss`. Its projection's parameters are parameters of this module.
        weight: final weight of the contrast, >= 0. At 0 the contrast is not computed.
        warmup_steps: steps until w is `weight`; 0: from the first step on.

    Attributes:
        terms: the last call's detached scalars: "loss", "segmentation", "contrastive", "contrast_weight".
        step: steps so far, a buffer, so checkpoints contain it.

    Raises:
        ValueError, TypeError: weight is not a finite number >= 0, or warmup_steps not an integer >= 0.

    Example:
        >>> dice, contrast = (lambda logits, labels: logits.mean()), (lambda f, labels, **ids: f.sum())
        >>> both = DiceSupConLoss(dice, contrast, weight=0.5, warmup_steps=2)
        >>> [both(torch.ones(2), torch.ones(2), torch.ones(4)).item() for _ in range(3)]
        [2.0, 3.0, 3.0]
    """

    step: Tensor

    def __init__(
        self,
        segmentation_loss: Callable[..., Tensor],
        contrastive_loss: Callable[..., Tensor],
        weight: float = 0.1,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_number("weight", weight, 0)
        check_number("warmup_steps", warmup_steps, 0, integer=True)
        self.segmentation_loss, self.contrastive_loss = segmentation_loss, contrastive_loss
        self.weight, self.warmup_steps = float(weight), warmup_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.terms: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, labels: Tensor, features: Tensor | None = None, **ids: Tensor | None) -> Tensor:
        """The weighted sum, a scalar, of logits (B, C, *spatial), labels (B, 1, *spatial), features (B, F, *spatial).

        Features may be None where weight is 0; `ids` are pair_ids, view_ids, scan_ids as for `VoxelSupConLoss`.
        """
        loss = segmentation = self.segmentation_loss(logits, labels)
        dtype = torch.promote_types(segmentation.dtype, torch.float32)
        weight = torch.full((), self.weight, device=segmentation.device, dtype=dtype)
        if self.warmup_steps > 0:
            weight = weight * ((self.step + 1) / self.warmup_steps).clamp(max=1.0).to(weight)
        contrastive = torch.zeros_like(weight)
        if self.weight > 0:
            if features is None:
                raise ValueError(f"features must be given where weight > 0 (weight={self.weight}), got None")
            contrastive = self.contrastive_loss(features, labels, **ids, logits=logits.detach())
            loss = segmentation + weight * contrastive
        if self.training:
            self.step += 1
        terms = {"loss": loss, "segmentation": segmentation, "contrastive": contrastive}
        self.terms = {name: term.detach() for name, term in terms.items()} | {"contrast_weight": weight}
        return loss
