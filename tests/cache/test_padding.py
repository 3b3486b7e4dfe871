"""Padding on either side or in between: which columns are tokens, and at which positions.

Also covers: kernels.blockwise_attention.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache.layout import Span
from kvquant.cache.padding import Padding
from kvquant.kernels.blockwise_attention import NEVER

CPU = torch.device("cpu")


def columns(span: Span) -> list[int]:
    """Those that a span holds."""
    if isinstance(span, slice):
        return list(range(span.start, span.stop))
    return [int(i) for i in span]


def take(
    padding: Padding, mask: torch.Tensor | None, batch: int, new: int, total: int
) -> list[Span]:
    """Spans of new columns; their positions are compared with counting."""
    spans = padding.spans(batch, new, total, mask)
    queries, keys = padding.positions(batch, new, total, mask, CPU)
    full = torch.ones(batch, total, dtype=torch.long) if mask is None else mask
    for row in range(batch):
        tokens = [i for i in range(new) if full[row, total - new + i]]
        assert columns(spans[row]) == tokens
        for i in range(new):
            before = int(full[row, : total - new + i + 1].sum())
            assert int(queries[row, i]) == max(before - 1, 0)
            if keys is not None:
                assert int(keys[row, i]) == (before - 1 if i in tokens else NEVER)
    assert (keys is None) == (new == 1)
    return spans


@given(st.data())
def test_any_mask_in_any_chunks(data: st.DataObject) -> None:
    width, batch = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    mask[0, 0] = 1
    padding = Padding()
    cuts = sorted(data.draw(st.sets(st.integers(1, width))) | {width})
    for past, total in pairwise([0, *cuts]):
        take(padding, mask[:, :total], batch, total - past, total)


def test_without_padding_nothing_is_kept() -> None:
    padding = Padding()
    assert take(padding, torch.ones(2, 5, dtype=torch.long), 2, 5, 5) == [slice(0, 5)] * 2
    padding.count_token()
    assert padding.crop(3) is None
    assert take(padding, None, 2, 4, 7) == [slice(0, 4)] * 2  # later calls need no mask


def test_counted_selected_cropped_and_forked() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    padding = Padding()
    take(padding, mask, 3, 4, 4)
    padding.select(torch.tensor([2, 0, 2]))
    fork = padding.fork()
    padding.count_token()
    assert padding.crop(5) == [4, 3, 4]
    assert padding.crop(2) == [1, 0, 1]
    assert fork.crop(4) == [3, 2, 3]


def test_sequences_without_padding_need_no_mask_any_more() -> None:
    """Those that were padded have left, or the columns that were padding."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    chosen, cropped = Padding(), Padding()
    for padding in (chosen, cropped):
        take(padding, mask, 2, 4, 4)
        with pytest.raises(ValueError, match="every call of a padded batch"):
            padding.spans(2, 1, 5, None)
    chosen.select(torch.tensor([1, 1]))
    assert take(chosen, None, 2, 3, 7) == [slice(0, 3)] * 2
    cropped.crop(2)
    assert take(cropped, None, 2, 3, 5) == [slice(0, 3)] * 2
    assert not chosen.any and not cropped.any


def test_masks_that_do_not_fit_are_errors() -> None:
    padding = Padding()
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \(2, 5\)"):
        padding.spans(2, 5, 5, torch.ones(2, 4))
    with pytest.raises(ValueError, match="without a single token"):
        padding.spans(2, 3, 3, torch.zeros(2, 3))
    padding.spans(2, 2, 2, torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="every call of a padded batch"):
        padding.spans(2, 1, 3, None)
