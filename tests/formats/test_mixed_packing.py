"""Codes of mixed widths: every bit where the module's docstring says, round trips, refusals."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.formats.lane_layout import pack_chunks
from kvquant.formats.mixed_packing import MAX_WIDTH, MixedRows


class Case(NamedTuple):
    """A layout and codes by channel that fit into it."""

    order: torch.Tensor  # [heads, pairs]
    widths: torch.Tensor  # [heads, tiles]
    codes: torch.Tensor  # uint8 [blocks, heads, size, head_dim]

    @property
    def rows(self) -> MixedRows:
        return MixedRows(self.order, self.widths)


def width_of_channels(order: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Width of every channel's codes, `[heads, head_dim]`."""
    heads, pairs = order.shape
    out = torch.zeros(heads, 2 * pairs, dtype=torch.long)
    for head in range(heads):
        for place, pair in enumerate(order[head].tolist()):
            out[head, pair] = out[head, pair + pairs] = widths[head, place // 8]
    return out


def random_case(heads: int, dim: int, blocks: int, size: int, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    pairs = dim // 2
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(heads)])
    widths = torch.randint(1, MAX_WIDTH + 1, (heads, pairs // 8), generator=generator)
    codes = torch.randint(0, 64, (blocks, heads, size, dim), generator=generator)
    limit = 1 << width_of_channels(order, widths)
    return Case(order, widths, (codes % limit[:, None]).to(torch.uint8))


CASES = {
    "heads": st.integers(1, 4),
    "dim": st.integers(1, 16).map(lambda tiles: 16 * tiles),
    "blocks": st.integers(0, 3),
    "size": st.sampled_from([1, 2, 5, 64, 67, 128]),
    "seed": st.integers(0, 10**6),
}


def bytes_by_the_docstring(case: Case) -> list[list[int]]:
    """The bytes of each block, rows bit by bit."""
    pairs = case.order.shape[1]
    out = []
    for number, block in enumerate(case.codes.tolist()):
        packed: list[int] = []
        for head, tokens in enumerate(block):  # a block stores the codes of each head together
            order = case.order[head].tolist()
            whole = len(tokens) // 64 * 64
            for first in range(0, whole, 64):
                chunk = case.codes[number, head, first : first + 64]
                for tile, width in enumerate(case.widths[head].tolist()):
                    eight = order[8 * tile : 8 * tile + 8]
                    channels = eight + [pair + pairs for pair in eight]
                    packed += pack_chunks(chunk[:, channels], width, of_keys=True).tolist()
            for channels in tokens[whole:]:
                for tile, width in enumerate(case.widths[head].tolist()):
                    eight = order[8 * tile : 8 * tile + 8]
                    for plane in range(width):  # lowest bit first
                        for shift in (0, pairs):  # first channels in the lower byte
                            bits = [channels[pair + shift] >> plane & 1 for pair in eight]
                            packed.append(sum(bit << i for i, bit in enumerate(bits)))
        out.append(packed)
    return out


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_every_bit_is_where_the_docstring_says(
    heads: int, dim: int, blocks: int, size: int, seed: int
) -> None:
    case = random_case(heads, dim, blocks, size, seed)
    rows = case.rows
    packed = rows.pack(rows.to_tiles(case.codes))
    assert packed.dtype is torch.uint8
    assert packed.shape == (blocks, size * rows.token_bytes)
    assert packed.tolist() == bytes_by_the_docstring(case)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_codes_come_back(heads: int, dim: int, blocks: int, size: int, seed: int) -> None:
    case = random_case(heads, dim, blocks, size, seed)
    rows = case.rows
    tiles = rows.to_tiles(case.codes)
    found = rows.unpack(rows.pack(tiles), size)
    assert found.dtype is torch.uint8
    assert torch.equal(found, tiles)
    assert torch.equal(rows.from_tiles(found), case.codes)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_tiles_hold_the_channels_of_their_pairs(
    heads: int, dim: int, blocks: int, size: int, seed: int
) -> None:
    case = random_case(heads, dim, blocks, size, seed)
    rows = case.rows
    x = torch.randn(case.codes.shape, generator=torch.Generator().manual_seed(seed)).half()
    x = x.transpose(2, 3).contiguous().transpose(2, 3)  # any strides
    tiles = rows.to_tiles(x)
    back = rows.from_tiles(tiles)
    assert back.dtype is torch.float16 and back.is_contiguous()
    assert torch.equal(back, x)
    per_head = dim // 16
    assert tiles.shape == (blocks, size, heads * per_head, 16)
    for number in range(heads * per_head):
        head, tile = divmod(number, per_head)
        for i, pair in enumerate(case.order[head, 8 * tile : 8 * tile + 8].tolist()):
            assert torch.equal(tiles[:, :, number, i], x[:, head, :, pair])
            assert torch.equal(tiles[:, :, number, 8 + i], x[:, head, :, pair + dim // 2])


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_sizes(heads: int, dim: int, blocks: int, size: int, seed: int) -> None:
    case = random_case(heads, dim, blocks, size, seed)
    rows = case.rows
    assert rows.planes == [sum(widths) for widths in case.widths.tolist()]
    assert rows.token_bytes == 2 * int(case.widths.sum())
    # a code of `w` bits takes `w` bits, whatever its neighbours take
    channels = width_of_channels(case.order, case.widths)
    assert 8 * rows.token_bytes == int(channels.sum())
    # places of channels there and back, 4 bytes each, and of tiles and of each plane, 8 bytes each
    tables = 4 * 2 * heads * dim + 8 * (heads * dim // 16 + int(case.widths.sum()))
    assert rows.nbytes == tables
    assert sorted(set(case.widths.view(-1).tolist())) == [group.width for group in rows.groups]


@settings(max_examples=40, deadline=None)
@given(**{**CASES, "heads": st.integers(2, 4), "blocks": st.integers(1, 2)}, data=st.data())
def test_a_head_s_bytes_do_not_depend_on_the_other_heads(
    heads: int, dim: int, blocks: int, size: int, seed: int, data: st.DataObject
) -> None:
    case = random_case(heads, dim, blocks, size, seed)
    other = random_case(heads, dim, blocks, size, seed + 1)
    kept = data.draw(st.integers(0, heads - 1))
    for mine, theirs in ((case.order, other.order), (case.widths, other.widths)):
        theirs[kept] = mine[kept]
    other.codes[:, kept] = case.codes[:, kept]
    found = []
    for x in (case, other):
        rows = x.rows
        packed = rows.pack(rows.to_tiles(x.codes))
        found.append(packed.split([size * 2 * planes for planes in rows.planes], 1)[kept])
    assert found[0].shape == (blocks, size * 2 * int(case.widths[kept].sum()))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("width", [-1, 0, 7, 8])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_widths_beyond_six_bits_are_refused(width: int, place: tuple[int, int]) -> None:
    widths = torch.full((2, 4), 3)
    widths[place] = width
    with pytest.raises(ValueError, match="widths: must be 1 to 6"):
        MixedRows(torch.arange(32).expand(2, -1), widths)


@pytest.mark.parametrize("dim", [2, 8, 24, 40, 120])
def test_heads_that_do_not_fill_tiles_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim: {dim} is not a multiple of 16"):
        MixedRows(torch.arange(dim // 2)[None], torch.full((1, max(dim // 16, 1)), 3))


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (3, 4), (4, 2), (8,), (2, 4, 1)])
def test_widths_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    order = torch.arange(32).expand(2, -1)
    MixedRows(order, torch.full((2, 4), 3))
    with pytest.raises(ValueError, match="widths: shape"):
        MixedRows(order, torch.full(shape, 3))


def test_tables_of_a_file_are_fp32() -> None:
    case = random_case(2, 64, 1, 3, 0)
    rows, same = case.rows, MixedRows(case.order.float(), case.widths.float())
    tiles = rows.to_tiles(case.codes)
    assert torch.equal(same.to_tiles(case.codes), tiles)
    assert torch.equal(same.pack(tiles), rows.pack(tiles))
