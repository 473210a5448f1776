"""Whether the network computes in float32 or in mixed precision, which a CPU may do faster or slower."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter, thread_time
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.inferers import SimpleInferer
from rich.console import Console
from torch import Tensor, nn

from medseg_supcon.errors import ConfigError
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.training.ranks import on_any_rank

WORTHWHILE = 0.95  # of float32's time; a timing is not exact
SHORT = 0.05  # seconds, of a pass in float32: too short to be timed well
ROUNDS, PATIENCE = 5, 5.0  # passes in each precision, and the seconds after which no other round begins


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 (AVX512_BF16 or AMX), and ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA allow it."""
    onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if not (onednn and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        return False
    instructions = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return any(instructions) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pass_seconds(network: nn.Module, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[float]:
    """CPU seconds of a forward and backward pass of ``shape`` (B, C, X, Y, Z) in each precision, by one thread.

    The precisions take turns, and the least of several passes counts, so that other programs change little. If float32
    is first and takes less than 0.05 s, only it is timed. The network is not changed.
    """
    wrapped = ContrastiveNetwork(copy.deepcopy(network)).requires_grad_(True).train()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[] for _ in dtypes]
    threads, begin = torch.get_num_threads(), perf_counter()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and waiting is CPU time, too
    try:
        for turn in range(ROUNDS + 1):
            for dtype, seconds in zip(dtypes, times, strict=True):
                start = thread_time()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits, _ = wrapped(x)
                logits.float().square().mean().backward()
                seconds.append(thread_time() - start)
                if len(dtypes) > 1 and turn > 0 and min(times[0]) < SHORT:
                    return [min(times[0])]
            if turn > 0 and perf_counter() - begin > PATIENCE:
                break
    finally:
        torch.set_num_threads(threads)
    return [min(seconds[1:]) for seconds in times]  # the first pass chooses kernels


class Precision(SimpleInferer):  # type: ignore[misc]
    """MONAI inferer that runs a network in float32 or ``dtype``; a handler that decides which before the first step.

    The loss is computed in float32. A resumed training keeps its precision if this machine has the instructions.

    Args:
        network: the stock network.
        shape: (B, C, X, Y, Z) of a step's input.
        amp: true: ``dtype``; false: float32; ``"auto"``: ``dtype`` on GPUs, and on CPUs with instructions for bfloat16 if
            that is measurably faster.
        dtype: bfloat16 or, on GPUs only, float16.
        device: where the training runs.
        quiet: do not print the choice.
    """

    def __init__(
        self, network: nn.Module, shape: Sequence[int], amp: bool | str = "auto", dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu", quiet: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if amp not in (True, False, "auto"):
            raise ConfigError(f"amp must be auto, true or false, got {amp!r}.")
        self.network, self.shape, self.amp, self.dtype, self.quiet = network, tuple(shape), amp, dtype, quiet
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if amp is True and not on_gpu and dtype != torch.bfloat16:
            raise ConfigError("amp_dtype must be bfloat16 on a CPU. Set amp_dtype=bfloat16, or amp=auto.")
        self.half: bool | None = on_gpu if amp == "auto" else bool(amp)
        if amp == "auto" and self.device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16():
            self.half = None  # to be measured
        self.by_trainer = on_gpu and bool(self.half)  # MONAI's engines know mixed precision on GPUs only

    @property
    def name(self) -> str:
        return str(self.dtype if self.half else torch.float32).removeprefix("torch.")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.choose)

    def choose(self, engine: Engine | None = None) -> None:
        """Measure, if that is still to be done; every rank calls it."""
        if self.half is None:
            seconds = pass_seconds(self.network, (min(2, self.shape[0]), *self.shape[1:]), (torch.float32, self.dtype))
            slower = len(seconds) == 1 or seconds[1] > WORTHWHILE * seconds[0]
            self.half = not on_any_rank(slower)
            if engine is not None:
                self._report(engine, seconds)

    def _report(self, engine: Engine, seconds: Sequence[float]) -> None:
        if len(seconds) == 1:
            return
        text = (
            f"Training in {self.name}: a pass takes {seconds[1]:.2f} s in bfloat16 and {seconds[0]:.2f} s in float32."
        )
        engine.logger.info(text)
        if not self.quiet and idist.get_rank() == 0:
            Console(stderr=True, markup=False, highlight=False).print(text, soft_wrap=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """For a pass of a network."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=bool(self.half))

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return network(inputs, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"half": bool(self.half)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.half is None:
            self.half = bool(state["half"])
