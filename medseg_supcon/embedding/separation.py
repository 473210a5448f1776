"""Vectors of voxels: how well the classes are separated, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.lines import Line2D
from monai.metrics import EmbeddingCollapseMetric

from medseg_supcon.evaluation import INK, color_of, dress_image, legend_below, new_figure, save

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

FOLDS = 5
BACKGROUND_COLOR = "#9a9a9a"


def class_separation(vectors: Floats, labels: Integers, groups: Integers, seed: int = 0) -> dict[str, Any]:
    """How well the classes are separated among (N, D) vectors; ``groups`` (N,) is the scan that each voxel is from.

    - ``silhouette``: mean over voxels, -1 to 1, higher is better (Rousseeuw 1987), Euclidean.
    - ``linear_probe``: balanced accuracy of logistic regression on standardised vectors, cross-validated over scans.
    - ``centroid_similarity``, ``effective_rank_score``, ``collapse``: MONAI's ``EmbeddingCollapseMetric`` and its
      worst score, 0 to 1, lower is better.

    A score that does not exist (a single class, vectors that are all equal) is None.
    """
    from sklearn.metrics import silhouette_score

    present, collapse = np.unique(labels), ("centroid_similarity", "effective_rank_score", "collapse")
    result: dict[str, Any] = dict.fromkeys(("silhouette", "linear_probe", *collapse))
    if len(present) < 2 or len(present) == len(labels) or not np.ptp(vectors, axis=0).any():
        return result
    result["silhouette"] = float(silhouette_score(vectors, labels))
    result["linear_probe"] = _linear_probe(vectors, labels, groups, seed)
    metric = EmbeddingCollapseMetric(include_indicators=["centroid_similarity", "effective_rank"])
    scores = metric(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(labels))
    scores["collapse"] = scores.get("aggregate")
    return result | {name: None if scores.get(name) is None else float(scores[name]) for name in collapse}


def _linear_probe(vectors: Floats, labels: Integers, groups: Integers, seed: int) -> float | None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scans, rarest = len(np.unique(groups)), int(np.unique(labels, return_counts=True)[1].min())
    if scans == rarest == 1:
        return None
    if scans > 1:  # a scan's voxels are never on both sides
        folds = list(GroupKFold(min(FOLDS, scans)).split(vectors, labels, groups))
    else:
        folds = list(StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed).split(vectors, labels))
    if any(len(np.unique(labels[train])) < 2 for train, _ in folds):
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    predicted = cross_val_predict(probe, vectors, labels, cv=folds)
    # A class in a single scan cannot be learnt from the others: it counts as missed.
    return float(balanced_accuracy_score(labels, predicted))


def principal_components(vectors: Floats) -> tuple[Floats, list[float]]:
    """The first two principal components (N, 2), and the share of the variance that each explains."""
    from sklearn.decomposition import PCA

    if not np.ptp(vectors, axis=0).any():
        return np.zeros((len(vectors), 2), np.float32), [0.0, 0.0]
    count = min(2, *vectors.shape)
    pca = PCA(count, svd_solver="full")
    points = np.pad(pca.fit_transform(vectors), ((0, 0), (0, 2 - count))).astype(np.float32)
    return points, [*pca.explained_variance_ratio_.tolist(), 0.0][:2]


def t_sne(vectors: Floats, seed: int = 0) -> Floats:
    """A two-dimensional t-SNE map (N, 2) (van der Maaten and Hinton 2008), started from the principal components."""
    from sklearn.manifold import TSNE

    points, _ = principal_components(vectors)
    if len(vectors) < 5 or not points.any():
        return points
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    start = points / max(float(points[:, 0].std()), 1e-12) * 1e-4
    mapped = TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(vectors)
    return np.asarray(mapped, dtype=np.float32)


def scatter_figure(
    panels: Sequence[tuple[str, Floats]], labels: Integers, classes: Sequence[str], title: str, path: Path
) -> None:
    """Draws points (N, 2) by class index as a PNG; ``panels`` are (title, points), two in a row."""
    rows = -(-len(panels) // 2)
    figure = new_figure(9.4, 4.5 * rows + 0.9)
    order = np.random.default_rng(0).permutation(len(labels))  # no class covers the others
    colors = [BACKGROUND_COLOR, *map(color_of, range(len(classes) - 1))]
    for number, (name, points) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 2, number)
        axis.scatter(*points[order].T, c=[colors[c] for c in labels[order]], s=9, alpha=0.75, linewidths=0)
        dress_image(axis, name)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=color, label=f"{name} ({count})")
        for color, name, count in zip(colors, classes, np.bincount(labels, minlength=len(classes)), strict=True)
        if count
    ]
    legend_below(figure, handles)
    save(figure, path)
