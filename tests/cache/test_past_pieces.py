"""The pieces of a past hold each of its tokens once, at its position, and no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache import past_pieces
from kvquant.cache.layout import Layout
from kvquant.cache.past_pieces import Piece, cut_past
from kvquant.kernels.blockwise_attention import NEVER

CPU = torch.device("cpu")


def rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of one element that is the position itself."""
    return positions[..., None].float(), -positions[..., None].float()


def cut(layout: Layout, *, causal: bool = False, queries: int = 1) -> list[Piece]:
    shape = torch.Size((len(layout.lengths), 2, queries, 16))
    return cut_past(layout, layout.view(), rope, shape, CPU, causal=causal)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
    st.integers(0, 40),
    st.integers(0, 20),
    st.sampled_from([32, 64, 4096]),
    st.booleans(),
)
def test_every_token_once_at_its_position(
    lengths: list[int], sinks: int, residual: int, most: int, causal: bool
) -> None:
    layout = Layout(sinks, 32, residual)
    layout.append([slice(0, n) for n in lengths])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past_pieces, "MAX_TOKENS", most)
        pieces = cut(layout, causal=causal)
    for row, length in enumerate(lengths):
        found: list[int] = []
        for piece in pieces:
            table = piece.rope[0].expand(len(lengths), -1, -1)[row, :, 0].long()
            assert table.numel() == piece.columns
            assert torch.equal(piece.rope[1], -piece.rope[0])
            if piece.positions is None:
                assert not causal
                there = torch.ones_like(table, dtype=torch.bool)
            else:
                there = piece.positions.expand(len(lengths), -1)[row] != NEVER
                assert torch.equal(piece.positions[row, there], table[there])
            found += table[there].tolist()
        assert found == list(range(length))
    blocks = [piece for piece in pieces if piece.part == "blocks"]
    assert all(piece.columns <= max(most, 32) for piece in blocks)
    assert sum(piece.columns for piece in blocks) == 32 * max(len(t) for t in layout.table)


def test_many_queries_make_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(0, 32, 0)
    layout.append([slice(0, 256)])
    assert [piece.columns for piece in cut(layout)] == [256]
    monkeypatch.setattr(past_pieces, "MAX_SCORES", 2 * 50 * 64)
    assert [piece.columns for piece in cut(layout, queries=50)] == [64] * 4
    assert [piece.columns for piece in cut(layout, queries=5000)] == [32] * 8  # at least a block


def test_blocks_that_sequences_share_are_read_once() -> None:
    """Beams and copies of a prompt list the same blocks."""
    layout = Layout(1, 32, 0)
    layout.append([slice(0, 65), slice(0, 65)])
    layout.select([1, 0, 1, 1])
    layout.append([slice(0, 32), slice(0, 0), slice(0, 32), slice(0, 0)])
    blocks = torch.arange(6.0)[:, None, None, None].expand(6, 1, 32, 1)  # of both arenas
    bases, out = [0, 4], torch.full((4, 1, 3, 32, 1), -1.0)
    for gather in layout.gather(layout.view(), 0, 3, CPU):
        chosen = torch.arange(4)[gather.blocks] if gather.arena == 0 else torch.arange(2)
        assert len(chosen.unique()) == len(chosen)
        gather.put(out, blocks[bases[gather.arena] + chosen])
    expected = [[2, 3, 4], [0, 1, -1], [2, 3, 5], [2, 3, -1]]
    assert out[:, 0, :, 0, 0].tolist() == expected
