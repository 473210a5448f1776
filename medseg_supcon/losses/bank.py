"""Embeddings of earlier steps, kept class by class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_supcon.losses.checks import check_ids, check_number, check_rows


class MemoryBank(nn.Module):
    """A ring buffer of `size` detached embeddings (D = dim) for each class: keys and positives of later steps.

    Every class has its own room, so a frequent class never pushes out a rare one. Checkpoints contain its state.

    Example:
        >>> bank = MemoryBank(num_classes=2, dim=3, size=4)
        >>> bank.enqueue(torch.ones(5, 3), torch.tensor([0, 0, 1, 0, -1]))
        >>> bank.entries()[1].tolist()
        [0, 0, 0, 1]
    """

    def __init__(self, num_classes: int, dim: int, size: int) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "dim": dim, "size": size}.items():
            check_number(name, value, 1, integer=True)
        self.num_classes, self.dim, self.size = num_classes, dim, size
        self.embeddings = nn.Buffer(torch.zeros(num_classes, size, dim))
        self.filled, self.position = (nn.Buffer(torch.zeros(num_classes, dtype=torch.long)) for _ in range(2))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        """Write embeddings (N, D) over the oldest of their classes (N,); a class below 0 is not stored, nor NaN and inf."""
        check_rows("embeddings", embeddings, self.dim)
        labels = check_ids("labels", labels, embeddings.shape[:1], embeddings.device, "a bank")
        rows = embeddings.detach().to(self.embeddings.dtype)
        stored = (labels >= 0) & rows.isfinite().all(1)  # one overflow would make every later loss NaN
        classes, order = labels[stored].sort(stable=True)
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
    pair = bank.entries() if isinstance(bank, MemoryBank) else bank
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"bank must be a MemoryBank or a pair (embeddings, labels), got {type(bank).__name__}")
    check_rows("bank embeddings", pair[0], embeddings.shape[1])
    labels = check_ids("bank labels", pair[1], pair[0].shape[:1], embeddings.device, "a bank")
    return pair[0].detach().to(embeddings.device), labels
