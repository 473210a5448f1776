"""The streaming window equals MONAI's, and the resampling back equals scipy's trilinear interpolation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import SlidingWindowInferer
from scipy.ndimage import map_coordinates

from medseg_supcon.inference import GridMapping, windows
from medseg_supcon.inference import prepare as module

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 23)] * 3),
    patch=st.tuples(*[st.integers(2, 12)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    batch=st.integers(1, 5),
)
def test_windows_are_those_of_monai(shape: tuple[int, ...], patch: tuple[int, ...], overlap: float, batch: int) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, *shape)
    network = torch.nn.Conv3d(2, 3, 3, padding=1)
    with torch.inference_mode():
        expected = SlidingWindowInferer(patch, batch, overlap, mode="gaussian")(image[None], network)[0]
        chunks = [c.clone() for c in windows(image, network, patch, overlap, batch, CPU, CPU)]
    assert all(chunk.shape[1] <= patch[0] for chunk in chunks)
    torch.testing.assert_close(torch.cat(chunks, 1), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    model_shape=st.tuples(*[st.integers(1, 9)] * 3),
    shape=st.tuples(*[st.integers(1, 11)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    scale=st.tuples(*[st.floats(0.2, 4.0)] * 3),
    shift=st.tuples(*[st.floats(-3, 3)] * 3),
    cuts=st.lists(st.integers(1, 4), min_size=9, max_size=9),
    block=st.sampled_from([64, 2**26]),
)
def test_the_way_back_is_trilinear_interpolation(
    model_shape: tuple[int, ...],
    shape: tuple[int, ...],
    order: list[int],
    signs: tuple[float, ...],
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    cuts: list[int],
    block: int,
) -> None:
    """Any rotation, mirroring and scaling, however the rows are split into chunks."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, *model_shape)).astype(np.float32)
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, source in enumerate(order):
        start = 0.0 if signs[axis] > 0 else float(model_shape[axis] - 1)
        matrix[axis, source], matrix[axis, 3] = signs[axis] * scale[axis], start + shift[axis]
    coordinates = (matrix @ np.stack([*np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))]))[:3]
    coordinates = np.clip(coordinates, 0, np.array(model_shape)[:, None] - 1)
    near = np.abs(coordinates - np.round(coordinates)) < 1e-9
    coordinates = np.where(near, np.round(coordinates), coordinates)
    expected = [map_coordinates(v.astype(np.float64), coordinates, order=1).reshape(shape) for v in values]

    model_affine = np.diag([1.5, 2.0, 0.7, 1.0])
    way = GridMapping.between(model_affine, model_shape, model_affine @ matrix, shape)
    assert way is not None
    result = np.full((2, *shape), np.nan)
    view = result.transpose(0, *(axis + 1 for axis in way.order))
    ends = np.minimum(np.cumsum([0, *cuts]), model_shape[0])
    chunks = [torch.from_numpy(values[:, a:b]) for a, b in pairwise(ends) if b > a]
    before, module.BLOCK_BYTES = module.BLOCK_BYTES, block
    try:
        for rows, planes in way.blocks(chunks, None):
            for index, plane in enumerate(planes):
                assert np.isnan(view[index, rows]).all()  # each row once
                view[index, rows] = plane.numpy()
    finally:
        module.BLOCK_BYTES = before
    # The grids are one where they differ by less than SAME voxels.
    np.testing.assert_allclose(result, np.stack(expected), atol=8 * module.SAME)


def test_grids_with_other_axes_have_no_way() -> None:
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    assert GridMapping.between(np.eye(4), (9, 9, 9), turned, (9, 9, 9)) is None
    assert GridMapping.between(np.eye(4), (9, 9, 9), np.diag([2.0, 1, 1, 1]), (5, 9, 9)) is not None
