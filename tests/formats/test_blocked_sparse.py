"""Blocked sparse storage against a naive concatenation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.formats.blocked_sparse import (
    BlockedCSCMatrix,
    BlockedCSRMatrix,
    SparseArena,
    SparseSlab,
    put_valid,
)


def _dense(slabs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Token x channel matrix of all marked elements, by plain loops over blocks and heads."""
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
    densities=st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_arena_equals_naive_concatenation(
    blocks: list[int], heads: int, size: int, dim: int, densities: list[float], seed: int
) -> None:
    """Appends of different density, so that the room foreseen is too small now and then."""
    generator = torch.Generator().manual_seed(seed)
    parts, arena, at = [], None, 0
    for count, density in zip(blocks, densities, strict=False):
        x = torch.randn(count, heads, size, dim, generator=generator).half() + 3
        mask = torch.rand(x.shape, generator=generator) < density
        slab = SparseSlab.from_mask(x, mask)
        parts.append((x, mask))
        arena = arena or SparseArena(sum(blocks) + 1, slab)
        before = arena.begin[:at].clone()
        arena.put(at, slab)
        assert torch.equal(arena.begin[:at], before)  # nothing stored is moved
        at += count
    assert arena is not None
    expected = _dense(parts)
    stored = arena.view(slice(0, at))
    csc, csr = BlockedCSCMatrix([stored]), BlockedCSRMatrix([stored])
    assert csr.num_tokens == sum(blocks) * size
    assert csr.nnz == int(sum(m.sum() for _, m in parts))
    assert torch.equal(csr.to_standard_csr().to_dense(), expected)
    assert torch.equal(csc.to_standard_csc().to_dense(), expected.T)
    one_by_one = BlockedCSRMatrix([arena.view(slice(i, i + 1)) for i in range(at)])
    assert torch.equal(one_by_one.to_standard_csr().to_dense(), expected)
    order = torch.randperm(at, generator=generator)
    dense = torch.zeros(at, heads, size, dim)
    arena.view(order).put_into(dense)
    whole = torch.cat([torch.where(m, x, torch.zeros_like(x)).float() for x, m in parts])
    assert torch.equal(dense, whole[order])


def test_exact_bytes() -> None:
    x = torch.randn(5, 3, 32, 64).half()
    mask = torch.rand(x.shape) < 0.1
    slab = SparseSlab.from_mask(x, mask)
    arena = SparseArena(5, slab)
    arena.put(0, slab)
    assert arena.nbytes == slab.nbytes == 6 * 5 * 3 + 4 * int(mask.sum())


def test_positions_above_32767_survive() -> None:
    x = torch.arange(512 * 128).view(1, 1, 512, 128).half().clamp(max=60000.0)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[0, 0, 511, 127] = mask[0, 0, 256, 0] = True
    slab = SparseSlab.from_mask(x, mask)
    assert slab.positions.dtype is torch.int16
    assert slab.coordinates()[0].tolist() == [256 * 128, 512 * 128 - 1]
    out = torch.zeros(x.shape)
    slab.put_into(out)
    assert torch.equal(out != 0, mask)


def test_blocks_of_different_shapes_are_refused() -> None:
    slabs = [
        SparseSlab.from_mask(torch.zeros(1, 2, n, 16).half(), torch.zeros(1, 2, n, 16).bool())
        for n in (4, 8)
    ]
    with pytest.raises(ValueError, match="different shapes"):
        BlockedCSCMatrix(slabs)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 10**6))
def test_entries_in_any_order_with_empty_slots(elements: int, empty: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    taken = int(torch.randint(0, elements + 1, (1,), generator=generator))
    index = torch.randperm(elements, generator=generator)[:taken]
    order = torch.randperm(taken + empty, generator=generator)
    padded = torch.cat((index, torch.zeros(empty, dtype=torch.long)))[order]
    value = torch.cat((index + 1.0, torch.full((empty,), -7.0)))[order]
    valid = torch.cat((torch.ones(taken), torch.zeros(empty))).bool()[order]
    flat, expected = torch.full((elements,), 0.5), torch.full((elements,), 0.5)
    expected[index] = index + 1.0
    put_valid(flat, padded, value, valid)
    assert torch.equal(flat, expected)
