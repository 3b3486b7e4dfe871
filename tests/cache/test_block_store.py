"""A ragged batch in the store: each sequence as if alone, whatever the padding and chunks.

Also covers: cache.arena, cache.codec, cache.incoming, cache.layout.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.layout import Layout, Span
from kvquant.errors import UserError
from kvquant.study.schemes import KiviScheme, KvarnScheme, NuqScheme
from tests.support.caches import contents
from tests.support.quantizers import layer_codec

HEADS = 2


def expected(c: Codec, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """The state of one sequence `[heads, tokens, dim]`: sinks, quantized blocks, tail."""
    length = keys.shape[1]
    packed = max(0, (length - c.sinks - c.residual) // c.block_size) * c.block_size
    out = [keys.float().clone(), values.float().clone()]
    for first in range(c.sinks, c.sinks + packed, c.block_size):
        part = slice(first, first + c.block_size)
        for x, y in zip(out, c.fake(keys[None, :, part], values[None, :, part]), strict=True):
            x[:, part] = y[0]
    return out


def feed(
    c: Codec, rows: list[tuple[torch.Tensor, torch.Tensor]], side: str, cuts: list[int]
) -> tuple[BlockStore, Layout]:
    """Puts a ragged batch through the store in chunks that end at the columns `cuts`."""
    width = max(k.shape[1] for k, _ in rows)
    heads, _, dim = rows[0][0].shape
    batch = torch.full((2, len(rows), heads, width, dim), 777.0, dtype=torch.float16)
    begins = []
    for b, row in enumerate(rows):
        begin = width - row[0].shape[1] if side == "left" else 0
        begins.append(begin)
        for i in range(2):
            batch[i, b, :, begin : begin + row[i].shape[1]] = row[i]
    store, layout = BlockStore(c), Layout(c.sinks, c.block_size, c.residual)
    for first, stop in pairwise([0, *cuts, width]):
        spans: list[Span] = []
        for begin, row in zip(begins, rows, strict=True):
            low = min(max(begin - first, 0), stop - first)
            high = min(max(begin + row[0].shape[1] - first, low), stop - first)
            spans.append(slice(low, high))
        store.append(layout.append(spans), *batch[:, :, :, first:stop])
    return store, layout


def tokens(lengths: list[int], dim: int, seed: int, heads: int = HEADS) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> torch.Tensor:
        x = torch.randn(heads, n, dim, generator=generator)
        return (x * 1.2).half()

    return [(some(n), some(n)) for n in lengths]


SPECS = [
    NuqScheme(kind="nuq", bits=b, outliers=o, block_size=32, sinks=s)
    for b, o, s in [(4, 0.01, 1), (3, 0.01, 0), (2, 0.0, 5), (3, 0.02, 1), (2, 1.0, 2)]
] + [
    KiviScheme(kind="kivi", bits=2, group=8, residual=8),
    KiviScheme(kind="kivi", bits=4, group=16, residual=40),
    KvarnScheme(kind="kvarn", bits=2, tile=16, sinks=2, residual=5),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{s.bits}")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_batch_side_and_chunks_leave_the_same(spec: Any, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 110), min_size=1, max_size=4))
    side = data.draw(st.sampled_from(["left", "right"]))
    width = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)), max_size=6)))
    cuts = [c for c in cuts if c < width]
    if data.draw(st.booleans()):  # the rest token by token
        cuts = sorted({*cuts, *range(width * 2 // 3, width)} - {0, width})
    c = layer_codec(spec, 16)
    rows = tokens(lengths, 16, data.draw(st.integers(0, 9999)))
    store, layout = feed(c, rows, side, cuts)
    assert layout.lengths == lengths
    for b, row in enumerate(rows):
        for got, want in zip(contents(store, layout, b), expected(c, *row), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
def test_head_shapes(dim: int, heads: int) -> None:
    c = layer_codec(SPECS[0], dim, heads)
    rows = tokens([70, 40], dim, 1, heads)
    store, layout = feed(c, rows, "left", [13])
    for b, row in enumerate(rows):
        for got, want in zip(contents(store, layout, b), expected(c, *row), strict=True):
            assert torch.equal(got, want)


def test_outliers_are_exact_and_in_standard_form() -> None:
    """Keys beyond the calibrated range, and two values a token, come back as they were."""
    from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix

    c = layer_codec(SPECS[0], 16)
    (keys, values), *_ = tokens([100], 16, 3)
    store, layout = feed(c, [(keys, values)], "left", [41, 77])
    packed = slice(1, 97)
    tables = c.quantizer.tables  # type: ignore[attr-defined]
    ratio = (keys.float() - tables.key_zero[:, None]) / tables.key_scale[:, None]
    aside = torch.where(ratio.abs() > 1, keys, 0)[:, packed].transpose(0, 1).flatten(1)
    csc = BlockedCSCMatrix(store.outliers("keys", layout.table[0])).to_standard_csc()
    assert torch.equal(csc.to_dense(), aside.T)
    csr = BlockedCSRMatrix(store.outliers("values", layout.table[0])).to_standard_csr()
    dense, rows = csr.to_dense(), values[:, packed].transpose(0, 1).flatten(1)
    assert torch.equal(torch.where(dense != 0, rows, 0), dense)
    assert (dense != 0).sum(1).tolist() == [2] * 96
    assert torch.equal(dense.amax(1), rows.amax(1))
    assert torch.equal(dense.amin(1), rows.amin(1))


def test_append_moves_nothing_that_is_stored() -> None:
    c = layer_codec(SPECS[0], 16)
    store, layout = feed(c, tokens([500], 16, 4), "left", [])
    where = [t.data_ptr() for a in store.arenas for t in a.dense.values()]
    kept = [t.clone() for a in store.arenas for t in a.dense.values()]
    more = torch.randn(1, HEADS, 1, 16).half()
    for _ in range(70):
        store.append(layout.append([slice(0, 1)]), more, more)
    assert [t.data_ptr() for a in store.arenas for t in a.dense.values()][: len(where)] == where
    for a, b in zip((t for x in store.arenas for t in x.dense.values()), kept, strict=False):
        assert torch.equal(a[: b.shape[0]], b)


def test_unused_room_stays_small() -> None:
    c = layer_codec(NuqScheme(kind="nuq", bits=3, block_size=32), 16)
    layout = Layout(c.sinks, c.block_size, c.residual)
    for _ in range(20_000):
        layout.append([slice(0, 1)])
    used = len(layout.table[0])
    capacity = sum(a.capacity for a in layout.arenas)
    assert used == 19_999 // 32
    assert capacity <= used * 33 / 32 + 1
    assert len(layout.arenas) < 160  # one block each at first, then one part in 32


def test_crop_keeps_what_came_before() -> None:
    c = layer_codec(SPECS[0], 16)
    (keys, values), *_ = tokens([120], 16, 5)
    whole = expected(c, keys, values)
    for length in (118, 100, 97, 96, 50, 33, 1):
        store, layout = feed(c, [(keys, values)], "left", [])
        store.uncut(layout.crop([length]))
        for got, want in zip(contents(store, layout, 0), whole, strict=True):
            # tokens of a cut block keep their quantized values, in 16 bits
            torch.testing.assert_close(got, want[:, :length].half().float(), atol=2e-3, rtol=1e-3)
        tail = torch.randn(1, HEADS, 40, 16).half()
        store.append(layout.append([slice(0, 40)]), tail, tail)
        assert contents(store, layout, 0)[0].shape[1] == length + 40


def test_forks_share_blocks_and_go_their_own_ways() -> None:
    c = layer_codec(SPECS[0], 16)
    rows = tokens([100], 16, 6)
    store, layout = feed(c, rows, "left", [])
    other, other_layout = store.fork(), layout.fork()
    for s, y, seed in ((store, layout, 7), (other, other_layout, 8)):
        (k, v), *_ = tokens([90], 16, seed)
        s.append(y.append([slice(0, 90)]), k[None], v[None])
        joined = [torch.cat([a, b], 1) for a, b in zip(rows[0], (k, v), strict=True)]
        for got, want in zip(contents(s, y, 0), expected(c, *joined), strict=True):
            assert torch.equal(got, want)
    assert store.arenas[0] is other.arenas[0]


@pytest.mark.fault(
    "library",
    "another dtype, device or shape in a later call",
    "refused by name",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.float(),
            "dtype of keys torch.float32 in this call, but it holds torch.float1",
        ),
        (lambda x: x.bfloat16(), "dtype of keys torch.bfloat16"),
        (lambda x: x.to("meta"), "device meta in this call, but it holds cpu"),
        (lambda x: x.repeat(2, 1, 1, 1), "sequences 2 in this call, but it holds 1"),
        (lambda x: x[:, :1], "kv heads 1 in this call, but it holds 2"),
        (lambda x: x[..., :8], "head_dim 8 in this call, but it holds 16"),
    ],
)
@pytest.mark.parametrize("count", [1, 40])
def test_what_is_unlike_the_first_call_is_refused(change: Any, message: str, count: int) -> None:
    c = layer_codec(SPECS[0], 16)
    store, layout = feed(c, tokens([50], 16, 1), "left", [])
    for one in (store, store.fork()):
        x = change(torch.randn(1, HEADS, count, 16).half())
        plan = layout.fork().append([slice(0, count)])
        with pytest.raises(UserError, match=f"cache: {message}"):
            one.append(plan, x, x)
    with pytest.raises(UserError, match=r"values: shape .* heads of one size"):
        store.append(
            layout.append([slice(0, 1)]), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 8)
        )


def test_nothing_and_strided_input() -> None:
    """Calls without tokens, sequences without tokens, and views give what copies give."""
    c = layer_codec(SPECS[0], 16)
    (keys, values), *_ = tokens([120], 16, 2)
    store, layout = BlockStore(c), Layout(c.sinks, c.block_size, c.residual)
    none = torch.zeros(2, HEADS, 0, 16).half()
    store.append(layout.append([slice(0, 0)] * 2), none, none)
    # heads last in memory, every second channel of something wider, a gap between the sequences
    wide = torch.full((2, 2, 130, HEADS, 32), torch.nan).half()
    for place, x in zip(wide, (keys, values), strict=True):
        place[1, 5:125, :, ::2] = x.transpose(0, 1)
    for first, stop in ((0, 40), (40, 41), (41, 130)):
        low, high = max(5 - first, 0), min(125, stop) - first
        part = wide[:, :, first:stop, :, ::2].transpose(2, 3)
        store.append(layout.append([slice(0, 0), slice(low, high)]), part[0], part[1])
    store.append(layout.append([slice(0, 0)] * 2), none, none)
    assert layout.lengths == [0, 120]
    for got, want in zip(contents(store, layout, 1), expected(c, keys, values), strict=True):
        assert torch.equal(got, want)
    assert contents(store, layout, 0)[0].shape[1] == 0
    with pytest.raises(ValueError, match="input_ids: a batch of 0 sequences"):
        layout.append([])


def test_models_that_a_codec_cannot_serve_are_refused() -> None:
    c = layer_codec(SPECS[0], 16)
    c.check_model(HEADS, 16)
    with pytest.raises(UserError, match="quantizer: made for 2 kv heads of 16, the model has 4"):
        c.check_model(4, 16)
    with pytest.raises(UserError, match="head_dim: 20 is not a multiple of 8"):
        c.check_model(HEADS, 20)
    with pytest.raises(UserError, match="num_kv_heads: 1024 of 128 are more than 65536"):
        c.check_model(1024, 128)
    with pytest.raises(UserError, match="group: 8 does not divide head_dim 20"):
        layer_codec(KiviScheme(kind="kivi", bits=2, group=8, residual=8), 16).check_model(2, 20)
