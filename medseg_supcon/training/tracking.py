"""``medseg train --track mlflow``: the scalars of TensorBoard in MLflow, by MONAI's handler."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from ignite.engine import Engine
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri

from medseg_supcon.errors import ConfigError

NEEDED = ("mlflow", "sqlalchemy", "alembic")


def check_tracker(name: str | None) -> None:
    """Raise a ConfigError if the tracker is not known or not installed; None is no tracker."""
    if name not in (None, "mlflow"):
        raise ConfigError(f"--track {name} is not known. Use: --track mlflow")
    missing = [module for module in NEEDED if name and importlib.util.find_spec(module) is None]
    if missing:
        text = f"--track mlflow needs {' and '.join(missing)}, which is not installed."
        raise ConfigError(f"{text} Run: pip install 'medseg-supcon[mlflow]'")


class Tracker:
    """One MLflow run of the experiment ``medseg``; a resumed training continues its run.

    The server is that of ``MLFLOW_TRACKING_URI``, or the file ``mlruns.db`` in the folder.

    Args:
        folder: ``RUN/logs``.
        engine: the trainer, when it has started.
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        check_tracker("mlflow")
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        place = folder.resolve()
        # MONAI continues the unfinished run of this name: other folders may have the same one.
        name = f"{place.parent.name} {hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
        uri = path_to_sqlite_uri(str(place / "mlruns.db"))
        self.handler = MLFlowHandler(uri, experiment_name="medseg", run_name=name)
        self.handler.start(engine)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Add the epoch's scalars; a sign in a name that MLflow does not take becomes ``_``."""
        for name, value in scalars.items():
            run = self.handler.cur_run.info.run_id
            self.handler.client.log_metric(run, re.sub(r"[^\w .:/-]", "_", name), value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self.handler.close()
