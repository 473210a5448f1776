"""What a training leaves to look at: TensorBoard events and history.csv."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.visualize import blend_images
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from medseg_supcon.errors import RunError
from medseg_supcon.files import write_csv
from medseg_supcon.training.ranks import mean_over_ranks
from medseg_supcon.training.tracking import Tracker

MEAN = "val_mean_dice"


def overlay_slice(image: Tensor, label: Tensor, prediction: Tensor) -> Tensor:
    """The axial slice with most foreground, reference beside prediction, as an RGB image.

    Args:
        image: (C, X, Y, Z); its first channel is shown.
        label, prediction: (1, X, Y, Z) class indices.

    Returns:
        (3, Y, 2X) in 0..1.
    """
    z = int(((label > 0) | (prediction > 0)).sum(dim=(0, 1, 2)).argmax())
    picture = image[:1, :, :, z].float()
    low, high = torch.quantile(picture, torch.tensor([0.01, 0.99], device=picture.device))
    picture = ((picture - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    panels = [torch.as_tensor(blend_images(picture, m[..., z].clamp_min(0), alpha=0.4)) for m in (label, prediction)]
    return torch.cat([p.rot90(1, (1, 2)) for p in panels], dim=2).clamp(0, 1)


class TrainingLog:
    """Writes every epoch's means to ``history.csv`` and TensorBoard, and an overlay image at validation.

    A resumed run drops rows and events after the epoch that it starts from. Rank 0 writes the means over all ranks.

    Args:
        folder: ``RUN/logs``.
        loss: module with ``terms``: name -> detached tensor of the last call.
        optimizer: its first group's learning rate is logged.
        labels: foreground class names, for the per-class Dice.
        validator: evaluator with metrics ``val_mean_dice`` and ``val_dice_per_class``; ``None`` without one.
        track: ``mlflow``: the scalars go there too.
    """

    def __init__(
        self,
        folder: str | Path,
        loss: Any,
        optimizer: Any,
        labels: Sequence[str],
        validator: Any = None,
        track: str | None = None,
    ) -> None:
        self.track = track
        self.tracker: Tracker | None = None
        self.folder, self.loss, self.optimizer = Path(folder), loss, optimizer
        self.path = self.folder / "history.csv"
        self.labels, self.validator = list(labels), validator
        self.rows: list[dict[str, Any]] = []
        self.writer: SummaryWriter | None = None
        self._sums: dict[str, Tensor] = {}
        self._count, self._since = 0, monotonic()
        self._overlay: Tensor | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        engine.add_event_handler(Events.COMPLETED, self.close)
        if self.validator is not None:
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.draw_overlay)

    def start(self, engine: Engine) -> None:
        """Start the epoch's sums; with the first epoch, open the files."""
        self._sums, self._count, self._since = {}, 0, monotonic()
        if self.writer is not None or idist.get_rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        done = engine.state.epoch - 1
        if done == 0:
            for stale in self.folder.glob("events.out.tfevents.*"):
                stale.unlink()
        elif self.path.exists():
            try:
                with self.path.open(newline="", encoding="utf-8") as stream:
                    self.rows = [r for r in csv.DictReader(stream) if int(r["epoch"]) <= done]
            except (KeyError, ValueError, TypeError, csv.Error):
                raise RunError(
                    f"{self.path} is damaged. Copy it again, or delete it: only its curves are lost."
                ) from None
        self.tracker = Tracker(self.folder, engine) if self.track else None
        self.writer = SummaryWriter(str(self.folder), purge_step=engine.state.iteration + 1 if done else None)

    def add(self, engine: Engine) -> None:
        """Add a step's terms to the epoch's means, on the device they are on."""
        for name, value in self.loss.terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def write(self, engine: Engine) -> None:
        """Write the epoch's row and scalars."""
        sums = mean_over_ranks(self._sums)
        if self.writer is None:  # a rank above 0
            return
        row: dict[str, Any] = {
            "epoch": engine.state.epoch,
            "step": engine.state.iteration,
            "seconds": round(monotonic() - self._since, 2),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        row |= {name: float(total) / max(1, self._count) for name, total in sums.items()}
        row |= self._validation(engine.state.epoch)
        self.rows.append(row)
        write_csv(self.path, list(dict.fromkeys(c for r in self.rows for c in r)), self.rows)
        scalars = {}
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step", "seconds"):
                group = "validation" if name.startswith("val_") else "train"
                scalars[f"{group}/{name}"] = value
                self.writer.add_scalar(f"{group}/{name}", value, row["step"])
        if self.tracker is not None:
            self.tracker.add(scalars, row["step"])
        if self._overlay is not None:
            self.writer.add_image("validation/reference_and_prediction", self._overlay, row["step"])
            self._overlay = None
        self.writer.flush()

    def _validation(self, epoch: int) -> dict[str, float | None]:
        if self.validator is None or self.validator.state.epoch != epoch:
            return {}
        state = self.validator.state
        metrics: Mapping[str, Any] = state.metrics
        per_class = torch.as_tensor(metrics["val_dice_per_class"]).reshape(-1).tolist()
        details = getattr(state, "metric_details", {}).get(MEAN)
        if details is not None:  # a class that is in no case has no score; MONAI's mean over none is 0
            shown = torch.as_tensor(details).isfinite().any(0).tolist()
            per_class = [value if there else None for value, there in zip(per_class, shown, strict=True)]
        row = {MEAN: float(metrics[MEAN])}
        return row | {f"val_dice_{name}": value for name, value in zip(self.labels, per_class, strict=True)}

    def draw_overlay(self, engine: Engine) -> None:
        """Draw the last validation case, for the epoch's entry."""
        if idist.get_rank() == 0:
            output = engine.state.output[0]
            image, label, logits = (torch.as_tensor(output[key]) for key in ("image", "label", "pred"))
            self._overlay = overlay_slice(image, label, logits.argmax(0, keepdim=True)).cpu()

    def close(self, engine: Engine) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.close()
