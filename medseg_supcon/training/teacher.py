"""A slowly moving teacher, and its confident pseudo-labels for voxels that nobody labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medseg_supcon.errors import ConfigError
from medseg_supcon.losses import IGNORE_INDEX
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training.loss import Target, prepare_views


class Teacher:
    """The running average of a network's weights and norm statistics; a handler that moves it after every step.

    With d = min(decay, (1 + t) / (10 + t)) after step t, so that the first, random weights are soon forgotten:
    teacher = d * teacher + (1 - d) * student.

    Args:
        network: the student, a stock network.
        decay: d in the long run, 0 to below 1: about the last 1 / (1 - decay) steps count.

    Attributes:
        network: the teacher, in evaluation mode; same weight names as the student's.

    Source:
        Tarvainen and Valpola 2017, Mean teachers are better role models.

    Example:
        >>> student = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1))
        >>> teacher = Teacher(student)
        >>> teacher.update()
        >>> teacher(torch.zeros(1, 1, 4, 4, 4)).sum(1).allclose(torch.ones(4, 4, 4))
        True
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in 0 .. 1, 1 left out, got {decay}")
        self.student, self.decay, self._d = network, decay, 0.0
        self.average = AveragedModel(network, multi_avg_fn=self._average, use_buffers=True)
        self.network: nn.Module = self.average.module.eval().requires_grad_(False)
        self._logits = ContrastiveNetwork(self.network).eval()

    def _average(self, teachers: Sequence[Tensor], students: Sequence[Tensor], _: Tensor | int) -> None:
        # all at once: for one tensor at a time torch copies its count to the GPU each time, and waits
        for teacher, student in zip(teachers, students, strict=True):
            if teacher.is_floating_point():
                teacher.copy_(self._d * teacher + (1 - self._d) * student)
            else:  # buffers that count are whole numbers: the student's is right
                teacher.copy_(student)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.update)

    def update(self) -> None:
        """Move towards the student; the first time, become it."""
        t = int(self.average.n_averaged)
        self._d = min(self.decay, (1 + t) / (10 + t))
        self.average.update_parameters(self.student)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Probabilities (B, C, *spatial), float32, of images (B, channels, *spatial)."""
        probabilities: Tensor = self._logits(image).float().softmax(1)
        return probabilities

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps it has seen."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.average.load_state_dict(dict(state))


class PseudoLabels:
    """MONAI ``prepare_batch``: :func:`prepare_views`, and the teacher's labels where nobody gave any.

    The teacher looks at view 1. Its class there, where its probability is at least ``confidence``, is the
    pseudo-label of the voxel in view 1 and of the same physical voxel in view 2: what the student has to find
    under the stronger policy. In a batch that holds a scan without any label, unlabelled voxels of the others
    (``ignore``, the rim of a resampled scan) get theirs, too; by themselves they would be too few for a Dice.

    Args:
        teacher: the teacher.
        confidence: least probability of the winning class, 0 to 1; below it the voxel stays unlabelled.
        amp: run the teacher in mixed precision.
        dtype: of mixed precision.

    Returns:
        (on call) image and target of :func:`prepare_views`, the target with ``pseudo_label`` (2B, 1, *patch):
        class indices, -1 where there is a label, outside the scan, without a partner, or not sure; and ``asked``,
        how many voxels could have had one.
    """

    def __init__(
        self,
        teacher: Teacher,
        confidence: float = 0.9,
        amp: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must lie in 0 .. 1, got {confidence}")
        self.teacher, self.confidence, self.amp, self.dtype = teacher, confidence, amp, dtype

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Target]:
        image, target = prepare_views(batchdata, device, non_blocking, **kwargs)
        wanted = (target["label"] == IGNORE_INDEX) & (target["pair_ids"] >= 0)
        target["pseudo_label"] = self._label(image, target["label"], target["pair_ids"], wanted)
        target["asked"] = wanted.sum()
        return image, target

    def _label(self, image: Tensor, label: Tensor, pair_ids: Tensor, wanted: Tensor) -> Tensor:
        pseudo = torch.full_like(label, IGNORE_INDEX)
        # rows 2s and 2s + 1 are scan s
        unlabelled = (label == IGNORE_INDEX).flatten(1).all(1).view(-1, 2).all(1)
        scans = wanted.flatten(1).any(1).view(-1, 2).any(1).nonzero()[:, 0]
        if len(scans) == 0 or not bool(unlabelled.any()):
            return pseudo
        with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.amp):
            probability, winner = self.teacher(image[2 * scans]).max(1, keepdim=True)
        winner = winner.masked_fill(probability < self.confidence, IGNORE_INDEX)
        for view in (0, 1):
            rows = 2 * scans + view
            places = (
                pair_ids[rows].clamp_min(0).flatten(1)
            )  # of view 1's voxels, also where view 2 shows them
            found = winner.flatten(1).gather(1, places).view_as(winner)
            pseudo[rows] = found.masked_fill(~wanted[rows], IGNORE_INDEX).to(pseudo.dtype)
        return pseudo


def shipped_network(ship: str, teacher: Teacher) -> nn.Module:
    """The network whose weights are validated and become ``model.pt``: ``"teacher"``'s or ``"student"``'s.

    Raises:
        ConfigError: neither of the two.
    """
    if ship not in ("teacher", "student"):
        raise ConfigError(f"ship must be teacher or student, got {ship!r}.")
    return teacher.network if ship == "teacher" else teacher.student
