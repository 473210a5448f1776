"""A run in MONAI Label's real server, started as docs/slicer.md says and asked through its REST interface.

MONAI Label needs pydicom 2, so it cannot be in this environment: MEDSEG_MONAI_LABEL is the Python of one that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg_supcon.inference import Predictor

PYTHON = os.environ.get("MEDSEG_MONAI_LABEL", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="MEDSEG_MONAI_LABEL is not set: the Python that has MONAI Label")
PATIENCE = 180  # seconds


@pytest.fixture
def server(trained_run: Path, phantoms: Path, tmp_path: Path) -> Iterator[str]:
    app = tmp_path / "apps" / "monaibundle"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    command = [PYTHON, "-m", "monailabel.main"]
    fetch = [*command, "apps", "--download", "--name", "monaibundle", "--output", "apps"]
    subprocess.run(fetch, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (app / "model").mkdir(exist_ok=True)
    (app / "model" / "my_run").symlink_to(trained_run)
    shutil.copytree(phantoms / "imagesTs", tmp_path / "studies")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --conf models my_run --conf zoo_source ngc --conf sam2 false"
    command += ["start_server", "--app", str(app), "--studies", "studies", *options.split()]
    command += ["--conf", "skip_trainers", "true"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while True:
                try:
                    urllib.request.urlopen(f"{address}/info/", timeout=10).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
                    time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def test_its_masks_are_those_of_predict(server: str, trained_run: Path, phantoms: Path, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{server}/info/") as answer:
        model: dict[str, Any] = json.load(answer)["models"]["my_run"]
    labels = json.loads((trained_run / "configs" / "plan.json").read_text())["labels"]
    assert model["labels"] == {name: value for name, value in labels.items() if value}
    predictor = Predictor(trained_run, device="cpu")
    for scan in sorted((phantoms / "imagesTs").glob("*.nii.gz")):
        name, file = scan.name.removesuffix(".nii.gz"), tmp_path / scan.name
        request = urllib.request.Request(f"{server}/infer/my_run?image={name}&output=image", method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            file.write_bytes(answer.read())
        image = nibabel.load(file)
        np.testing.assert_allclose(image.affine, nibabel.load(scan).affine, atol=1e-5)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), predictor.predict(scan).mask)
