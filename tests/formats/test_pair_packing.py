"""Codes of every width come back, take their bits alone, and lie in the order of widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.formats.packing import pack
from kvquant.formats.pair_packing import PairRows


def drawn(heads: int, pairs: int, seed: int, high: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, high + 1, (heads, pairs), generator=generator).float()


def codes_of(rows: PairRows, blocks: int, size: int, seed: int) -> torch.Tensor:
    """Random codes, each below two to the power of its width."""
    heads, dim = rows.channel_widths.shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(0, 256, (blocks, heads, size, dim), generator=generator)
    return (wide % (1 << rows.channel_widths[:, None])).to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    pairs=st.integers(1, 12),
    size=st.sampled_from([4, 16, 32]),
    high=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_codes_come_back_and_take_their_bits(
    heads: int, pairs: int, size: int, high: int, seed: int
) -> None:
    widths = drawn(heads, pairs, seed, high)
    rows = PairRows(widths)
    codes = codes_of(rows, 3, size, seed)
    packed = rows.pack(codes)
    assert packed.shape == (3, size * 2 * int(widths.sum()) // 8)
    assert rows.token_bits == 2 * int(widths.sum())
    assert torch.equal(rows.unpack(packed, size), codes)
    assert torch.equal(rows.whole(rows.by_width(codes)), codes)


def test_blocks_are_packed_by_themselves() -> None:
    rows = PairRows(drawn(2, 8, 1))
    codes = codes_of(rows, 4, 16, 2)
    packed = rows.pack(codes)
    for block in range(4):
        assert torch.equal(packed[block], rows.pack(codes[block : block + 1])[0])


def test_wide_codes_are_two_parts() -> None:
    rows = PairRows(torch.tensor([[6, 2]]))
    codes = codes_of(rows, 1, 4, 0)
    wide = codes[0, 0][:, [1, 3]], codes[0, 0][:, [0, 2]]  # pair 1 and pair 0
    expected = [pack(wide[0].flatten(), 2), pack(wide[1].flatten() & 15, 4)]
    expected.append(pack(wide[1].flatten() >> 4, 2))
    assert torch.equal(rows.pack(codes)[0], torch.cat(expected))


@pytest.mark.parametrize("width", [0, 9])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="widths: must be 1 to 8"):
        PairRows(torch.tensor([[3, width]]))
