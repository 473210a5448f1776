"""Two processes that are the ranks of one training, forked from this one, so that they import nothing again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


def start_ranks(work: Callable[[], None], folder: Path) -> list[BaseProcess]:
    """Ranks 0 and 1, which call ``work``; what they say is in ``folder/rank0.log`` and ``rank1.log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = []
    for rank in range(2):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
        ranks.append(context.Process(target=_rank, args=(work, {**meeting, **of_rank}, folder / f"rank{rank}.log")))
        ranks[-1].start()
    return ranks


def _rank(work: Callable[[], None], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()  # pytest's
    warnings.simplefilter("ignore")
    with log.open("w", buffering=1) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        sys.stdout = sys.stderr = stream
        work()
