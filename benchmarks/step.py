"""The cost of contrast: a training step of the joint recipe, compared with the same at contrast weight 0.

    python -m benchmarks.step [--steps 40] [--device cpu]
    python -m benchmarks.step --parts      where the CPU time of a step goes, in float32 and in bfloat16

The two recipes take turns, step by step, on batches from the same scans, so that a busy machine slows both down.
A step consists of loading, augmentation, forward, backward and optimiser. A view is one of its patches.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from monai.bundle import ConfigParser

from medseg_supcon.datasets import make_phantoms, read_dataset, split_cases
from medseg_supcon.training import prepare_run

RESULTS = Path(__file__).parent / "results"


def recipe(run: Path, weight: float, device: str, amp: bool | str = "auto") -> tuple[Any, Any]:
    """The trainer and the batches of a run with the given contrast weight."""
    parser = ConfigParser()
    parser.read_config(str(run / "configs" / "train.yaml"))
    parser["bundle_root"] = str(run)
    parser["contrast_weight"] = weight
    parser["contrast_warmup"] = 0
    parser["amp"] = amp
    parser["device"] = f"$torch.device('{device}')"
    trainer = parser.get_parsed_content("train::trainer")
    # as at the start of a training: without a scaler MONAI's trainer does not use mixed precision
    trainer.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=False)
    parser.get_parsed_content("precision").choose()
    return trainer, iter(parser.get_parsed_content("train::dataloader"))


def step(trainer: Any, batches: Any, device: str) -> float:
    """Run one step; return its seconds."""
    start = perf_counter()
    trainer._iteration(trainer, next(batches))
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


def parts(trainer: Any, batches: Any) -> dict[str, float]:
    """CPU seconds of each part of a step, of all threads."""
    seconds, last = {}, process_time()

    def done(part: str) -> None:
        nonlocal last
        now = process_time()
        seconds[part], last = now - last, now

    batch = next(batches)
    done("two views of each scan")
    trainer.network.train()
    inputs, target = trainer.prepare_batch(batch, torch.device("cpu"), False)
    outputs = trainer.inferer(inputs, trainer.network)
    done("network, forward")
    features = [output.detach().requires_grad_() for output in outputs]
    trainer.loss_function(tuple(features), target).backward()
    done("loss, forward and backward")
    torch.autograd.backward(outputs, [feature.grad for feature in features])
    done("network, backward")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    done("optimiser")
    return seconds


def write_parts(run: Path, steps: int) -> None:
    """The medians of the parts; float32 and bfloat16 take turns."""
    kinds = {"float32": recipe(run, 0.1, "cpu", amp=False), "bfloat16": recipe(run, 0.1, "cpu", amp=True)}
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(steps + 2):
        for kind, (trainer, batches) in kinds.items():
            row = parts(trainer, batches)
            rows[kind] += [row | {"together": sum(row.values())}] if number >= 2 else []
    lines = ["| part, CPU ms | " + " | ".join(kinds) + " |", "|---|---|---|"]
    for part in rows["float32"][0]:
        values = [f"{1000 * statistics.median(row[part] for row in rows[kind]):.0f}" for kind in kinds]
        lines.append(f"| {part} | {' | '.join(values)} |")
    made = (
        f"{steps} steps of `joint`, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    )
    text = f"Written by `python -m benchmarks.step --parts`.\n\n{made}\n\n" + "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "step_parts.md").write_text(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--device", default="cpu")
    options.add_argument("--parts", action="store_true", help="where the time of a step goes, on a CPU")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = make_phantoms(Path(folder) / "data", cases=6, unseen=0)
        dataset, run = read_dataset(data), Path(folder) / "run"
        plan = prepare_run(dataset, split_cases(dataset), run, epochs=1, device=given.device)
        if given.parts:
            write_parts(run, given.steps)
            return
        recipes = {w: recipe(run, w, given.device) for w in (0.1, 0.0)}
        for w in recipes:
            for _ in range(3):
                step(*recipes[w], given.device)
        times: dict[float, list[float]] = {0.1: [], 0.0: []}
        for _ in range(given.steps):
            for w in recipes:
                times[w].append(step(*recipes[w], given.device))
    views = 2 * plan["batch_size"]
    ratios = sorted(a / b for a, b in zip(times[0.1], times[0.0], strict=True))
    joint, plain = (1000 * statistics.median(times[w]) / views for w in (0.1, 0.0))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    lines = [
        f"{given.steps} steps of {views} views of {' x '.join(map(str, plan['patch_size']))} voxels, "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}",
        "",
        "| recipe | ms per view (median) | ratio (median of pairs, 10 to 90 %) |",
        "|---|---|---|",
        f"| contrast weight 0 | {plain:.1f} | 1 |",
        f"| joint | {joint:.1f} | {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) |",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    header = "Written by `python -m benchmarks.step`.\n\n"
    (RESULTS / f"step_{given.device.split(':')[0]}.md").write_text(header + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
