"""The size of packed blocks is what a store of the scheme allocates."""

from __future__ import annotations

import pytest
import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.layout import Layout
from kvquant.cache.memory_formula import packed_footprint
from kvquant.errors import UserError
from kvquant.schemes.packed_blocks import packed_blocks, shape_codec
from kvquant.study.asked_schemes import asked_scheme
from kvquant.study.schemes import SCHEME_KINDS

OWN_FORMULA = ("nuq", "allocated", "kivi", "kvarn")
KINDS = [k for k, kind in SCHEME_KINDS.items() if kind.codec and k not in OWN_FORMULA]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_take_what_a_store_allocates(kind: str) -> None:
    codec = shape_codec(asked_scheme(kind), 2, 64)
    assert codec is not None
    store, layout = BlockStore(codec), Layout(codec.sinks, codec.block_size, codec.residual)
    calls = [[700, 90], [1, 1], [150, 300]]
    generator = torch.Generator().manual_seed(0)
    for counts in calls:
        x = torch.randn((2, 2, max(counts), 64), generator=generator).half()
        store.append(layout.append([slice(0, n) for n in counts]), x, x)
    formula = packed_footprint(packed_blocks(codec, 2, 64), 2, 64, calls)
    assert store.nbytes == formula.total and formula.tables == codec.shared_bytes


def test_a_model_that_a_scheme_does_not_serve_is_refused() -> None:
    with pytest.raises(UserError, match="head_dim: 20"):
        shape_codec(asked_scheme("nuq"), 2, 20)
    assert shape_codec(asked_scheme("fp16"), 2, 20) is None
