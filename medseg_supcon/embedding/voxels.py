"""The features of sampled voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from monai.transforms import Compose, SpatialPadd
from torch import Tensor

from medseg_supcon.datasets import Case, Dataset, items, load_items
from medseg_supcon.errors import DataError
from medseg_supcon.losses import IGNORE_INDEX, VoxelSampler
from medseg_supcon.networks import ContrastiveNetwork
from medseg_supcon.plan import LabelPreprocessingd


def sample_features(
    preprocessing: Compose,
    plan: dict[str, Any],
    dataset: Dataset,
    cases: Sequence[Case],
    networks: dict[str, ContrastiveNetwork],
    voxels: int,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features (N, F) of the sampled voxels by each network, their labels (N,) and scans (N,)."""
    patch = plan["patch_size"]
    prepare = Compose(
        [
            preprocessing,
            LabelPreprocessingd(plan),
            SpatialPadd("image", patch),
            SpatialPadd("label", patch, value=IGNORE_INDEX),
        ]
    )
    sampler = VoxelSampler("stratified", max(len(plan["labels"]), -(-voxels // len(cases))), seed=seed)
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    labels, scans = [], []
    for number, item in enumerate(load_items(items(cases, dataset.root), dataset.root)):
        case = prepare(item)
        label = torch.as_tensor(case["label"]).long()
        indices = sampler(label).indices
        where = torch.stack(torch.unravel_index(indices, label.shape[1:]), 1)
        image = torch.as_tensor(case["image"])
        for name, rows in voxel_features(networks, image, where, patch, device).items():
            features[name].append(rows)
        labels.append(label.flatten()[indices])
        scans.append(torch.full_like(indices, number))
    if not sum(len(part) for part in labels):
        raise DataError(f"{dataset.root}: no labelled voxel in the chosen cases.")
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return joined, torch.cat(labels).numpy(), torch.cat(scans).numpy()


@torch.no_grad()
def voxel_features(
    networks: dict[str, ContrastiveNetwork],
    image: Tensor,
    where: Tensor,
    patch: Sequence[int],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Features of single voxels, patch by patch, so that memory is one patch's whatever the scan's size.

    A voxel's features come from the window whose centre is nearest, of windows that overlap by half.

    Args:
        networks: name -> network.
        image: (C, X, Y, Z), no smaller than a patch.
        where: (N, 3) voxel indices.
        patch: voxels per axis.
        device: of the networks.

    Returns:
        name -> (N, F) float32, on the CPU.
    """
    windows = dense_patch_slices(tuple(image.shape[1:]), tuple(patch), tuple(max(1, p // 2) for p in patch))
    starts = torch.tensor([[s.start for s in window] for window in windows])
    size = torch.tensor(list(patch))
    distance = ((where[:, None].double() + 0.5 - starts - size / 2) / size).abs().amax(2)
    nearest = distance.argmin(1)
    found: dict[str, Tensor] = {}
    for number in torch.unique(nearest).tolist():
        mine = nearest == number
        inside = where[mine] - starts[number]
        part = image[(slice(None), *windows[number])][None].to(device)
        for name, network in networks.items():
            features = network.forward_features(part)[1][0].float().cpu()
            rows = features[:, inside[:, 0], inside[:, 1], inside[:, 2]].T
            if name not in found:
                found[name] = rows.new_zeros(len(where), rows.shape[1])
            found[name][mine] = rows
    return found
