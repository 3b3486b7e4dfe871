"""Kernels that pack blocks, compared with the PyTorch path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.kernels.pack_target import PackTarget
from kvquant.quantization.batched_quant import BatchedKVQuantizer


def same_outliers(a: SparseSlab | None, b: SparseSlab | None) -> bool:
    """The same elements, signs of zeros included; the order in a block is free."""
    if a is None or b is None:
        return a is b
    (ai, av), (bi, bv) = a.coordinates(), b.coordinates()
    ao, bo = ai.argsort(), bi.argsort()
    raw = torch.equal(av[ao].view(torch.int16), bv[bo].view(torch.int16))
    return torch.equal(a.count, b.count) and torch.equal(ai[ao], bi[bo]) and raw


def check_packed(quantizer: BatchedKVQuantizer, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Kernels pack what the PyTorch path packs.

    Returns:
        How many outliers of keys found no room. The others are compared only if it is 0.
    """
    k, v, bad = quantizer.kernel_pack(keys, values) or pytest.fail("not supported")
    key, value = quantizer.pack_keys(keys), quantizer.pack_values(values)
    assert torch.equal(k.codes, key.codes)
    assert torch.equal(v.codes, value.codes)
    assert torch.equal(v.zero, value.zero)
    assert torch.equal(v.scale, value.scale)
    assert same_outliers(v.outliers, value.outliers)
    assert v.outliers is None or v.outliers.excess is None or int(v.outliers.excess) == 0
    assert int(bad) == 0
    if key.outliers is None or k.outliers is None:
        assert k.outliers is key.outliers
        return 0
    excess = 0 if k.outliers.excess is None else int(k.outliers.excess)
    if not excess:
        assert same_outliers(k.outliers, key.outliers)
    marked = quantizer._encode_keys(keys)[1]
    assert marked is not None
    assert excess + k.outliers.nnz == int(marked.sum())
    return excess


def check_shared_arena(quantizer: BatchedKVQuantizer, size: int, slots: int) -> None:
    """Two appends into one arena hold what the PyTorch path packs at once.

    Args:
        quantizer: Of two heads of 64, with 3 bits.
        size: Tokens per block.
        slots: Outliers that the arena has room for.
    """
    device = quantizer.tables.key_zero.device
    x = torch.randn(4, 2, size, 64, generator=torch.Generator().manual_seed(1)).half().to(device)

    def arena() -> PackTarget:
        return PackTarget(
            torch.zeros((4, 2, size * 24), dtype=torch.uint8, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros((4, 2), dtype=torch.int32, device=device),
            torch.zeros((4, 2), dtype=torch.int16, device=device),
            torch.zeros(slots, dtype=torch.int16, device=device),
            torch.zeros(slots, dtype=torch.float16, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    both = arena(), arena()
    zero = torch.zeros((4, size), dtype=torch.float16, device=device)
    scale = torch.zeros_like(zero)
    for part in (slice(0, 1), slice(1, 4)):
        key_view, value_view = (
            replace(t, codes=t.codes[part], begin=t.begin[part], count=t.count[part])
            for t in both
            if t.begin is not None and t.count is not None
        )
        assert quantizer.kernel_pack_into(
            x[part], x[part], key_view, value_view, zero[part], scale[part]
        )
    key, value = quantizer.pack_keys(x), quantizer.pack_values(x)
    assert torch.equal(both[0].codes, key.codes)
    assert torch.equal(both[1].codes, value.codes)
    assert torch.equal(zero, value.zero)
    assert torch.equal(scale, value.scale)
    for t, expected in zip(both, (key.outliers, value.outliers), strict=True):
        assert t.begin is not None and t.count is not None
        assert t.positions is not None and t.values is not None
        assert expected is not None
        slab = SparseSlab(t.begin, t.count, t.positions, t.values, (4, 2, size, 64))
        assert slab.nnz + int(t.status[0]) == expected.nnz
        assert slab.nnz == min(slots, expected.nnz)
        assert int(t.begin.max()) <= slots
        index, kept = slab.coordinates()
        assert torch.equal(x.reshape(-1)[index], kept)
        assert index.unique().numel() == index.numel()
        if not int(t.status[0]):
            assert same_outliers(slab, expected)


def pack_at(
    quantizer: BatchedKVQuantizer,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Packs four blocks of 32 tokens by kernels.

    Returns:
        Codes, zeros and scales, then positions and values of outliers as sorted pairs.
    """
    _, heads, _, dim = keys.shape
    device, slots = keys.device, 4 * heads * 32 * dim
    room = (4, heads, 32 * dim * quantizer.bits // 8)

    def target() -> PackTarget:
        return PackTarget(
            torch.zeros(room, dtype=torch.uint8, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros((4, heads), dtype=torch.int32, device=device),
            torch.zeros((4, heads), dtype=torch.int16, device=device),
            torch.zeros(slots, dtype=torch.int16, device=device),
            torch.zeros(slots, dtype=keys.dtype, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    both = target(), target()
    ranges = torch.zeros((2, 4, 32), dtype=keys.dtype, device=device)
    assert quantizer.kernel_pack_into(keys, values, *both, ranges[0], ranges[1], places)
    found = [*(t.codes for t in both), ranges]
    for t in both:
        assert t.begin is not None and t.count is not None
        assert t.positions is not None and t.values is not None
        slab = SparseSlab(t.begin, t.count, t.positions, t.values, (4, heads, 32, dim))
        index, kept = slab.coordinates()
        order = index.argsort()
        found += [t.count, index[order], kept[order]]
    return found
