"""Embeddings of earlier steps, kept class by class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_supcon.losses.checks import check_ids, check_number, check_tensor


class MemoryBank(nn.Module):
    """A ring buffer of detached embeddings for each class: keys and positives of later steps.

    Every class has its own room and write position, so a frequent class never pushes out a rare one. All state is in
    buffers, so checkpoints contain it.

    Args:
        num_classes: C.
        dim: D, the length of an embedding.
        size: embeddings kept per class.

    Raises:
        ValueError, TypeError: an argument is not an integer >= 1.

    Example:
        >>> bank = MemoryBank(num_classes=2, dim=3, size=4)
        >>> bank.enqueue(torch.ones(5, 3), torch.tensor([0, 0, 1, 0, -1]))
        >>> bank.entries()[1].tolist()
        [0, 0, 0, 1]
    """

    embeddings: Tensor
    filled: Tensor
    position: Tensor

    def __init__(self, num_classes: int, dim: int, size: int) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "dim": dim, "size": size}.items():
            check_number(name, value, 1, integer=True)
        self.num_classes, self.dim, self.size = num_classes, dim, size
        self.register_buffer("embeddings", torch.zeros(num_classes, size, dim))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("position", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        """Write embeddings (N, D) of classes (N,) over the oldest of their class; the last `size` stay.

        Labels below 0 are not stored, nor embeddings that are not finite: one overflow would make every later loss NaN.
        """
        check_tensor("embeddings", embeddings, floating=True)
        check_tensor("labels", labels)
        if embeddings.shape[1] != self.dim or labels.shape != embeddings.shape[:1]:
            got = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"embeddings must be (N, {self.dim}) and labels (N,), got {got}")
        rows = embeddings.detach().to(self.embeddings.dtype)
        stored = (labels >= 0) & rows.isfinite().all(1)
        classes, order = labels[stored].long().sort(stable=True)
        rows = rows[stored][order]
        if len(classes) and int(classes[-1]) >= self.num_classes:
            raise ValueError(f"labels must be below num_classes={self.num_classes}, got {int(classes[-1])}")
        counts = torch.bincount(classes, minlength=self.num_classes)
        rank = torch.arange(len(classes), device=classes.device) - (counts.cumsum(0) - counts)[classes]
        newest = rank >= (counts - self.size)[classes]
        slot = (self.position[classes] + rank) % self.size
        self.embeddings[classes[newest], slot[newest]] = rows[newest]
        self.position.add_(counts).remainder_(self.size)
        self.filled.add_(counts).clamp_(max=self.size)

    def entries(self) -> tuple[Tensor, Tensor]:
        """The embeddings held, (M, D), and their classes, (M,) int64, as copies."""
        held = torch.arange(self.size, device=self.filled.device) < self.filled[:, None]
        return self.embeddings[held], held.nonzero()[:, 0]


Bank = MemoryBank | tuple[Tensor, Tensor]


def bank_entries(bank: Bank | None, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """A bank's embeddings and labels, checked against those of the batch; none without a bank."""
    if bank is None:
        return embeddings[:0].detach(), torch.zeros(0, dtype=torch.long, device=embeddings.device)
    if isinstance(bank, MemoryBank):
        bank = bank.entries()
    if not isinstance(bank, (tuple, list)) or len(bank) != 2:
        raise TypeError(f"bank must be a MemoryBank or a pair (embeddings, labels), got {type(bank).__name__}")
    stored, labels = bank
    check_tensor("bank embeddings", stored, floating=True)
    dim, device = embeddings.shape[1], embeddings.device
    if stored.shape[1] != dim or stored.device != device:
        raise ValueError(
            f"bank embeddings must be (M, {dim}) on {device}, got {tuple(stored.shape)} on {stored.device}"
        )
    return stored.detach(), check_ids("bank labels", labels, stored, "a bank")
