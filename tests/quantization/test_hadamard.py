"""The rotation: orthogonal, flat, exact in its shape."""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import UserError
from kvquant.quantization.hadamard import factors, rotate


@pytest.mark.parametrize("size", [1, 8, 12, 16, 20, 28, 64, 80, 96, 112, 128, 160, 192, 256])
def test_it_is_a_hadamard_matrix(size: int) -> None:
    matrix = rotate(torch.eye(size))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    x = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(x), inverse=True), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [64, 96])
def test_a_row_does_not_depend_on_the_others(size: int) -> None:
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(1))
    whole = rotate(x)
    for i in (0, 17, 39):
        assert torch.equal(rotate(x[i]), whole[i])


@pytest.mark.parametrize("size", [0, 6, 24 * 3, 36])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"head_dim: no Hadamard rotation of {size}"):
        factors(size)
