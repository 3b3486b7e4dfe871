"""The transform balances sensitivities, keeps energy, and no other one has a smaller loss."""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import UserError
from kvquant.quantization.hadamard import rotate
from kvquant.quantization.wush_transform import wush_transform

DIM = 16


def moments(seed: int, spread: float = 1.5, dim: int = DIM) -> torch.Tensor:
    """Second moments of vectors whose directions have magnitudes of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * dim, dim, generator=generator, dtype=torch.float64)
    sizes = torch.randn(dim, generator=generator, dtype=torch.float64).mul(spread).exp()
    return (x * sizes).mT @ (x * sizes)


def loss(transform: torch.Tensor, m: torch.Tensor, h: torch.Tensor) -> float:
    """Of uniform rounding with a step in proportion to the root mean square."""
    undone = torch.linalg.inv(transform)
    return float((transform @ m @ transform.mT).trace() * (undone.mT @ h @ undone).trace())


@pytest.mark.parametrize("seed", range(4))
def test_it_is_balanced_and_keeps_energy(seed: int) -> None:
    m, h = moments(seed), moments(seed + 50)
    t = wush_transform(m, h, 1e-12)
    undone = torch.linalg.inv(t)
    for matrix in (undone.mT @ h @ undone, t @ m @ t.mT):
        diagonal = matrix.diagonal()
        torch.testing.assert_close(diagonal, diagonal.mean().expand(DIM), rtol=1e-5, atol=0)
    assert float((t @ m @ t.mT).trace()) == pytest.approx(float(m.trace()), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_transform_has_a_smaller_loss(seed: int) -> None:
    """Its loss is the squared sum of singular values of M**(1/2) H**(1/2), the bound for all."""
    m, h = moments(seed), moments(seed + 50)
    found = loss(wush_transform(m, h, 1e-12), m, h)
    roots = [torch.linalg.cholesky(x) for x in (m, h)]
    bound = float(torch.linalg.svdvals(roots[0].mT @ roots[1]).sum() ** 2)
    assert found == pytest.approx(bound, rel=1e-6)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.eye(DIM, dtype=torch.float64)
    others = [unit, rotate(unit)]
    others += [torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) for _ in range(5)]
    assert all(loss(other, m, h) > 1.2 * found for other in others)


def test_scales_do_not_matter_and_damping_bounds_the_condition() -> None:
    m, h = moments(1, 4.0), moments(2, 4.0)
    t = wush_transform(m, h, 0.01)
    torch.testing.assert_close(wush_transform(7e3 * m, 1e-4 * h, 0.01), t, rtol=1e-6, atol=1e-9)
    assert float(torch.linalg.cond(t)) < DIM / 0.01


def test_nothing_seen_is_a_hadamard_matrix() -> None:
    none, unit = torch.zeros(DIM, DIM).double(), torch.eye(DIM).double()
    torch.testing.assert_close(wush_transform(none, none, 0.01).abs(), (unit * 0 + DIM**-0.5))


def test_a_size_without_a_hadamard_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="no Hadamard rotation of 18"):
        wush_transform(moments(0, dim=18), moments(1, dim=18), 0.01)
