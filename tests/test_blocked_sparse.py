"""Blocked sparse storage against a naive concatenation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix, SparseSlab


def _dense(slabs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """token x channel matrix of all marked elements, by plain loops over blocks and heads."""
    rows = []
    for x, mask in slabs:
        kept = torch.where(mask, x, torch.zeros_like(x))
        for block in kept:
            rows.append(torch.cat(list(block), dim=-1))
    return torch.cat(rows)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 8, 32]),
    dim=st.sampled_from([8, 64, 80]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_standard_forms_equal_naive_concatenation(
    blocks: list[int], heads: int, size: int, dim: int, density: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    csc = BlockedCSCMatrix(heads, dim, size)
    csr = BlockedCSRMatrix(heads, dim, size)
    parts = []
    for count in blocks:
        x = torch.randn(count, heads, size, dim, generator=generator).half() + 3
        mask = torch.rand(x.shape, generator=generator) < density
        slab = SparseSlab.from_mask(x, mask)
        parts.append((x, mask))
        csc.append(slab)
        csr.append(slab)
    expected = _dense(parts)
    assert csr.num_tokens == sum(blocks) * size
    assert csr.nnz == int(sum(m.sum() for _, m in parts))
    assert torch.equal(csr.to_standard_csr().to_dense(), expected)
    assert torch.equal(csc.to_standard_csc().to_dense(), expected.T)
    assert csr.nbytes == sum(
        4 * (c * heads + 1) + 4 * int(m.sum()) for c, (_, m) in zip(blocks, parts, strict=True)
    )


def test_positions_above_32767_survive() -> None:
    x = torch.arange(512 * 128).view(1, 1, 512, 128).half().clamp(max=60000.0)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[0, 0, 511, 127] = mask[0, 0, 256, 0] = True
    slab = SparseSlab.from_mask(x, mask)
    assert slab.positions.dtype is torch.int16
    assert slab.unsigned_positions().tolist() == [256 * 128, 512 * 128 - 1]
    out = torch.zeros(x.shape)
    slab.put_into(out)
    assert torch.equal(out != 0, mask)


def test_select_repeats_and_reorders_blocks() -> None:
    x = torch.randn(4, 2, 8, 16).half()
    mask = torch.rand(x.shape) < 0.2
    slab = SparseSlab.from_mask(x, mask)
    order = torch.tensor([3, 0, 3])
    again = SparseSlab.from_mask(x[order], mask[order])
    chosen = slab.select(order)
    for field in ("pointers", "positions", "values"):
        assert torch.equal(getattr(chosen, field), getattr(again, field))


def test_wrong_block_shape_is_refused() -> None:
    matrix = BlockedCSCMatrix(2, 16, 8)
    slab = SparseSlab.from_mask(torch.zeros(1, 2, 4, 16).half(), torch.zeros(1, 2, 4, 16).bool())
    with pytest.raises(ValueError, match="slab"):
        matrix.append(slab)
