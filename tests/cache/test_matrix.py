"""Heads x padding x chunks x bits x outliers: a sequence's codes, outliers and outputs are its own.

Every cell runs a ragged batch through one layer of the cache, with the queries, keys and values of
each token given, and compares each sequence with `tests.cache.plain`: what is stored bit for bit,
the output of attention to rounding. Padding holds large numbers that must not be seen.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels import reference
from kvquant.schemes.registry import build_codecs
from kvquant.study.schemes import NuqScheme
from tests.cache import plain
from tests.cache.plain import Sequence
from tests.support.quantizers import random_quantizer
from tests.support.rope import rope

GARBAGE = 999.0
HEADS = {"mha": (2, 2), "gqa": (4, 2)}  # query heads, kv heads
LENGTHS = [70, 33, 34, 1]  # a tail behind two blocks, a block less one sink, a block, a sink
CHUNKS: dict[str, list[int]] = {
    "one-shot": [],
    "odd": [1, 8, 13, 36, 37, 69],
    "token-by-token": list(range(1, 70)),
}


def make_tables(heads: int, dim: int, bits: int, seed: int = 0) -> LayerQuantizer:
    tables = random_quantizer(heads, dim, bits, zero=0.1, scale=(1.5, 2.5), seed=seed)
    tables.key_scale[:, 1] = 0  # a channel that was constant in calibration
    return tables


def some_sequence(
    length: int, heads: tuple[int, int], dim: int, seed: int, kind: torch.dtype
) -> Sequence:
    """Random tokens, among them a constant channel, equal channels and many ties."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> torch.Tensor:
        x = torch.randn(length, n, dim, generator=generator)
        return (x * 8).round() / 8  # coarse steps: ties are common

    queries, keys, values = some(heads[0]), some(heads[1]), some(heads[1])
    keys[:, :, 0] = 0.5
    values[length // 2 :: 7] = -1.25  # whole tokens of equal elements
    values[length // 3 :: 11] = 0
    return Sequence(queries.to(kind), keys.to(kind), values.to(kind))


class Run:
    """A ragged batch that went through a layer in chunks.

    Args:
        spec: The scheme.
        tables: Calibration of the layer.
        rows: The sequences.
        side: "left", "right", or "none" (all of one length).
        cuts: Columns where chunks end, besides the last.
        protocol: "A" or "B".
    """

    def __init__(
        self,
        spec: NuqScheme,
        tables: LayerQuantizer,
        rows: list[Sequence],
        side: str,
        cuts: list[int],
        protocol: Any,
    ) -> None:
        self.rows = rows
        width = max(row.length for row in rows)
        dim = rows[0].keys.shape[2]
        codecs = build_codecs(spec, 1, [tables])
        assert codecs is not None
        self.cache = KVQuantCache(codecs, lambda p: rope(p, dim), protocol)
        self.begins = [width - row.length if side == "left" else 0 for row in rows]
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        given = []
        for name in ("queries", "keys", "values"):
            like = getattr(rows[0], name)
            batch = like.new_full((len(rows), like.shape[1], width, dim), GARBAGE)
            for b, (begin, row) in enumerate(zip(self.begins, rows, strict=True)):
                batch[b, :, begin : begin + row.length] = getattr(row, name).transpose(0, 1)
                mask[b, begin : begin + row.length] = 1
            given.append(batch)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.ends = [*[c for c in cuts if c < width], width]
        outputs = []
        for first, stop in pairwise([0, *self.ends]):
            seen = None if side == "none" else mask[:, :stop]
            self.cache.begin_forward(len(rows), stop - first, seen, torch.device("cpu"))
            part = slice(first, stop)
            new_mask = mask[:, part].bool()
            cos, sin = (x.to(given[0].dtype) for x in rope(positions[:, part], dim))
            queries, keys, values = (x[:, :, part] for x in given)
            with torch.inference_mode():
                out = self.cache.attend(
                    0,
                    queries,
                    keys,
                    values,
                    (cos, sin),
                    dim**-0.5,
                    functools.partial(full_attention, new_mask, dim**-0.5),
                )
            outputs.append(out)
        self.output = torch.cat(outputs, 1)

    def check(self, protocol: str, tolerance: float) -> None:
        """Every sequence: stored bits, outliers in standard form, outputs."""
        assert self.cache.lengths == [row.length for row in self.rows]
        layer = self.cache.layers[0]
        for b, row in enumerate(self.rows):
            for got, want in zip(self.stored(b), row.stored(row.length), strict=True):
                assert torch.equal(got, want)
            self.check_outliers(b, row)
            cuts = [min(max(end - self.begins[b], 0), row.length) for end in self.ends]
            expected = row.attention(cuts, protocol)
            got = self.output[b, self.begins[b] : self.begins[b] + row.length].double()
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
        assert layer.get_seq_length() == self.ends[-1]

    def check_outliers(self, b: int, row: Sequence) -> None:
        part = row.packed(row.length)
        if part.stop == part.start:
            return
        found = (
            (self.cache.key_outliers(0)[b].to_standard_csc().to_dense().T, row.key_outliers, 0),
            (self.cache.value_outliers(0)[b].to_standard_csr().to_dense(), row.value_outliers, 1),
        )
        for dense, aside, which in found:
            want = torch.where(aside, row.rounded[which], 0)[part].flatten(1)
            if row.spec.outliers == 0:
                assert dense.numel() == 0 or not dense.any()
            else:
                assert torch.equal(dense, want)

    def stored(self, b: int) -> list[torch.Tensor]:
        """fp32 keys and values `[tokens, heads, dim]` of a sequence, in order."""
        store, layout = self.cache.layers[0].store, self.cache.layout
        view = layout.view()
        blocks = [store.unpack(arena, slice(at, at + 1)) for arena, at in layout.table[b]]
        tails = store.read_tail(view, fake=False)
        sinks = min(layout.sinks, view.lengths[b])
        out = []
        for i in range(2):
            parts = [store.sinks[i][b, :, :sinks].float(), *(block[i][0] for block in blocks)]
            tail = tails[i][b, :, : view.tails[b]].float()
            out.append(torch.cat([*parts, tail], 1).transpose(0, 1))
        return out

    def codes(self, b: int) -> list[torch.Tensor]:
        """The packed tensors of a sequence's blocks, as they lie in memory."""
        arenas = self.cache.layers[0].store.arenas
        return [
            tensor[at]
            for arena, at in self.cache.layout.table[b]
            for _, tensor in sorted(arenas[arena].dense.items())
        ]


def full_attention(
    mask: torch.Tensor, scaling: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The model's own attention over one call: causal, padding hidden."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.float() @ k.float().transpose(2, 3)) * scaling
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & mask[:, None, None]
    weights = scores.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(-1)
    return (weights @ v.float()).transpose(1, 2).to(q.dtype)


@functools.cache
def prepared(
    heads: str, bits: int, outliers: float, keys: str = "before-rope"
) -> tuple[NuqScheme, LayerQuantizer, Any]:
    spec = NuqScheme(  # type: ignore[arg-type]
        kind="nuq", bits=bits, outliers=outliers, block_size=32, sinks=1, keys=keys
    )
    tables = make_tables(HEADS[heads][1], 16, bits)
    rows = [
        some_sequence(n, HEADS[heads], 16, seed, torch.float32).prepare(spec, tables)
        for seed, n in enumerate([*LENGTHS, 70, 70])
    ]
    return spec, tables, rows


@pytest.mark.thinned(5)
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("heads", list(HEADS))
def test_matrix(heads: str, side: str, chunks: str, bits: int, outliers: float) -> None:
    spec, tables, rows = prepared(heads, bits, outliers)
    chosen = [rows[0], *rows[4:]] if side == "none" else rows[:4]
    # token by token, protocol A is what decoding is; B has the same codes
    for protocol in ("A",) if chunks == "token-by-token" else ("A", "B"):
        run = Run(spec, tables, chosen, side, CHUNKS[chunks], protocol)
        run.check(protocol, 2e-5)
    for b, row in enumerate(chosen):
        alone = Run(spec, tables, [row], "none", [], "A")
        for got, want in zip(run.codes(b), alone.codes(0), strict=True):
            assert torch.equal(got, want)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("heads", list(HEADS))
def test_matrix_of_keys_after_rope(heads: str, side: str, chunks: str, outliers: float) -> None:
    """They are stored as rotated by their position in their sequence, wherever padding is."""
    spec, tables, rows = prepared(heads, 3, outliers, "after-rope")
    chosen = [rows[0], *rows[4:]] if side == "none" else rows[:4]
    for protocol in ("A",) if chunks == "token-by-token" else ("A", "B"):
        run = Run(spec, tables, chosen, side, CHUNKS[chunks], protocol)
        run.check(protocol, 2e-5)


TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Every head_dim and type, lengths around sinks and blocks, any cuts, both protocols."""
    dim = data.draw(st.sampled_from([64, 80, 96, 128, 256]))
    kv, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5]))
    kind = data.draw(st.sampled_from(list(TOLERANCES)))
    size, sinks = data.draw(st.sampled_from([(32, 0), (32, 1), (64, 5), (32, 40)]))
    outliers = data.draw(st.sampled_from([0.0, 0.01, 0.02, 1.0]))
    bits = data.draw(st.sampled_from([2, 3, 4]))
    keys = data.draw(st.sampled_from(["before-rope", "after-rope"]))
    spec = NuqScheme(
        kind="nuq", bits=bits, outliers=outliers, block_size=size, sinks=sinks, keys=keys
    )
    edges = [1, max(1, sinks - 1), sinks + 1]
    edges += [sinks + blocks * size + d for blocks in (1, 2) for d in (-1, 0, 1)]
    length = st.one_of(st.sampled_from(edges), st.integers(1, 150))
    side = data.draw(st.sampled_from(["none", "left", "right"]))
    lengths = data.draw(st.lists(length, min_size=1, max_size=3))
    if side == "none":
        lengths = [lengths[0]] * len(lengths)
    seed = data.draw(st.integers(0, 9999))
    tables = make_tables(kv, dim, bits, seed)
    rows = [
        some_sequence(n, (kv * group, kv), dim, seed + i, kind).prepare(spec, tables)
        for i, n in enumerate(lengths)
    ]
    cuts = data.draw(st.sets(st.integers(1, max(lengths)), max_size=5))
    protocol = data.draw(st.sampled_from(["A", "B"]))
    run = Run(spec, tables, rows, side, sorted(cuts), protocol)
    run.check(protocol, TOLERANCES[kind])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_the_plain_reference_is_the_specification(bits: int, outliers: float) -> None:
    """`tests.cache.plain` and the loops of `kernels.reference`, written apart, agree."""
    tables = make_tables(2, 8, bits)
    row = some_sequence(6, (2, 2), 8, 5, torch.float16)
    keys, aside = plain.quantize_keys(row.keys, tables, outliers)
    expected = reference.quantize_keys(
        row.keys.flatten(1),
        tables.key_zero.view(-1),
        tables.key_scale.view(-1),
        tables.key_levels,
        outliers > 0,
    )
    assert torch.equal(keys.flatten(1), expected)
    assert aside.any() == (outliers > 0)
    values, aside = plain.quantize_values(row.values, tables, outliers)
    per_side = int(outliers > 0)
    expected = reference.quantize_values(row.values.flatten(1), tables.value_levels, per_side)
    assert torch.equal(values.flatten(1), expected)
    equal = int((row.values.flatten(1).diff(dim=1) == 0).all(1).sum())  # both ends are one element
    assert int(aside.sum()) == (6 * 2 - equal) * per_side


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_finite_in_16_bits_is_an_error(where: str, bad: float) -> None:
    spec, tables, _ = prepared("gqa", 3, 0.01)
    row = some_sequence(40, HEADS["gqa"], 16, 1, torch.float32).prepare(spec, tables)
    getattr(row, where)[5, 1, 3] = bad
    with pytest.raises(ValueError, match=f"{where}: NaN or Inf"):
        Run(spec, tables, [row], "none", [], "A")


def test_nothing_finite_in_padding_is_seen_or_counted() -> None:
    """What padding holds changes no bit of what is stored and no output."""
    spec, tables, rows = prepared("gqa", 3, 0.01)
    runs = []
    for garbage in (0.0, 6e4):
        global GARBAGE
        before, GARBAGE = GARBAGE, garbage
        runs.append(Run(spec, tables, rows[:4], "left", [13, 40], "A"))
        GARBAGE = before
    for b, row in enumerate(rows[:4]):
        for one, other in zip(*(run.codes(b) for run in runs), strict=True):
            assert torch.equal(one, other)
        tokens = slice(runs[0].begins[b], runs[0].begins[b] + row.length)
        assert torch.equal(runs[0].output[b, tokens], runs[1].output[b, tokens])
    assert runs[0].cache.layers[0].store.nbytes == runs[1].cache.layers[0].store.nbytes
