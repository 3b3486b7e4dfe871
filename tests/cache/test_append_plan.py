"""Tables of where a whole call's tokens go, against slices of one sequence at a time.

Also covers: kernels.block_places.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.append_plan import copy_columns
from kvquant.cache.layout import Layout, Span
from kvquant.kernels.block_places import block_count, gathered

CPU = torch.device("cpu")


def columns_of(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Tokens at columns, in a part of a larger tensor."""
    out = x.new_zeros((x.shape[0], x.shape[1], columns.shape[1] + 3, x.shape[3]))
    copy_columns(x, columns, out[:, :, 2:-1])
    assert not out[:, :, :2].any() and not out[:, :, -1:].any()
    return out[:, :, 2:-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.integers(0, 5)), min_size=1),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
    st.integers(0, 9),
)
def test_tables_say_what_slices_say(
    rows: list[tuple[int, int, int]], sinks: int, size: int, residual: int
) -> None:
    """Rows are (tokens, padding before, padding after); the columns are those of the widest row."""
    width = max(1, max(sum(row) for row in rows))
    layout = Layout(sinks, size, residual)
    spans: list[Span] = [slice(left, left + n) for n, left, _ in rows]
    plan = layout.append(spans)
    whole = plan.whole_call(CPU, sinks, size)
    few = min(n for n, _, _ in rows) < max(1, sinks)
    assert (whole is None) == few
    if whole is None:
        return
    assert plan.whole_call(CPU, sinks, size) is whole
    x = torch.arange(len(rows) * width).view(len(rows), 1, width, 1)
    blocks: list[torch.Tensor] = []
    for b, (span, tail) in enumerate(zip(spans, plan.after.tails, strict=True)):
        assert isinstance(span, slice)
        own = x[b, 0, span, 0]
        if sinks:
            assert whole.sinks is not None
            assert torch.equal(columns_of(x, whole.sinks)[b, 0, :, 0], own[:sinks])
        packed = plan.new_blocks(b) * size
        blocks += own[sinks : sinks + packed].split(size) if packed else ()
        if tail:
            assert whole.tail is not None
            found = columns_of(x, whole.tail)[b, 0, :, 0]
            assert torch.equal(found[:tail], own[sinks + packed :])
            assert (found[tail:] == own[-1]).all()
    if not blocks:
        assert whole.places is None
        return
    assert whole.places is not None and block_count(x, whole.places) == len(blocks)
    assert torch.equal(gathered(x, whole.places, size)[:, 0, :, 0], torch.stack(blocks))


def test_sequences_with_unfinished_blocks_are_taken_singly() -> None:
    layout = Layout(sinks=1, block_size=4, residual=0)
    layout.append([slice(0, 5), slice(0, 7)])  # the second one has a tail of 2
    assert layout.append([slice(0, 8), slice(0, 8)]).whole_call(CPU, 1, 4) is None


def test_chunks_that_end_with_a_block_are_taken_at_once() -> None:
    layout = Layout(sinks=1, block_size=4, residual=0)
    layout.append([slice(0, 5), slice(0, 9)])
    whole = layout.append([slice(0, 8), slice(2, 8)]).whole_call(CPU, 1, 4)
    assert whole is not None and whole.sinks is None
    assert whole.places is not None and whole.places.tolist() == [[0, 0], [0, 4], [1, 2]]


def test_columns_that_are_no_slice_are_taken_singly() -> None:
    layout = Layout(sinks=1, block_size=4, residual=0)
    assert layout.append([torch.tensor([0, 2, 3])]).whole_call(CPU, 1, 4) is None
