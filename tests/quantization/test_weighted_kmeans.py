"""Weighted k-means against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.quantization import weighted_kmeans as module
from kvquant.quantization.weighted_kmeans import (
    improve_centers,
    spread_centers,
    weighted_kmeans,
)

Row = list[float]


def square(a: Row, b: Row) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def naive_loss(points: list[Row], weights: Row, centers: list[Row]) -> float:
    nearest = (min(square(p, c) for c in centers) for p in points)
    return sum(w * d for w, d in zip(weights, nearest, strict=True))


def naive_lloyd(points: list[Row], weights: Row, centers: list[Row]) -> list[Row]:
    """Lloyd's iterations of one problem in double precision, until no point changes its center."""
    before: list[int] = []
    while True:
        index = [min(range(len(centers)), key=lambda c: square(p, centers[c])) for p in points]
        if index == before:
            return centers
        before, moved = index, []
        for number, center in enumerate(centers):
            mine = [at for at, found in enumerate(index) if found == number]
            total = sum(weights[at] for at in mine)
            sums = [sum(weights[at] * points[at][d] for at in mine) for d in range(len(center))]
            moved.append([s / total for s in sums] if total > 0 else center)
        centers = moved


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Points, weights (some are 0) and the number of centers."""
    count, size = draw(st.integers(1, 6)), draw(st.integers(6, 40))
    shape = (draw(st.integers(1, 4)), size, draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    points = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.01, 1.0, 100.0]))
    weights = torch.rand(shape[:2], generator=generator)
    weights[:, : draw(st.integers(0, 3))] = 0
    return points, weights, count


@settings(max_examples=60, deadline=None)
@given(case=problems(), seed=st.integers(0, 100))
def test_iterations_end_where_plain_loops_do(
    case: tuple[torch.Tensor, torch.Tensor, int], seed: int
) -> None:
    points, weights, count = case
    start = spread_centers(points, weights, count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOLERANCE", 0.0)
        found, loss = improve_centers(points, weights, start)
    for at, (p, w) in enumerate(zip(points.tolist(), weights.tolist(), strict=True)):
        wanted = naive_loss(p, w, naive_lloyd(p, w, start[at].tolist()))
        scale = naive_loss(p, w, [[0.0] * points.shape[2]])
        assert naive_loss(p, w, found[at].tolist()) == pytest.approx(wanted, abs=1e-5 * scale)
        assert float(loss[at]) == pytest.approx(wanted, abs=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(case=problems(), seed=st.integers(0, 100))
def test_a_start_is_made_of_distinct_points_that_weigh(
    case: tuple[torch.Tensor, torch.Tensor, int], seed: int
) -> None:
    points, weights, count = case
    weights[:, -1] = 1.0
    start = spread_centers(points, weights, count, seed)
    for p, w, centers in zip(points, weights, start, strict=True):
        heavy = {tuple(row) for row in p[w > 0].tolist()}
        chosen = [tuple(row) for row in centers.tolist()]
        assert set(chosen) <= heavy
        assert len(set(chosen)) == min(count, len(heavy))


def test_a_start_follows_weight_times_squared_distance() -> None:
    """Of three points, the second center is drawn with known odds once the first is known."""
    points = torch.tensor([[0.0], [1.0], [3.0]]).expand(6000, -1, -1)
    weights = torch.tensor([4.0, 2.0, 1.0]).expand(6000, -1)
    start = spread_centers(points, weights, 2, seed=1)[:, :, 0]
    first = [float((start[:, 0] == value).double().mean()) for value in (0.0, 1.0, 3.0)]
    assert first == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)
    second = start[start[:, 0] == 0, 1]  # odds 2 * 1 to 1 * 9
    assert float((second == 3).double().mean()) == pytest.approx(9 / 11, abs=0.03)


def test_problems_do_not_depend_on_how_many_are_solved_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for their draws, which is why clusters here leave no choice."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.randint(0, 2, (5, 60, 3), generator=generator).float()
    weights = torch.rand(5, 60, generator=generator) + 0.1
    points = corners + torch.randn(5, 60, 3, generator=generator) * 1e-3 + 50.0
    together, loss = weighted_kmeans(points, weights, 8, seed=0)
    monkeypatch.setattr(module, "PIECE", 1)
    alone, other = weighted_kmeans(points, weights, 8, seed=0)
    for a, b in zip(together, alone, strict=True):
        order_a, order_b = (sorted(t.round().tolist()) for t in (a, b))
        assert order_a == order_b
    torch.testing.assert_close(loss, other, rtol=1e-2, atol=1e-6)
    assert float(loss.max()) < 60 * 3 * 2e-6  # 50 away from 0, distances of 1e-3 are not lost


def test_a_heavy_point_far_away_costs_the_others_no_precision() -> None:
    """As the first token's keys in some channels, which weigh as much as all others together."""
    generator = torch.Generator().manual_seed(6)
    corners = torch.randint(0, 2, (1, 400, 2), generator=generator).float()
    points = corners * 0.1 + torch.randn(1, 400, 2, generator=generator) * 1e-4
    points[:, 0] = 3000.0
    weights = torch.ones(1, 400)
    weights[:, 0] = 400
    centers, loss = weighted_kmeans(points, weights, 5, 0)
    p, w = points[0].tolist(), weights[0].tolist()
    best = [[a, b] for a in (0.0, 0.1) for b in (0.0, 0.1)]
    wanted = naive_loss(p, w, naive_lloyd(p, w, [*best, [3000.0, 3000.0]]))
    assert naive_loss(p, w, centers[0].tolist()) == pytest.approx(wanted, rel=0.01)
    assert float(loss) == pytest.approx(wanted, rel=0.05)


def test_more_centers_lose_less_and_weights_draw_them() -> None:
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(3, 500, 2, generator=generator)
    even = torch.ones(3, 500)
    losses = [float(weighted_kmeans(points, even, n, 0)[1].sum()) for n in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0]
    heavy = (points[:, :, 0] > 0).float() * 100 + 1
    centers, _ = weighted_kmeans(points, heavy, 16, 0)
    assert float((centers[:, :, 0] > 0).double().mean()) > 0.8


def test_a_problem_without_weight_counts_its_points_equally() -> None:
    points = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(5))
    weights = torch.stack([torch.zeros(50), torch.ones(50)])
    centers, loss = weighted_kmeans(points, weights, 1, 0)
    torch.testing.assert_close(centers[:, 0], points.mean(1))
    assert loss[0] == 0 and loss[1] > 0


def test_fewer_points_than_centers_are_met_exactly() -> None:
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0]]).expand(1, -1, -1)
    centers, loss = weighted_kmeans(points, torch.ones(1, 3), 8, 0)
    assert float(loss) == pytest.approx(0, abs=1e-9)
    assert {tuple(row) for row in centers[0].tolist()} == {(1.0, 2.0), (3.0, 4.0), (5.0, 5.0)}
