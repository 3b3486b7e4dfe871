"""Products are exact, whatever rows stand beside one, and rotations are rotations."""

from __future__ import annotations

import pytest
import torch

from kvquant.quantization.exact_product import (
    MATRIX,
    MAX_SIZE,
    VECTOR,
    product,
    random_rotation,
    to_grid,
)

CPU = torch.device("cpu")


def test_the_largest_sums_are_exact() -> None:
    """Against whole numbers of Python: all terms as large as they can be, or one off."""
    generator = torch.Generator().manual_seed(0)
    off = [torch.randint(0, 3, (size, size), generator=generator) for size in (MAX_SIZE,) * 2]
    rows, matrix = VECTOR - off[0], MATRIX - off[1]
    found = product(rows[None].float(), matrix[None].float())[0]
    for i, j in ((0, 0), (3, 77), (255, 255)):
        pairs = zip(rows[i].tolist(), matrix[:, j].tolist(), strict=True)
        assert int(found[i, j]) == sum(int(a) * int(b) for a, b in pairs)


def test_a_row_is_that_of_any_batch() -> None:
    x = torch.randn(2, 300, 96, generator=torch.Generator().manual_seed(1))
    matrix = torch.stack([random_rotation(96, seed, CPU) for seed in (3, 4)])
    grid = to_grid(x, x.abs().amax(-1, keepdim=True))
    whole = product(grid, matrix)
    for rows in (slice(0, 1), slice(7, 12), slice(100, 257)):
        assert torch.equal(product(grid[:, rows], matrix), whole[:, rows])


def test_grids_are_fine_and_zeros_stay() -> None:
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(2))
    x[0, 3] = 0.0
    peak = x.abs().amax(-1, keepdim=True)
    grid = to_grid(x, peak)
    assert torch.equal(grid, grid.round()) and grid.abs().max() == VECTOR
    torch.testing.assert_close(grid / VECTOR * peak, x, rtol=0, atol=float(peak.max()) / VECTOR)
    assert not grid[0, 3].any()


@pytest.mark.parametrize("size", [2, 6, 64, 128])
def test_rotations_keep_lengths_and_orientation(size: int) -> None:
    q = random_rotation(size, 5, CPU).double() / MATRIX
    torch.testing.assert_close(q @ q.T, torch.eye(size).double(), rtol=0, atol=1e-6)
    assert float(torch.linalg.det(q)) == pytest.approx(1.0, abs=1e-5)
    assert not torch.equal(random_rotation(size, 6, CPU), random_rotation(size, 5, CPU))
