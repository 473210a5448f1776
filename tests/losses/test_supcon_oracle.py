"""SupConLoss against loops over pairs in Python floats, written from the formulas of docs/losses.md."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from medseg_supcon.losses import SupConLoss

COMBINATIONS = list(
    itertools.product(
        ("cosine", "euclidean"),
        ("same_class", "same_voxel"),
        ("all", "same_class", "other_class"),
        ("all", "other_view"),
    )
)


TILE = "medseg_supcon.losses.sums.CPU_TILE"  # rows of a tile
GRADIENT_SEED = 5  # a case of more than one dimension


def similarity(kind, a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    if kind == "euclidean":
        return -math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return dot / lengths if lengths else 0.0


def log_sum_exp(terms):
    if not terms:
        return -math.inf
    top = max(terms)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(t - top) for t in terms))


def oracle(
    z, y, pairs, views, *, kind, positives, denominator, keys, tau,
    w=None, ignore=None, bank=(), anchors=None,
):  # fmt: skip
    """The loss by its definition. Rows are (vector, class, voxel, view, may be anchor)."""
    rows = [(z[i], y[i], pairs[i], views[i], anchors is None or anchors[i]) for i in range(len(z)) if y[i] != ignore]
    rows += [(e, c, ("bank", n), "bank", False) for n, (e, c) in enumerate(bank) if c != ignore]
    losses = []  # of every anchor: its class and L_i
    for i, (zi, yi, pi, vi, may) in enumerate(rows):
        if not may:
            continue
        others = [j for j in range(len(rows)) if j != i and (keys == "all" or rows[j][3] != vi)]
        s = {j: similarity(kind, zi, rows[j][0]) / tau for j in others}
        field, mine = (1, yi) if positives == "same_class" else (2, pi)
        positive = [j for j in others if rows[j][field] == mine]
        if not positive:
            continue
        if denominator == "other_class":
            negative = [s[j] for j in others if rows[j][1] != yi]
            loss = math.fsum(log_sum_exp([s[p], *negative]) - s[p] for p in positive) / len(positive)
        else:
            lse = log_sum_exp([s[j] for j in others if denominator == "all" or rows[j][1] == yi])
            if lse == -math.inf:
                continue
            loss = lse - math.fsum(s[p] for p in positive) / len(positive)
        losses.append((yi, loss))
    if w == "balanced":
        # The mean over the classes of the mean over a class's anchors.
        means = []
        for c in {c for c, _ in losses}:
            of_class = [loss for y, loss in losses if y == c]
            means.append(math.fsum(of_class) / len(of_class))
        return math.fsum(means) / len(means) if means else 0.0
    weights = [w[c] if w else 1.0 for c, _ in losses]
    total = math.fsum(wi * loss for wi, (_, loss) in zip(weights, losses, strict=True))
    return total / math.fsum(weights) if math.fsum(weights) > 0 else 0.0


def random_case(seed, dtype=torch.float64):
    """Voxels of a few classes, one of them absent and one a singleton; voxels seen once, twice, thrice."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    n, dim = draw.randint(8, 22), draw.choice((1, 3, 5))
    z = torch.randn(n, dim, generator=generator, dtype=dtype)
    y = [draw.choice((0, 0, 0, 1, 1, 3, 3, -1)) for _ in range(n)]
    y[draw.randrange(n)] = 4
    pairs = [draw.randrange(max(n // 2, 1)) for _ in range(n)]
    views = [draw.randrange(2) for _ in range(n)]
    w = [draw.uniform(0.2, 3.0) for _ in range(5)]
    bank_size = draw.choice((0, 5))
    bank_z = torch.randn(bank_size, dim, generator=generator, dtype=dtype)
    bank_y = [draw.choice((0, 1, 3, 4, -1)) for _ in range(bank_size)]
    anchors = [draw.random() < 0.7 for _ in range(n)] if draw.random() < 0.4 else None
    return {
        "z": z,
        "y": y,
        "pairs": pairs,
        "views": views,
        "w": draw.choice((w, "balanced", None)),
        "bank_z": bank_z,
        "bank_y": bank_y,
        "anchors": anchors,
        "tau": draw.choice((0.05, 0.2, 1.0)),
        "tile": draw.choice((1, 3, 8, 384)),
    }


def ours_and_oracle(monkeypatch, options, case):
    kind, positives, denominator, keys = options
    monkeypatch.setattr(TILE, case["tile"])
    loss = SupConLoss(case["tau"], *options, case["w"], -1)
    mine = loss(
        case["z"],
        torch.tensor(case["y"]),
        pair_ids=torch.tensor(case["pairs"]),
        view_ids=torch.tensor(case["views"]),
        bank=(case["bank_z"], torch.tensor(case["bank_y"], dtype=torch.long)) if case["bank_y"] else None,
        anchors=torch.tensor(case["anchors"]) if case["anchors"] is not None else None,
    )
    truth = oracle(
        case["z"].tolist(), case["y"], case["pairs"], case["views"],
        kind=kind, positives=positives, denominator=denominator, keys=keys, tau=case["tau"],
        w=case["w"], ignore=-1,
        bank=list(zip(case["bank_z"].tolist(), case["bank_y"], strict=True)), anchors=case["anchors"],
    )  # fmt: skip
    return mine, truth


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_equals_the_definition_in_float64(monkeypatch, options):
    contrasted = 0
    for seed in range(12):
        mine, truth = ours_and_oracle(monkeypatch, options, random_case(seed))
        assert mine.dtype == torch.float64
        assert mine.item() == pytest.approx(truth, rel=1e-10, abs=1e-12), f"seed {seed}"
        contrasted += truth != 0.0
    assert contrasted >= 6


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_equals_the_definition_in_float32(monkeypatch, options):
    for seed in range(12, 16):
        mine, truth = ours_and_oracle(monkeypatch, options, random_case(seed, torch.float32))
        assert mine.dtype == torch.float32
        assert mine.item() == pytest.approx(truth, rel=1e-4, abs=1e-5), f"seed {seed}"


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize(("tau", "weights"), [(0.3, [1, 2, 1, 0.5, 1]), (0.01, "balanced")])
def test_gradcheck(monkeypatch, options, tau, weights):
    monkeypatch.setattr(TILE, 5)
    case = random_case(GRADIENT_SEED)
    assert case["z"].shape[1] > 1
    loss = SupConLoss(tau, *options, weights, -1)
    y, pairs, views = (torch.tensor(case[key]) for key in ("y", "pairs", "views"))
    anchors = torch.arange(len(y)) % 4 != 0
    bank = torch.randn(4, case["z"].shape[1], dtype=torch.float64), torch.tensor([0, 1, 3, 3])

    def function(z):
        return loss(z, y, pair_ids=pairs, view_ids=views, bank=bank, anchors=anchors)

    z = case["z"].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, z, eps=1e-7, atol=1e-4, rtol=1e-4)


def test_a_small_view_beside_a_large_one_keeps_its_digits():
    # 3,000 voxels of one view beside one of the other: the positives of most are a single voxel.
    n, generator = 3000, torch.Generator().manual_seed(0)
    z = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(n + 1, 4, generator=generator)
    z = torch.nn.functional.normalize(z.double(), dim=1).float()
    views = torch.zeros(n + 1, dtype=torch.long)
    views[-1] = 1
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    s = u[:n] @ u[-1] / 0.1
    # Each of the many has one key, its positive: L = 0. The last has n keys, all of them positive.
    expected = (s.logsumexp(0) - s.mean()) / (n + 1)
    z.requires_grad_()
    value = SupConLoss(0.1, denominator="same_class", keys="other_view")(
        z, torch.zeros(n + 1, dtype=torch.long), view_ids=views
    )
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=3e-6)
    # d/du_j, j < n: (softmax_j - 1 / n) u_last / tau / (n + 1), on the tangent of u_j.
    push = ((s.softmax(0) - 1 / n) / 0.1 / (n + 1))[:, None] * u[-1]
    tangent = push - u[:n] * (push * u[:n]).sum(1, keepdim=True)
    torch.testing.assert_close(z.grad[:n].double(), tangent, rtol=0, atol=2e-9)


@pytest.mark.parametrize("scale", (1e-30, 1e-17, 1e16, 1e19, 1e30))
def test_distances_that_float32_cannot_square(scale):
    z = random_case(GRADIENT_SEED, torch.float32)["z"] * scale
    n = len(z)
    y = [i % 3 for i in range(n)]
    # The temperature goes with the length, as far as it may, so that the scores are moderate.
    tau = max(scale, 1e-6)
    expected = oracle(
        z.tolist(), y, [0] * n, [0] * n, kind="euclidean", positives="same_class",
        denominator="all", keys="all", tau=tau,
    )  # fmt: skip
    z.requires_grad_()
    value = SupConLoss(tau, "euclidean")(z, torch.tensor(y))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    small = (z.detach().double() / scale).requires_grad_()
    SupConLoss(tau / scale, "euclidean")(small, torch.tensor(y)).backward()
    torch.testing.assert_close(z.grad.double() * scale, small.grad, rtol=1e-5, atol=1e-7 * min(scale / tau, 1))


def test_a_loss_beyond_float32_is_infinite():
    z = torch.tensor([[0.0], [1e38], [2e38], [3e38]])
    assert SupConLoss(1e-6, "euclidean")(z, torch.tensor([0, 1, 0, 1])) == math.inf


@pytest.mark.parametrize("factor", (1e-60, 1e38, 1e60))
def test_only_the_ratios_of_class_weights_count(factor):
    case = random_case(GRADIENT_SEED, torch.float32)
    y = [i % 3 for i in range(len(case["z"]))]
    w = [1.0, 2.0, 0.5]
    value = SupConLoss(0.1, class_weights=[v * factor for v in w])(case["z"], torch.tensor(y))
    truth = oracle(
        case["z"].tolist(), y, case["pairs"], case["views"], kind="cosine", positives="same_class",
        denominator="all", keys="all", tau=0.1, w=w,
    )  # fmt: skip
    assert value.item() == pytest.approx(truth, rel=1e-5)
