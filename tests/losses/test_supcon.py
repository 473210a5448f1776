"""SupConLoss: symmetries, other people's loss, precision, corners and complaints."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from medseg_supcon.losses import MemoryBank, SupConLoss

TILE = "medseg_supcon.losses.sums.CPU_TILE"  # rows of a tile
OPTIONS = [
    {"similarity": s, "positives": p, "denominator": d, "keys": k}
    for s, p, d, k in itertools.product(
        ("cosine", "euclidean"),
        ("same_class", "same_voxel"),
        ("all", "same_class", "other_class"),
        ("all", "other_view"),
    )
]
NAMES = ["-".join(o.values()) for o in OPTIONS]


def batch(n=40, dim=6, classes=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, dim, generator=g, dtype=dtype)
    ids = {
        "labels": torch.randint(classes, (n,), generator=g),
        "pair_ids": torch.randint(n // 2, (n,), generator=g),
        "view_ids": torch.randint(2, (n,), generator=g),
    }
    return z, ids


def value_and_gradient(loss, z, **ids):
    z = z.clone().requires_grad_()
    value = loss(z, **ids)
    value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("temperature", (0.2, 0.01))
def test_tiles_change_nothing(monkeypatch, options, temperature):
    z, ids = batch()
    loss = SupConLoss(temperature, **options)
    whole = value_and_gradient(loss, z, **ids)
    for tile in (1, 7, 16, 39):
        monkeypatch.setattr(TILE, tile)
        tiled = value_and_gradient(loss, z, **ids)
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_order_of_voxels_changes_nothing(monkeypatch, options):
    monkeypatch.setattr(TILE, 9)
    z, ids = batch()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    loss = SupConLoss(0.1, **options, class_weights=[1.0, 2.0, 0.5])
    value, gradient = value_and_gradient(loss, z, **ids)
    shuffled = value_and_gradient(loss, z[order], **{key: i[order] for key, i in ids.items()})
    torch.testing.assert_close(shuffled, (value, gradient[order]), rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(exponents=st.lists(st.integers(-300, 300), min_size=12, max_size=12))
def test_cosine_ignores_the_length_of_embeddings(exponents):
    z, ids = batch(12)
    scale = 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    value, gradient = value_and_gradient(SupConLoss(0.1), z, **ids)
    scaled_value, scaled_gradient = value_and_gradient(SupConLoss(0.1), z * scale, **ids)
    torch.testing.assert_close(scaled_value, value, rtol=1e-10, atol=0)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", (0.07, 0.5))
def test_equals_pytorch_metric_learning(temperature):
    theirs_module = pytest.importorskip("pytorch_metric_learning.losses")
    for seed in range(5):
        z, ids = batch(60, 16, 4, seed, torch.float32)
        mine = value_and_gradient(SupConLoss(temperature), z, labels=ids["labels"])
        other = z.clone().requires_grad_()
        theirs = theirs_module.SupConLoss(temperature)(other, ids["labels"])
        theirs.backward()
        torch.testing.assert_close(mine, (theirs.detach(), other.grad), rtol=1e-5, atol=1e-5)


def test_two_pairs_in_closed_form():
    # Two classes of two equal vectors, at right angles: L = log(e^{1/t} + 2) - 1/t.
    z = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    y = torch.tensor([0, 0, 1, 1])
    for t in (0.01, 0.1, 1.0):
        expected = torch.log1p(2 * torch.exp(torch.tensor(-1 / t, dtype=torch.float64)))
        torch.testing.assert_close(SupConLoss(t)(z, y), expected, rtol=1e-9, atol=1e-14)


def test_same_voxel_needs_no_labels():
    z, ids = batch()
    loss = SupConLoss(positives="same_voxel")
    with_labels = loss(z, ids["labels"], pair_ids=ids["pair_ids"])
    for ignore in (None, -1, 0, 1):
        loss = SupConLoss(positives="same_voxel", ignore_index=ignore)
        torch.testing.assert_close(loss(z, pair_ids=ids["pair_ids"]), with_labels)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("temperature", (0.01, 1e-6))
def test_finite_at_low_temperature_in_any_precision(options, dtype, temperature):
    z, ids = batch(50, 8, dtype=torch.float32)
    z = z * 10.0 ** torch.linspace(-9, 2, 50)[:, None]
    z[3] = 0.0
    z[4:7] = z[7]
    value, gradient = value_and_gradient(SupConLoss(temperature, **options), z.to(dtype), **ids)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value.isfinite()
    assert gradient.isfinite().all()
    # What is summed is float32: the same numbers given as float32 lose nothing.
    wide, _ = value_and_gradient(SupConLoss(temperature, **options), z.to(dtype).float(), **ids)
    torch.testing.assert_close(value, wide)


@pytest.mark.parametrize("scale", (1e-44, 1e-38, 1e-20, 1e20, 1e37))
def test_cosine_is_finite_for_any_length(scale):
    z, ids = batch(20, dtype=torch.float32)
    value, gradient = value_and_gradient(SupConLoss(0.01), z * scale, **ids)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_autocast_changes_nothing(monkeypatch, options):
    monkeypatch.setattr(TILE, 8)
    z, ids = batch(30, dtype=torch.float32)
    plain = value_and_gradient(SupConLoss(0.05, **options), z, **ids)
    with torch.autocast("cpu", torch.bfloat16):
        under = value_and_gradient(SupConLoss(0.05, **options), z, **ids)
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", (0.1, 0.01))
@pytest.mark.parametrize("length", (0.1, 2.0))
def test_float32_keeps_four_digits_of_the_gradient(temperature, length):
    z, ids = batch(200, 16, 4)
    z = F.normalize(z, dim=1) * length
    for options in OPTIONS:
        loss = SupConLoss(temperature, **options)
        wide_value, wide = value_and_gradient(loss, z, **ids)
        value, gradient = value_and_gradient(loss, z.float(), **ids)
        torch.testing.assert_close(value.double(), wide_value, rtol=1e-4, atol=1e-5)
        assert (gradient.double() - wide).norm() <= 1e-4 * wide.norm() + 1e-9, options


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("n", (0, 1, 2))
def test_without_anchors_the_loss_is_zero_and_attached(options, n):
    z = torch.full((n, 4), torch.inf, requires_grad=True)
    ids = {
        "labels": torch.arange(n),
        "pair_ids": torch.arange(n),
        "view_ids": torch.zeros(n, dtype=torch.long),
    }
    value = SupConLoss(**options)(z, **ids)
    assert value.item() == 0.0
    value.backward()
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_all_ignored_weightless_or_no_anchor_gives_zero():
    z, ids = batch(10)
    z = z.requires_grad_()
    y = ids["labels"]
    for value in (
        SupConLoss(ignore_index=7)(z, torch.full_like(y, 7)),
        SupConLoss(class_weights=[0.0, 0.0, 0.0])(z, y),
        SupConLoss(class_weights="balanced")(z, torch.arange(10)),
        SupConLoss()(z, y, anchors=torch.zeros(10, dtype=torch.bool)),
    ):
        assert value.item() == 0.0
        assert value.requires_grad
        value.backward()
    assert (z.grad == 0).all()


def test_one_class_only_is_finite():
    z, _ = batch(10)
    for denominator in ("all", "same_class", "other_class"):
        value, gradient = value_and_gradient(
            SupConLoss(denominator=denominator), z, labels=torch.zeros(10, dtype=torch.long)
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert (value == 0) == (denominator == "other_class")


def test_ignored_voxels_may_hold_anything():
    z, ids = batch(20)
    y = ids["labels"].clone()
    y[::3] = -1
    kept = y >= 0
    broken = z.clone()
    broken[::3] = torch.nan
    value, gradient = value_and_gradient(SupConLoss(ignore_index=-1), broken, labels=y)
    expected, expected_gradient = value_and_gradient(SupConLoss(), z[kept], labels=y[kept])
    torch.testing.assert_close((value, gradient[kept]), (expected, expected_gradient))
    assert (gradient[~kept] == 0).all()


def test_nan_in_an_embedding_is_not_hidden():
    z, ids = batch(20)
    z[2, 1] = torch.nan
    for temperature in (0.1, 0.001):
        assert SupConLoss(temperature)(z, ids["labels"]).isnan()


def test_an_infinite_distance_is_not_hidden():
    z = torch.tensor([[torch.inf, 0.0], [0.0, 1.0], [1.0, 0.0]])
    anchors = torch.tensor([True, False, False])
    assert not SupConLoss(0.1, "euclidean")(z, torch.zeros(3, dtype=torch.long), anchors=anchors).isfinite()


def test_identical_points_have_a_finite_euclidean_gradient():
    z = torch.ones(8, 3, requires_grad=True)
    SupConLoss(0.1, "euclidean")(z, torch.arange(8) % 2).backward()
    assert z.grad.isfinite().all()


def test_inputs_stay_as_they_are_whatever_their_layout():
    z, ids = batch(30, 6)
    before = z.clone(), {key: i.clone() for key, i in ids.items()}
    loss = SupConLoss(positives="same_voxel", denominator="same_class", keys="other_view")
    expected = value_and_gradient(loss, z, **ids)
    torch.testing.assert_close((z, ids), before, rtol=0, atol=0)
    strided = z.t().contiguous().t()
    assert not strided.is_contiguous()
    narrow = {key: i.to(torch.int32) for key, i in ids.items()}
    torch.testing.assert_close(value_and_gradient(loss, strided, **narrow), expected)
    assert not loss(z, **ids).requires_grad


def test_a_bank_is_keys_and_positives_but_never_anchors():
    z, ids = batch(12)
    bank = MemoryBank(3, 6, 5).double()
    bank.enqueue(torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3)
    stored, classes = bank.entries()
    both, labels = torch.cat((z, stored)), torch.cat((ids["labels"], classes))
    only = torch.arange(len(both)) < len(z)
    expected, gradient = value_and_gradient(SupConLoss(), both, labels=labels, anchors=only)
    mine = value_and_gradient(SupConLoss(), z, labels=ids["labels"], bank=bank)
    torch.testing.assert_close(mine, (expected, gradient[: len(z)]))
    # A lone voxel finds its positives in the bank.
    assert SupConLoss()(z[:1], ids["labels"][:1], bank=bank) > 0


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_a_second_derivative_is_refused(options):
    z, ids = batch(12)
    x = z.clone().requires_grad_()
    loss = SupConLoss(**options)
    sums = {
        "alone": lambda: loss(x, **ids),
        "one term of a sum": lambda: loss(x, **ids) + (x**3).sum(),
        "of a function of x": lambda: loss(x.tanh(), **ids) * x.norm(),
    }
    for total in sums.values():
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda v: loss(v, **ids) + (v**3).sum(), z)
    # Without an anchor the loss is 0 wherever it is, and its second derivative is 0, too.
    (gradient,) = torch.autograd.grad(
        loss(x, **ids, anchors=torch.zeros(12, dtype=torch.bool)) + (x**3).sum(), x, create_graph=True
    )
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), x)[0], 6 * x.detach())


def test_balanced_gives_every_class_the_same_weight():
    # 12 voxels of class 1 beside 500 of class 0 and 88 of class 7.
    g = torch.Generator().manual_seed(0)
    counts = {0: 500, 1: 12, 7: 88}
    y = torch.cat([torch.full((n,), c) for c, n in counts.items()])
    z = torch.randn(600, 5, generator=g, dtype=torch.float64)
    means = {c: SupConLoss()(z, y, anchors=y == c) for c in counts}
    plain = SupConLoss()(z, y)
    torch.testing.assert_close(plain, sum(n * means[c] for c, n in counts.items()) / 600)  # 2 % for class 1
    balanced = SupConLoss(class_weights="balanced")(z, y)
    torch.testing.assert_close(balanced, sum(means.values()) / 3)  # a third
    numbers = [600 / (3 * counts[c]) if c in counts else 0.0 for c in range(8)]
    torch.testing.assert_close(balanced, SupConLoss(class_weights=numbers)(z, y))
    # Only anchors count: of class 1 half, and of a class of one voxel none, since it has no positive.
    may = (y != 1) | (torch.arange(600) % 2 == 0)
    lone = torch.where(torch.arange(600) == 0, 3, y)
    half = SupConLoss()(z, lone, anchors=may & (lone == 1))
    rest = [SupConLoss()(z, lone, anchors=lone == c) for c in (0, 7)]
    torch.testing.assert_close(SupConLoss(class_weights="balanced")(z, lone, anchors=may), (half + sum(rest)) / 3)


def test_class_weights_in_every_form():
    z, ids = batch()
    y = ids["labels"]
    one, two, three = (SupConLoss()(z, y, anchors=y == c) * (y == c).sum() for c in range(3))
    n = [int((y == c).sum()) for c in range(3)]
    expected = (one + 4 * two) / (n[0] + 4 * n[1])
    for weights in ([1, 4, 0], (1.0, 4.0, 0.0), torch.tensor([1.0, 4.0, 0.0])):
        torch.testing.assert_close(SupConLoss(class_weights=weights)(z, y), expected)
    torch.testing.assert_close(SupConLoss(class_weights=None)(z, y), (one + two + three) / len(y))
    means = one / n[0] + two / n[1] + three / n[2]
    torch.testing.assert_close(SupConLoss(class_weights="balanced")(z, y), means / 3)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_balanced_changes_nothing_where_classes_are_equal(options):
    z, ids = batch(60)
    ids["labels"] = torch.arange(60) % 3
    ids["pair_ids"] = torch.arange(60) % 30  # both voxels of a pair are of one class
    ids["view_ids"] = torch.arange(60) // 30
    plain = value_and_gradient(SupConLoss(**options), z, **ids)
    assert plain[0] > 0
    torch.testing.assert_close(value_and_gradient(SupConLoss(**options, class_weights="balanced"), z, **ids), plain)


def test_labels_of_any_size_and_width():
    z, ids = batch(30)
    expected = SupConLoss(class_weights="balanced")(z, ids["labels"])
    for labels in (
        ids["labels"].to(torch.int32),
        ids["labels"].to(torch.uint8),
        ids["labels"] - 5,
        ids["labels"] * 2**61 - 2**62,
    ):
        torch.testing.assert_close(SupConLoss(class_weights="balanced")(z, labels), expected)


Z, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be at least 1e-06, got 0.0"),
        ({"temperature": 1e-7}, ValueError, "temperature must be at least 1e-06, got 1e-07"),
        ({"temperature": -0.1}, ValueError, "temperature must be at least 1e-06, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be finite, got inf"),
        ({"temperature": torch.tensor(0.1)}, TypeError, "temperature must be a number, got tensor"),
        ({"similarity": "cos"}, ValueError, "similarity must be one of cosine, euclidean, got 'cos'"),
        ({"positives": "x"}, ValueError, "positives .* got 'x'"),
        ({"denominator": "x"}, ValueError, "denominator .* got 'x'"),
        ({"keys": "x"}, ValueError, "keys .* got 'x'"),
        ({"similarity": "dot"}, ValueError, "similarity .* got 'dot'"),
        ({"class_weights": [1.0, -1.0]}, ValueError, r"class_weights .* got \[1.0, -1.0\]"),
        ({"class_weights": torch.ones(2, 2)}, ValueError, r"class_weights .* got \[\[1.0, 1.0\]"),
        ({"class_weights": [float("inf")]}, ValueError, "class_weights must be finite"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number, got '0.1'"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"class_weights": "ab"}, ValueError, "class_weights.* balanced, got 'ab'"),
        ({"class_weights": ["a"]}, TypeError, r"class_weights must be real numbers.* got \['a'\]"),
        ({"class_weights": torch.tensor([1 + 1j])}, TypeError, "class_weights must be real numbers"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an integer, got 'a'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer, got True"),
    ],
)
def test_bad_options_are_quoted(options, error, words):
    with pytest.raises(error, match=words):
        SupConLoss(**options)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "words"),
    [
        ({}, {"embeddings": torch.zeros(4)}, ValueError, r"embeddings must be \(N, D\), got shape \(4,\)"),
        (
            {},
            {"embeddings": torch.zeros(4, 2, dtype=torch.long)},
            TypeError,
            "floating point, got torch.int64",
        ),
        ({}, {"embeddings": [[1.0]]}, TypeError, "embeddings must be a tensor, got list"),
        ({}, {"labels": [0, 0]}, TypeError, "labels must be a tensor, got list"),
        ({}, {"bank": "x"}, TypeError, "bank must be a MemoryBank or a pair .* got str"),
        ({}, {"bank": Z}, TypeError, "bank must be a MemoryBank or a pair .* got Tensor"),
        ({}, {"labels": None}, ValueError, "labels must be given"),
        ({}, {"labels": Y[:3]}, ValueError, r"labels must be \(4,\).*got \(3,\)"),
        ({}, {"labels": Y.float()}, TypeError, "labels must be integers, got torch.float32"),
        ({}, {"anchors": Y}, ValueError, r"anchors must be \(4,\) bool"),
        ({}, {"bank": (torch.zeros(3, 5), Y[:3])}, ValueError, r"bank embeddings must be \(N, 2\)"),
        ({}, {"bank": (torch.zeros(3, 2), Y)}, ValueError, "bank labels"),
        ({"positives": "same_voxel"}, {}, ValueError, "pair_ids must be given"),
        ({"keys": "other_view"}, {}, ValueError, "view_ids must be given"),
        ({"class_weights": [1.0]}, {"labels": Y + 3}, ValueError, "labels must be in 0 .. 0.* got 3"),
        ({"class_weights": [1.0]}, {"labels": Y - 1}, ValueError, "labels must be in 0 .. 0.* got -1"),
        (
            {"positives": "same_voxel", "class_weights": [1.0]},
            {"labels": None, "pair_ids": Y},
            ValueError,
            "labels must be given",
        ),
    ],
)
def test_bad_arguments_are_quoted(options, arguments, error, words):
    with pytest.raises(error, match=words):
        SupConLoss(**options)(**{"embeddings": Z, "labels": Y, **arguments})


def test_its_name_tells_every_option():
    name = repr(SupConLoss(class_weights=[1, 2], ignore_index=255, keys="other_view"))
    for words in ("class_weights=(1.0, 2.0)", "ignore_index=255", "keys='other_view'"):
        assert words in name


def test_few_voxels_need_no_large_buffer():
    z, ids = batch(20)
    z = z.requires_grad_()
    for denominator in ("all", "other_class"):
        with LargestTensor() as largest:
            SupConLoss(denominator=denominator)(z, ids["labels"]).backward()
        assert largest.elements <= 4 * 20 * 20


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("temperature", (0.1, 0.01))
def test_no_tensor_grows_with_the_square_of_n(monkeypatch, options, temperature):
    n, dim, tile = 1000, 6, 64
    monkeypatch.setattr(TILE, tile)
    z, ids = batch(n, dim, 5, dtype=torch.float32)
    z = z.requires_grad_()
    loss = SupConLoss(temperature, **options)
    with LargestTensor() as largest:
        loss(z, **ids).backward()
    assert n * dim <= largest.elements <= max(n * dim, 4 * tile * tile) < n * n / 50
