"""What history.csv and TensorBoard record of a validation."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import torch
from ignite.engine import Engine, Events
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medseg_supcon.training import TrainingLog


def test_a_class_that_no_validation_case_shows_has_no_score(tmp_path: Path) -> None:
    """It does not enter any mean either; a 0 would look like a class that is always missed."""
    reference = torch.zeros(2, 1, 4, 4, 4)
    reference[:, :, :2] = 1  # class 1 in both cases, class 2 in none
    prediction = reference.clone()
    prediction[:, :, 3] = 2  # the network sees some
    validator = Engine(lambda _, batch: batch)
    for name, reduction in (("val_mean_dice", "mean"), ("val_dice_per_class", "mean_batch")):
        metric = DiceMetric(include_background=False, num_classes=3, reduction=reduction)
        IgniteMetricHandler(metric_fn=metric, save_details=reduction == "mean").attach(validator, name)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer = Engine(lambda *_: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: validator.run([(prediction, reference)]))
    log = TrainingLog(
        tmp_path,
        SimpleNamespace(terms={"loss": torch.tensor(1.0)}),
        optimizer,
        ["liver", "tumour"],
        validator,
    )
    log.draw_overlay = lambda _: None  # type: ignore[method-assign]
    log.attach(trainer)
    trainer.run([0])
    (row,) = csv.DictReader((tmp_path / "history.csv").read_text().splitlines())
    assert (float(row["val_mean_dice"]), float(row["val_dice_liver"]), row["val_dice_tumour"]) == (1, 1, "")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "validation/val_dice_liver" in events.Tags()["scalars"]
    assert "validation/val_dice_tumour" not in events.Tags()["scalars"]
