"""Time and peak memory of the contrastive loss, forward plus backward, compared with public implementations.

    python -m benchmarks.loss                  CPU, two threads: the table of docs/losses.md
    python -m benchmarks.loss --device cuda    up to every voxel of a 96^3 patch, FlexAttention included

Every measurement runs in its own process. The contestants take turns, and the best round counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, CLASSES, TEMPERATURE = 64, 4, 0.1
SECONDS = 4.0  # how long steps are repeated in each process; the fastest counts
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
Loss = Callable[[Tensor, Tensor], Tensor]


def ours() -> Loss:
    from medseg_supcon.losses import SupConLoss

    return SupConLoss(TEMPERATURE)


def full_matrix() -> Loss:
    """The loss as usually written: one N x N matrix and masks."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        u = F.normalize(z, dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        s = (u @ u.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        positive = (y[:, None] == y) & ~itself
        mean = s.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
        return (s.logsumexp(1) - mean).mean()

    return loss


def pytorch_metric_learning() -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(TEMPERATURE)


def flex_attention() -> Loss:
    """Log-sum-exp with torch's FlexAttention; the positives through class sums."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex)

    def not_itself(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, -torch.inf, score)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        u = F.normalize(z, dim=1)
        q = u[None, None]
        _, aux = compiled(
            q,
            q,
            q[..., :16],
            score_mod=not_itself,
            scale=1 / TEMPERATURE,
            return_aux=AuxRequest(lse=True),
        )
        one_hot = F.one_hot(y, CLASSES).to(u.dtype)
        towards = ((one_hot @ (one_hot.T @ u) - u) * u).sum(1) / (one_hot.sum(0)[y] - 1) / TEMPERATURE
        return (aux.lse[0, 0] - towards).mean()

    return loss


CONTESTANTS = {
    "medseg_supcon": ours,
    "full matrix": full_matrix,
    "pytorch-metric-learning": pytorch_metric_learning,
    "FlexAttention": flex_attention,
}


def measure(name: str, n: int, device: str, threads: int) -> dict[str, float]:
    """One contestant at one size: best time of a step (s), its extra peak memory (MiB), and the loss."""
    torch.set_num_threads(threads)
    loss = CONTESTANTS[name]()
    step(loss, *batch(256, device))  # loads libraries and starts thread pools
    z, y = batch(n, device)
    z.grad = torch.zeros_like(z)
    meter = PeakMemory(device)
    value = step(loss, z, y)
    memory = meter.extra()
    best = float("inf")
    until = time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        wait(device)
        start = time.perf_counter()
        step(loss, z, y)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "mib": memory / MIB, "loss": value}


def batch(n: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, DIM, generator=generator).to(device).requires_grad_()
    return z, torch.randint(CLASSES, (n,), generator=generator).to(device)


def step(loss: Loss, z: Tensor, y: Tensor) -> float:
    value = loss(z, y)
    value.backward()
    return value.item()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """Peak memory above what was in use when the meter started, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
            self.start = self._status("VmRSS")

    def extra(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.start
        return self._status("VmHWM") - self.start

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")


def in_own_process(name: str, n: int, args: argparse.Namespace) -> dict[str, float] | None:
    """Run `measure` in a new interpreter; None if it ran out of memory."""
    command = [sys.executable, "-m", "benchmarks.loss", "--measure", name, str(n)]
    command += ["--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result
    if "OutOfMemoryError" in done.stderr or "can't allocate memory" in done.stderr or done.returncode == -9:
        return None
    raise SystemExit(f"{name} at N = {n} failed:\n{done.stderr}")


def contest(args: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """Best time and smallest peak of every contestant at every size, over alternating rounds."""
    best: dict[tuple[str, int], dict[str, float]] = {}
    for n in args.sizes:
        rivals = [c for c in args.contestants if c == "medseg_supcon" or n <= args.rivals_up_to]
        for _ in range(args.rounds if n <= args.rivals_up_to else 1):
            for name in list(rivals):
                result = in_own_process(name, n, args)
                if result is None:
                    rivals.remove(name)
                    continue
                so_far = best.setdefault((name, n), result)
                for key in ("seconds", "mib"):
                    so_far[key] = min(so_far[key], result[key])
        for name in rivals:
            if abs(best[name, n]["loss"] / best["medseg_supcon", n]["loss"] - 1) > 1e-4:
                raise SystemExit(f"{name} gives a different loss at N = {n}: {best[name, n]['loss']}")
        print(f"N = {n}: done", file=sys.stderr, flush=True)
    return best


def table(best: dict[tuple[str, int], dict[str, float]], args: argparse.Namespace) -> str:
    lines = ["| N | " + " | ".join(f"{c}: ms | MiB" for c in args.contestants) + " |"]
    lines.append("|---:|" + "---:|---:|" * len(args.contestants))
    for n in args.sizes:
        cells = []
        for name in args.contestants:
            r, own = best.get((name, n)), best["medseg_supcon", n]
            if r is None:
                cells += ["", ""]
            elif name == "medseg_supcon":
                cells += [f"{r['seconds'] * 1e3:,.0f}", f"{r['mib']:,.0f}"]
            else:
                faster, leaner = r["seconds"] / own["seconds"], own["mib"] / r["mib"] * 100
                cells += [f"{r['seconds'] * 1e3:,.0f} (x {faster:.1f})", f"{r['mib']:,.0f} ({leaner:.1f} %)"]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{model}, {args.threads} threads of {len(names)} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--rivals-up-to", type=int, help="largest N at which the other implementations run")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, n = args.measure
        print(json.dumps(measure(name, int(n), args.device, args.threads)))
        return
    cuda = args.device == "cuda"
    args.sizes = args.sizes or ([8192, 32768, 110592, 884736] if cuda else [1024, 2048, 4096, 8192, 16384, 65536])
    args.rivals_up_to = args.rivals_up_to or (10**9 if cuda else 8192)
    args.contestants = args.contestants or list(CONTESTANTS)[: 4 if cuda else 3]
    if "medseg_supcon" not in args.contestants:
        args.contestants.insert(0, "medseg_supcon")
    command = " ".join(("python -m benchmarks.loss", *sys.argv[1:]))
    text = (
        f"# The contrastive loss, forward plus backward\n\n"
        f"`{command}`\n\n"
        f"{machine(args)}; D = {DIM}, {CLASSES} classes, temperature {TEMPERATURE}, float32. "
        f"Best of {args.rounds} rounds; MiB: peak above the inputs and their gradient. "
        f"In brackets: how many times slower than ours, and our share of its memory.\n\n{table(contest(args), args)}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"loss_{args.device}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
