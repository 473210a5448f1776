"""One loss a stage: contrast, the classifier's cross-entropy, the segmentation loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medseg_supcon.training._mixed import with_unknown

STAGES = ("contrast", "classifier", "fine_tune")


class StagedLoss(nn.Module):
    """The loss of the stage that training is in; has the face of ``DiceSupConLoss``.

    Args:
        contrastive_loss: of stage ``contrast``, called as ``DiceSupConLoss`` calls it but without logits: the
            classifier is not trained yet.
        classifier_loss: of stage ``classifier``, called with (logits, labels): cross-entropy.
        fine_tune_loss: of stage ``fine_tune``, called with (logits, labels): Dice and cross-entropy, say.
        unknown: class index that stage ``contrast`` gives unlabelled voxels, so that they take part; for
            ``positives="same_voxel"`` only. ``None``: they are left out.

    Attributes:
        stage: ``contrast``, ``classifier`` or ``fine_tune``; set by :class:`Stages`.
        terms: the last call's detached scalars: ``loss``, ``stage`` (1, 2, 3), ``contrast_weight`` (1 or 0) and
            ``contrastive`` or ``segmentation``.

    Example:
        >>> cross_entropy, dice = (lambda logits, labels: logits.sum()), (lambda logits, labels: logits.mean())
        >>> loss = StagedLoss(lambda features, labels, **ids: features.sum(), cross_entropy, dice)
        >>> float(loss(torch.ones(2), torch.ones(2), torch.ones(3)))
        3.0
    """

    def __init__(
        self,
        contrastive_loss: Callable[..., Tensor],
        classifier_loss: Callable[..., Tensor],
        fine_tune_loss: Callable[..., Tensor],
        unknown: int | None = None,
    ) -> None:
        super().__init__()
        self.contrastive_loss, self.unknown = contrastive_loss, unknown
        self.classifier_loss, self.fine_tune_loss = classifier_loss, fine_tune_loss
        self.stage = STAGES[0]
        self.terms: dict[str, Tensor] = {}

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor,
        *,
        pair_ids: Tensor | None = None,
        view_ids: Tensor | None = None,
        scan_ids: Tensor | None = None,
    ) -> Tensor:
        """The stage's loss, a scalar; arguments as for ``DiceSupConLoss``."""
        if self.stage == "contrast":
            known = with_unknown(labels, pair_ids, self.unknown)
            ids = {"pair_ids": pair_ids, "view_ids": view_ids, "scan_ids": scan_ids}
            loss, name = self.contrastive_loss(features, known, **ids), "contrastive"
        else:
            of_stage = self.classifier_loss if self.stage == "classifier" else self.fine_tune_loss
            loss, name = of_stage(logits, labels), "segmentation"

        def number(value: float) -> Tensor:
            return torch.full((), value, device=loss.device)

        self.terms = {
            "loss": loss.detach(),
            "stage": number(STAGES.index(self.stage) + 1),
            "contrast_weight": number(float(name == "contrastive")),
            name: loss.detach(),
        }
        return loss
