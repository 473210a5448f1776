"""nnU-Net's predictor with the network, weights, patch and spacing of one of our runs. All else is its own.

It runs in an interpreter that has nnunetv2 and monai (for the network) and does not need medseg_supcon:

    python benchmarks/_nnunet.py RUN SCAN OUT

Prints one line of JSON: the seconds, and the peak memory before predicting (MiB).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(variable, ".")  # it asks for them, but prediction does not use them


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plans(plan: dict[str, Any]) -> dict[str, Any]:
    """What nnU-Net's planner would write for the run's spacing and patch, as far as prediction needs it.

    The axes are transposed so that the network sees them in our order.
    """
    window = plan["intensity"][0]
    mean = (window["a_min"] + window["a_max"]) / 2
    intensities = {
        "percentile_00_5": window["a_min"],
        "percentile_99_5": window["a_max"],
        "mean": mean,
        "std": (window["a_max"] - mean) / window["b_max"],
    }
    smooth = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    resampling = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": "Dataset001_CT",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {
            "3d_fullres": {
                "preprocessor_name": "DefaultPreprocessor",
                "patch_size": plan["patch_size"],
                "spacing": plan["spacing"],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": resampling,
                "resampling_fn_data_kwargs": {**smooth, "order": 3},
                "resampling_fn_seg": resampling,
                "resampling_fn_seg_kwargs": {**smooth, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": resampling,
                "resampling_fn_probabilities_kwargs": {**smooth, "order": 1},
                "architecture": {},
            }
        },
    }


def main(run: Path, scan: Path, out: Path) -> dict[str, float]:
    import torch
    from monai.bundle import ConfigParser
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plan = json.loads((run / "configs" / "plan.json").read_text())
    network = ConfigParser({"network": plan["network_def"]}).get_parsed_content("network")
    weights = torch.load(run / "models" / "model.pt", weights_only=True)
    network.load_state_dict(weights)
    predictor = nnUNetPredictor(
        tile_step_size=1 - plan["inference"]["overlap"],
        use_gaussian=True,
        use_mirroring=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    manager = PlansManager(plans(plan))
    dataset = {"channel_names": {"0": "CT"}, "labels": plan["labels"], "file_ending": ".nii.gz"}
    predictor.manual_initialization(
        network, manager, manager.get_configuration("3d_fullres"), [weights], dataset, "nnUNetTrainer", None
    )
    out.mkdir(parents=True, exist_ok=True)
    before, start = peak(), time.perf_counter()
    # without worker processes, which only cost time for a single scan
    name = scan.name.removesuffix(".nii.gz")
    predictor.predict_from_files_sequential([[str(scan)]], [str(out / name)])
    return {"seconds": time.perf_counter() - start, "before": before}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main(*(Path(argument) for argument in sys.argv[1:]))
    print(json.dumps(result))
