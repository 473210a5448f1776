"""Class separation and projections of features against loops, numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg_supcon.embedding import class_separation, principal_components, scatter_figure, t_sne


def clouds(distance, n=30, classes=3, width=4, seed=0):
    """Gaussian clouds on a simplex, in two scans: (vectors, labels, scans)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), n)
    centres = distance * np.eye(classes, width)
    vectors = centres[labels] + rng.normal(0, 1, (len(labels), width))
    return vectors.astype(np.float32), labels, np.tile([0, 1], len(labels) // 2)


def silhouette_by_hand(vectors, labels):
    total = 0.0
    for i, a in enumerate(vectors):
        mean = {}
        for c in set(labels.tolist()):
            others = [math.dist(a, b) for j, b in enumerate(vectors) if labels[j] == c and j != i]
            mean[c] = math.fsum(others) / len(others)
        own = mean.pop(int(labels[i]))
        nearest = min(mean.values())
        total += (nearest - own) / max(nearest, own)
    return total / len(vectors)


def test_silhouette_against_loops():
    vectors, labels, scans = clouds(2.0, n=12)
    found = class_separation(vectors, labels, scans)["silhouette"]
    assert found == pytest.approx(silhouette_by_hand(vectors.astype(float), labels), abs=1e-4)


def test_far_clouds_separate_and_noise_does_not():
    far = class_separation(*clouds(30.0))
    none = class_separation(*clouds(0.0, n=100))
    assert far["linear_probe"] == 1.0 and far["silhouette"] > 0.8
    assert none["linear_probe"] == pytest.approx(1 / 3, abs=0.1) and abs(none["silhouette"]) < 0.1
    assert far["centroid_similarity"] < none["centroid_similarity"]


def test_the_probe_is_tested_on_other_scans():
    # Within a scan the class can be read off; what tells it is turned round in the other scan.
    labels, scans = np.tile([0, 1], 40), np.repeat([0, 1], 40)
    vectors = np.where(scans == 0, labels, 1 - labels)[:, None].astype(np.float32)
    assert class_separation(vectors, labels, scans)["linear_probe"] == 0.0
    assert class_separation(vectors[:40], labels[:40], scans[:40])["linear_probe"] == 1.0


def test_the_order_of_voxels_does_not_matter():
    vectors, labels, scans = clouds(3.0)
    order = np.random.default_rng(1).permutation(len(labels))
    there, back = (
        class_separation(vectors, labels, scans),
        class_separation(vectors[order], labels[order], scans[order]),
    )
    assert there == pytest.approx(back, abs=1e-3)


def test_collapsed_vectors_have_no_figure():
    _, labels, scans = clouds(1.0)
    found = class_separation(np.ones((len(labels), 3), np.float32), labels, scans)
    assert set(found.values()) == {None}
    assert set(class_separation(*clouds(1.0, classes=1)).values()) == {None}


def test_lengths_and_nans_are_refused():
    vectors, labels, scans = clouds(1.0)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        class_separation(vectors[1:], labels, scans)
    with pytest.raises(ValueError, match="NaN"):
        class_separation(vectors * np.nan, labels, scans)


def test_principal_components_are_those_of_the_svd():
    vectors = clouds(2.0)[0]
    points, shares = principal_components(vectors)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-3)
    assert shares == pytest.approx((s**2 / (s**2).sum())[:2].tolist(), abs=1e-4)


def test_principal_components_of_little():
    assert principal_components(np.ones((5, 3), np.float32))[0].shape == (5, 2)
    assert principal_components(np.arange(5, dtype=np.float32)[:, None])[0].shape == (5, 2)


def test_t_sne_keeps_far_clouds_apart():
    vectors, labels, _ = clouds(30.0, n=15)
    points = t_sne(vectors)
    assert silhouette_by_hand(points, labels) > 0.5
    assert np.array_equal(points, t_sne(vectors))
    assert t_sne(vectors[:3]).shape == (3, 2)


def test_the_picture_is_drawn(tmp_path):
    vectors, labels, _ = clouds(3.0)
    panels = [("one", vectors[:, :2]), ("two", vectors[:, 1:3]), ("three", vectors[:, 2:])]
    scatter_figure(panels, labels, ("background", "organ", "tumour"), "Voxels", tmp_path / "a" / "p.png")
    assert (tmp_path / "a" / "p.png").stat().st_size > 10_000
