"""From a batch of two views to its loss: with labels, with a teacher's pseudo-labels, and what the metrics look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_supcon.datasets import THRESHOLD, Regions
from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX, DiceSupConLoss
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training.average import WeightAverage
from medseg_supcon.training.precision import Precision
from medseg_supcon.training.ranks import sum_over_ranks

Target = dict[str, Tensor]
SMOOTH = 1e-5  # MONAI's, in numerator and denominator of Dice


def prepare_views(
    batchdata: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Target]:
    """MONAI ``prepare_batch``: (B, 2, C, *patch) views become 2B patches, view 1 and 2 of a scan side by side.

    The target: ``label`` (2B, 1, *patch) class indices with -1 for voxels without a label, ``pair_ids`` (2B, 1, *patch),
    ``view_ids`` (2B,) 0 or 1, ``scan_ids`` (2B,).
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
    """Calls ``DiceSupConLoss`` as a MONAI trainer calls a loss: with a ``ContrastiveNetwork``'s output and the target."""

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

    MONAI's ``DiceCELoss`` cannot leave out the voxels of label -1. Dice is taken over the whole batch, which is
    steadier when a patch lacks a class. ``class_weights`` (C,) are those of the cross-entropy.

    With ``regions``, which may overlap, it is Dice of the R regions plus their mean binary cross-entropy.

    Shape:
        logits (B, C, *spatial), or (B, R, *spatial) of regions, and labels (B, 1, *spatial) of class indices give a
        scalar; 0, attached to the graph, if every voxel is ignored.
    """

    class_weights: Tensor | None

    def __init__(
        self, dice_weight: float = 1.0, ce_weight: float = 1.0, class_weights: Tensor | None = None,
        regions: Regions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if regions is not None and class_weights is not None:
            raise ConfigError("class_weights of the cross-entropy cannot be used with regions. Set them to null.")
        self.dice_weight, self.ce_weight, self.regions = dice_weight, ce_weight, regions
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.float(), labels.long()
        known, target = (labels != IGNORE_INDEX).to(logits.dtype), labels.clamp_min(0)
        if self.regions is not None:
            y = region_masks(self.regions, labels).to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
            sums = sum_over_ranks(torch.stack(((each * known).sum(), known.sum() * len(self.regions.names))))
            bce = self.ce_weight * sums[0] / sums[1].clamp_min(1)
            return bce if self.dice_weight == 0 else bce + self.dice_weight * _dice_loss(logits.sigmoid() * known, y)
        log_p, weights = logits.log_softmax(1), self.class_weights
        total = F.nll_loss(log_p, labels[:, 0], weights, ignore_index=IGNORE_INDEX, reduction="sum")
        # the mean by hand: if every voxel is ignored, torch's is 0 / 0
        count = known.sum() if weights is None else (weights[target] * known).sum()
        sums = sum_over_ranks(torch.stack((total, count)))
        ce = sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
        if self.dice_weight == 0:
            return self.ce_weight * ce
        p = log_p[:, 1:].exp() * known
        y = torch.zeros_like(logits).scatter_(1, target, 1.0)[:, 1:] * known
        return self.dice_weight * _dice_loss(p, y) + self.ce_weight * ce


def _dice_loss(p: Tensor, y: Tensor) -> Tensor:
    """Mean Dice loss over the channels of probabilities and targets (B, C, *spatial), which are 0 where ignored."""
    axes = [0, *range(2, p.ndim)]
    tp, p_sum, y_sum = sum_over_ranks(torch.stack([x.sum(axes) for x in (p * y, p, y)]))
    fp, fn = p_sum - tp, y_sum - tp
    dice: Tensor = (1 - (2 * tp + SMOOTH) / (2 * (tp + 0.5 * fp + 0.5 * fn) + SMOOTH)).mean()
    return dice


def region_masks(regions: Regions, labels: Tensor) -> Tensor:
    """(B, R, *spatial) masks of class indices (B, 1, *spatial); voxels of label -1 are in no region."""
    index = labels[:, 0].long()
    table = torch.as_tensor(regions.membership, device=labels.device)
    outside = table.new_zeros(len(table), 1)
    return torch.stack([row[index] for row in torch.cat((table, outside), 1)], 1)  # -1 is the last column


def class_probabilities(logits: Tensor, regions: Regions | None = None) -> Tensor:
    """Probabilities (B, C, *spatial) of the classes; of regions' logits (B, R, *spatial), as if they were independent.

    The probability of a class is then the product over the regions of p, or of 1 - p where the class is outside. If it is
    above 0.5, the class has exactly the regions whose p is above 0.5.
    """
    if regions is None:
        return logits.float().softmax(1)
    inside, outside = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
    columns = [
        sum(inside[:, r] if holds else outside[:, r] for r, holds in enumerate(column))
        for column in regions.membership.T
    ]
    return torch.stack([torch.as_tensor(column) for column in columns], 1).exp()


def predicted_classes(logits: Tensor, regions: Regions | None = None) -> Tensor:
    """Class indices (1, *spatial) of one scan's logits, (C, *spatial) or of regions (R, *spatial), as in its mask."""
    if regions is None:
        return logits.argmax(0, keepdim=True)
    return torch.from_numpy(regions.paint(logits.float().sigmoid().cpu().numpy()))[None].to(logits.device)


def label_pairs(output: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """``ignite`` output transform: predicted and reference class indices, (1, X, Y, Z) each; -1 stays for the metric."""
    predictions = [torch.as_tensor(o["pred"]).argmax(0, keepdim=True) for o in output]
    return predictions, [torch.as_tensor(o["label"]) for o in output]


def output_pairs(regions: Regions | None) -> Callable[[Sequence[dict[str, Any]]], tuple[list[Tensor], list[Tensor]]]:
    """`label_pairs`; with regions, predicted and reference masks (R, X, Y, Z), both False where the label is -1."""

    def region_pairs(output: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        labels = [torch.as_tensor(o["label"]) for o in output]
        predictions = [torch.as_tensor(o["pred"]).sigmoid() > THRESHOLD for o in output]
        known = [label != IGNORE_INDEX for label in labels]
        references = [region_masks(regions, label[None])[0] for label in labels] if regions else labels
        return [p & k for p, k in zip(predictions, known, strict=True)], references

    return label_pairs if regions is None else region_pairs


class Teacher(WeightAverage):
    """The running average of a network's weights, which labels scans for it; ``regions``: what its outputs are, if any."""

    def __init__(self, network: nn.Module, decay: float = 0.99, regions: Regions | None = None) -> None:
        super().__init__(network, decay)
        self.regions = regions
        if decay == 0:
            raise ConfigError("weight_average must be above 0 for a teacher, which is the average of the network.")
        self._logits = ContrastiveNetwork(self.network).eval()

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Probabilities of the classes (B, C, *spatial), float32."""
        return class_probabilities(self._logits(image), self.regions)


def shipped_network(ship: str, teacher: Teacher) -> nn.Module:
    """The network whose weights are validated and become ``model.pt``: ``"teacher"``'s or ``"student"``'s."""
    if ship not in ("teacher", "student"):
        raise ConfigError(f"ship must be teacher or student, got {ship!r}.")
    return teacher.network if ship == "teacher" else teacher.student


class PseudoLabels:
    """MONAI ``prepare_batch``: :func:`prepare_views`, and the teacher's labels for voxels without a label.

    The teacher sees view 1. Its class there, if its probability is at least ``confidence`` (0 to 1), is the pseudo-label
    of the voxel in view 1 and of the same physical voxel in view 2, which is augmented more strongly. Unlabelled voxels
    of labelled scans get theirs only beside a scan without any label: otherwise they would be too few for a Dice.

    The target also gets ``pseudo_label`` (2B, 1, *patch), -1 for all other voxels, and ``asked``, the number of voxels
    that could have had one.
    """

    def __init__(self, teacher: Teacher, confidence: float = 0.9, precision: Precision | None = None) -> None:
        if not 0 <= confidence <= 1:
            raise ConfigError(f"confidence must be between 0 and 1, got {confidence}.")
        self.teacher, self.confidence, self.precision = teacher, confidence, precision

    def __call__(
        self, batchdata: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Target]:  # fmt: skip
        image, target = prepare_views(batchdata, device, non_blocking, **more)
        if "pair_ids" not in target:
            raise ConfigError(
                "Pseudo-labels need to know which voxels of the two views are the same, and an elastic deformation or grid "
                "distortion hides that. Set elastic=0, or choose another view policy."
            )
        label, pair_ids = target["label"], target["pair_ids"]
        wanted = (label == IGNORE_INDEX) & (pair_ids >= 0)
        pseudo = torch.full_like(label, IGNORE_INDEX)
        target |= {"pseudo_label": pseudo, "asked": wanted.sum()}
        # rows 2s and 2s + 1 are scan s
        unlabelled = (label == IGNORE_INDEX).flatten(1).all(1).view(-1, 2).all(1)
        scans = wanted.flatten(1).any(1).view(-1, 2).any(1).nonzero()[:, 0]
        if len(scans) == 0 or not bool(unlabelled.any()):
            return image, target
        with self.precision.autocast() if self.precision is not None else nullcontext():
            probability, winner = self.teacher(image[2 * scans]).max(1, keepdim=True)
        winner = winner.masked_fill(probability < self.confidence, IGNORE_INDEX)
        for rows in (2 * scans, 2 * scans + 1):
            places = pair_ids[rows].clamp_min(0).flatten(1)  # indices of view 1's voxels, for both views
            labels = winner.flatten(1).gather(1, places).view_as(winner)
            pseudo[rows] = labels.masked_fill(~wanted[rows], IGNORE_INDEX).to(pseudo.dtype)
        return image, target


def with_unknown(labels: Tensor, pair_ids: Tensor | None, unknown: int | None) -> Tensor:
    """Labels (B, 1, *spatial) in which unlabelled voxels of the scan have the class ``unknown`` (C of 0 .. C-1).

    For ``positives="same_voxel"``, which needs no label, while the sampler draws labelled voxels only.
    """
    if unknown is None or pair_ids is None:
        return labels
    return labels.masked_fill((labels == IGNORE_INDEX) & (pair_ids >= 0), unknown)


class SemiSupervisedLoss(nn.Module):
    """segmentation(labels) + u(t) * segmentation(pseudo-labels) + w(t) * contrast(both), at step t = 1, 2, ...

    u(t) = pseudo_weight * exp(-5 (1 - min(1, t / pseudo_warmup))^2) (Laine and Aila 2017, Temporal ensembling), and
    w(t) = contrast_weight * min(1, t / contrast_warmup). The target is that of `PseudoLabels`.

    `pseudo_contrast`: the contrast uses pseudo-labelled voxels too; `unknown`: its class index for voxels without label or
    pseudo-label (`with_unknown`). ``terms``: the last call's scalars, the columns of ``history.csv``; ``confident`` is the
    share of the voxels without a label that have a pseudo-label.
    """

    step: Tensor

    def __init__(
        self, segmentation_loss: Callable[..., Tensor], contrastive_loss: Callable[..., Tensor], *,
        contrast_weight: float = 0.1, contrast_warmup: int = 0, pseudo_weight: float = 1.0, pseudo_warmup: int = 0,
        pseudo_contrast: bool = True, unknown: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        numbers = (contrast_weight, contrast_warmup, pseudo_weight, pseudo_warmup)
        if not all(number >= 0 for number in numbers):
            raise ConfigError(f"Weights and warm-ups of contrast and pseudo-labels must be at least 0, got {numbers}.")
        self.segmentation_loss, self.contrastive_loss = segmentation_loss, contrastive_loss
        self.contrast_weight, self.contrast_warmup = float(contrast_weight), contrast_warmup
        self.pseudo_weight, self.pseudo_warmup = float(pseudo_weight), pseudo_warmup
        self.pseudo_contrast, self.unknown = pseudo_contrast, unknown
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: tuple[Tensor, Tensor], target: Target) -> Tensor:
        logits, features = prediction
        labels, pseudo = target["label"], target["pseudo_label"]
        t = (self.step + 1).to(torch.float32)  # stays on its device: reading it would make a GPU wait

        def share(warmup: int) -> Tensor:
            return (t / warmup).clamp(max=1.0) if warmup > 0 else torch.ones_like(t)

        u = self.pseudo_weight * torch.exp(-5 * (1 - share(self.pseudo_warmup)) ** 2)
        w = self.contrast_weight * share(self.contrast_warmup)
        segmentation = self.segmentation_loss(logits, labels)
        by_pseudo = self.segmentation_loss(logits, pseudo)
        contrastive = torch.zeros_like(segmentation)
        loss = segmentation + u * by_pseudo
        if self.contrast_weight > 0:
            known = torch.where(labels == IGNORE_INDEX, pseudo, labels) if self.pseudo_contrast else labels
            known = with_unknown(known, target["pair_ids"], self.unknown)
            seen = None if self.unknown is not None else logits.detach()  # they have no channel for that class
            ids = {name: target[name] for name in ("pair_ids", "view_ids", "scan_ids")}
            contrastive = self.contrastive_loss(features, known, logits=seen, **ids)
            loss = loss + w * contrastive
        if self.training:
            self.step += 1
        terms = {"loss": loss, "segmentation": segmentation, "pseudo": by_pseudo, "contrastive": contrastive}
        terms |= {"pseudo_weight": u, "contrast_weight": w}
        terms["confident"] = (pseudo != IGNORE_INDEX).sum() / target["asked"].clamp_min(1)
        self.terms = {name: term.detach() for name, term in terms.items()}
        return loss
