"""Attention with 8-bit products, beside float64 attention."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.kernels.eight_bit_attention import (
    TILE,
    EightBitFormat,
    eight_bit_attention,
    mean_key,
    quantize_keys,
    quantize_queries,
    quantize_values,
    rotate_heads,
)

INT8, E4M3 = EightBitFormat(), EightBitFormat(scores="fp8")
HALF = EightBitFormat(values="16-bit")
formats = pytest.mark.parametrize("fmt", [INT8, E4M3, HALF], ids=["int8", "e4m3", "16-bit"])
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    q_len: int = 600,  # so that some tiles are neither the first nor next to a row
    kv_len: int = 600,
    dim: int = 64,
    seed: int = 0,
) -> Given:
    """Queries, keys and values of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, kv_heads * group, q_len, dim, generator=generator)
    both = torch.randn(2, batch, kv_heads, kv_len, dim, generator=generator)
    return queries, both[0], both[1]


def seen_by(given: Given, valid: torch.Tensor | None) -> torch.Tensor:
    """Whether a query sees a key, `[batch_size, 1, q_len, kv_len]`."""
    batch, _, q_len, _ = given[0].shape
    kv_len = given[1].shape[2]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len).expand(batch, 1, -1, -1)
    return seen if valid is None else seen & valid[:, None, None]


def exact(given: Given, scaling: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, in float64."""
    group = given[0].shape[1] // given[1].shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in given[1:])
    scores = (given[0].double() @ keys.mT * scaling).masked_fill(~seen_by(given, valid), -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ values).transpose(1, 2)


def error(
    given: Given, fmt: EightBitFormat, scaling: float = 0.125, valid: torch.Tensor | None = None
) -> float:
    """Error of all outputs relative to their length."""
    expected = exact(given, scaling, valid)
    found = eight_bit_attention(*given, scaling=scaling, valid=valid, fmt=fmt)
    return float((found - expected).norm() / expected.norm())


def padding(lengths: list[int], kv_len: int, side: Literal["left", "right"]) -> torch.Tensor:
    """Where the tokens of padded sequences are, bool `[batch_size, kv_len]`."""
    place = torch.arange(kv_len)
    place = place if side == "right" else place.flip(0)
    return place < torch.tensor(lengths)[:, None]


@formats
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_errors_are_those_of_eight_bits(dim: int, fmt: EightBitFormat) -> None:
    """E4M3 has a relative error of 2.5 % (uniform within steps of 1/8), which averages out."""
    bound = 0.015 if fmt == HALF else 0.045 if fmt == INT8 else 0.06
    assert error(case(dim=dim), fmt, dim**-0.5) < bound


@pytest.mark.parametrize("fmt", [INT8, HALF], ids=["int8", "16-bit"])
def test_outlier_channels_of_keys_cost_little(fmt: EightBitFormat) -> None:
    """Constant ones are in the mean, others are spread by the rotation."""
    queries, keys, values = case()
    plain = error((queries, keys, values), fmt)
    constant = keys + torch.where(torch.arange(64) % 16 == 3, 40.0, 0.0)
    assert error((queries, constant, values), fmt) == pytest.approx(plain, rel=0.3)
    factors = torch.where(torch.arange(64) == 3, 20.0, 1.0)
    assert error((queries / factors, keys * factors, values), fmt) < 0.08


@formats
def test_one_dominating_key(fmt: EightBitFormat) -> None:
    """Wherever it is, its value comes back, rounded once."""
    for place in (0, TILE - 1, TILE, 299):
        queries, keys, values = case()
        queries[..., 0], keys[..., 0] = 20.0, 0.0
        keys[:, :, place, 0] = 400.0
        found = eight_bit_attention(queries, keys, values, scaling=0.125, fmt=fmt)
        expected = values[:, :, place].repeat_interleave(2, 1)[:, None].expand_as(found)
        there = slice(place, None)
        torch.testing.assert_close(found[:, there], expected[:, there], rtol=2**-4, atol=1e-2)


@pytest.mark.parametrize("fmt", [INT8, HALF], ids=["int8", "16-bit"])
@pytest.mark.parametrize(("tile", "left"), [(0, 0), (3, 0), (4, 0), (0, 300), (0, 384), (3, 384)])
def test_fine_tiles(fmt: EightBitFormat, tile: int, left: int) -> None:
    """All weight is on 128 keys, first ones or next to the queries, behind padding or without."""
    kv_len = left + 5 * TILE
    queries, keys, values = case(q_len=TILE, kv_len=kv_len)
    valid = padding([kv_len - left, kv_len], kv_len, "left")
    queries, values = 4 * queries, values.clamp(-1, 1)
    queries[..., 0], keys[..., 0] = 4.0, 0.0
    for b, first in enumerate((left, 0)):
        start = first if tile == 0 else left + tile * TILE
        keys[b, :, start : start + TILE, 0] = 200.0
        values[b, :, start : start + TILE] = 248 / 448  # between two numbers of e4m3
        values[b, :, start : start + TILE : 2] *= -1
    values[:, :, left + 200] = 1.0
    given = queries, keys, values
    assert error(given, fmt, valid=valid) < (0.04 if fmt == INT8 else 0.004)
    expected = exact(given, 0.125, valid)
    codes, scales = quantize_keys(keys, fmt)
    coarse = codes * scales.repeat_interleave(TILE, 2)[:, :, :kv_len]
    off = exact((queries, coarse, values), 0.125, valid) - expected
    assert off.norm() / expected.norm() > 0.08


@formats
def test_many_small_weights_beside_a_strong_key(fmt: EightBitFormat) -> None:
    """Weights of 2**-18 of the largest: rounded relative to it they would be zeros in E4M3."""
    count = 1 << 15
    queries, keys, values = case(1, 1, 1, 4, count, 16)
    values += 1
    keys[..., 0] = queries[..., 0] = 0.0
    keys *= 0.1
    queries[..., 0] = 1.0
    keys[:, :, 0] = 0.0
    keys[:, :, 0, 0] = math.log(2.0**18) / 0.25
    values[:, :, 0] = 0.0
    assert exact((queries, keys, values), 0.25).mean() == pytest.approx(1 / 9, rel=0.1)
    # the strong key's own score has an error, which is large in E4M3
    assert error((queries, keys, values), fmt, 0.25) < (0.35 if fmt == E4M3 else 0.12)


@formats
def test_tiles_far_below_the_largest_score_stay_finite(fmt: EightBitFormat) -> None:
    """Their exponents stop falling, whether the largest score comes first or last."""
    for flipped in (False, True):
        queries, keys, values = case(1, 1, 1, 8, 6 * TILE, 16)
        queries[..., 0] = 1.0
        keys[..., 0] = torch.arange(6 * TILE).div(TILE, rounding_mode="floor") * -200.0
        keys = keys.flip(2) if flipped else keys
        found = eight_bit_attention(queries, keys, values, scaling=1.0, fmt=fmt)
        assert found.isfinite().all()
        # nothing but the first tile has weight, whose scores are coarse: the outputs are averages
        best = values[:, :, -TILE:] if flipped else values[:, :, :TILE]
        assert (found <= best.amax(2) * 1.07 + 1e-3).all()
        assert (found >= best.amin(2) * 1.07 - 1e-3).all()


def bound(given: Given, scaling: float, fmt: EightBitFormat) -> torch.Tensor:
    """What no error may exceed, `[batch_size, q_len, num_heads]`, from steps of the codes.

    A change of all scores by at most d changes weights by factors within exp(+-2d); steps of E4M3
    are 1/8 to 1/16 of a number, so that weights and values change by up to 1/16 each.
    """
    queries, keys, values = given
    group = queries.shape[1] // keys.shape[1]
    q, k = quantize_queries(queries, fmt), quantize_keys(keys, fmt)
    rounded_q = q.codes.double() * q.scale
    per_key = k.scale.repeat_interleave(TILE, 2)[:, :, : keys.shape[2]]
    rounded_k = (k.codes.double() * per_key).repeat_interleave(group, 1)
    q64, k64 = rotate_heads(queries.double()), rotate_heads((keys - mean_key(keys)).double())
    off = rounded_q @ rounded_k.mT - q64 @ k64.repeat_interleave(group, 1).mT
    worst = (off * scaling).masked_fill(~seen_by(given, None), 0.0).abs().amax(-1)
    relative = torch.expm1(2 * worst) + 3 / 16 + 0.01
    largest = values.abs().amax((-1, -2)).repeat_interleave(group, 1)
    return (relative * largest[..., None]).transpose(1, 2)


@st.composite
def tokens_of(draw: st.DrawFn, batch: int, past: int, q_len: int) -> torch.Tensor:
    """Where the tokens of a batch are, with padding on either side of a call's own or anywhere."""
    where = draw(st.sampled_from(["left", "right", "anywhere"]))
    valid = torch.zeros(batch, past + q_len, dtype=torch.bool)
    for row in valid:
        parts = (row,) if where == "left" else (row[:past], row[past:])
        for part in parts:
            count = draw(st.integers(0, len(part)))
            if where == "anywhere":
                generator = torch.Generator().manual_seed(count)
                part[torch.randperm(len(part), generator=generator)[:count]] = True
            else:
                part[len(part) - count if where == "left" else 0 :][:count] = True
    return valid


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        *(st.integers(1, n) for n in (3, 2, 3)),
        st.integers(1, 150),
        st.integers(0, 400),
        st.sampled_from([16, 48, 64, 80]),
    ),
    fmt=st.sampled_from([INT8, E4M3, HALF]),
    scale=st.sampled_from([1e-3, 1.0, 8.0]),
    data=st.data(),
)
def test_ragged_batches_with_a_past(
    shape: tuple[int, ...], fmt: EightBitFormat, scale: float, data: st.DataObject
) -> None:
    """Each sequence gets what its tokens would get alone, whatever lies in padding."""
    batch, kv_heads, group, q_len, past, dim = shape
    given = case(batch, kv_heads, group, q_len, past + q_len, dim, data.draw(st.integers(0, 9)))
    queries, keys, values = (given[0] * scale, *given[1:])
    valid = data.draw(tokens_of(batch, past, q_len))
    own, scaling = valid[:, past:], dim**-0.5
    filler = data.draw(st.sampled_from([math.nan, math.inf, 1e4]))
    found = eight_bit_attention(
        queries.masked_fill(~own[:, None, :, None], filler),
        *(x.masked_fill(~valid[:, None, :, None], filler) for x in (keys, values)),
        scaling=scaling,
        valid=valid,
        fmt=fmt,
    )
    assert (found[~own] == 0).all()
    for b in range(batch):
        tokens = keys[b, :, valid[b]][None], values[b, :, valid[b]][None]
        alone = queries[b, :, own[b]][None], *tokens
        if own[b].any():
            again = eight_bit_attention(*alone, scaling=scaling, fmt=fmt)
            assert torch.equal(found[b, own[b]], again[0])
            off = (again - exact(alone, scaling)).abs().amax(-1)
            assert (off <= bound(alone, scaling, fmt) + 1e-6).all()


@formats
def test_chunks_over_the_same_keys(fmt: EightBitFormat) -> None:
    """The last queries get the same whether the first ones are there or not."""
    queries, keys, values = case()
    whole = eight_bit_attention(queries, keys, values, scaling=0.125, fmt=fmt)
    for count in (1, TILE - 1, TILE, 200):
        part = eight_bit_attention(queries[:, :, -count:], keys, values, scaling=0.125, fmt=fmt)
        torch.testing.assert_close(part, whole[:, -count:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 112, 256])
def test_mean_and_rotation_change_no_softmax(dim: int) -> None:
    """They add one number to all scores of a query, whatever the mean."""
    queries, keys, _ = (x.double() for x in case(group=1, dim=dim))
    for mean in (mean_key(keys).double(), keys[:, :, :1] * 7):
        scores = rotate_heads(queries) @ rotate_heads(keys - mean).mT
        added = scores - queries @ keys.mT
        torch.testing.assert_close(added, added[..., :1].expand_as(added), rtol=0, atol=1e-9)
    torch.testing.assert_close(rotate_heads(rotate_heads(queries)), queries)


@formats
def test_constant_values_come_back(fmt: EightBitFormat) -> None:
    """Weights are divided by the sum of what was rounded."""
    queries, keys, values = case()
    values = values[:, :, :1].expand_as(values).contiguous()
    values = values.half().float() if fmt == HALF else values
    found = eight_bit_attention(queries, keys, values, scaling=0.125, fmt=fmt)
    expected = values[:, :, 0].repeat_interleave(2, 1)[:, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@formats
def test_zeros(fmt: EightBitFormat) -> None:
    """Zero queries and keys average the values, zero values give zeros."""
    queries, keys, values = case(q_len=1)
    for q, k in ((queries * 0, keys), (queries, keys * 0)):
        found = eight_bit_attention(q, k, values, scaling=0.125, fmt=fmt)
        expected = values.mean(2).repeat_interleave(2, 1)[:, None]
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert not eight_bit_attention(queries, keys, values * 0, scaling=0.125, fmt=fmt).any()


@formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(fmt: EightBitFormat, dtype: torch.dtype) -> None:
    given = tuple(x.to(dtype) for x in case())
    found = eight_bit_attention(*given, scaling=0.125, fmt=fmt)
    assert found.dtype == dtype
    expected = exact((given[0], given[1], given[2]), 0.125)
    assert (found - expected).norm() / expected.norm() < 0.065


def test_codes() -> None:
    """INT8 is within half a step, E4M3 within 1/16."""
    queries, keys, values = case(kv_len=200, q_len=200)
    q = quantize_queries(queries, INT8)
    assert q.codes.dtype == torch.int8
    assert ((q.codes * q.scale - rotate_heads(queries)).abs() <= q.scale * 0.501).all()
    k = quantize_keys(keys, INT8)
    assert k.codes.shape == keys.shape
    assert k.scale.shape == (2, 2, 2, 1)
    step = k.scale.repeat_interleave(TILE, 2)[:, :, :200]
    expected = rotate_heads(keys - mean_key(keys))
    assert ((k.codes * step - expected).abs() <= step * 0.501).all()
    v = quantize_values(values)
    assert v.codes.dtype == torch.float8_e4m3fn
    off = (v.codes.float() * v.scale - values).abs()
    assert (off <= values.abs() / 16 + v.scale * 2**-10).all()
    assert v.codes.float().abs().amax(2).eq(448).all()


@formats
def test_nothing_depends_on_the_data_but_the_numbers(fmt: EightBitFormat) -> None:
    """Without any data no number can be read, as a kernel launch on a GPU must not wait for one."""
    given = tuple(x.to("meta") for x in case())
    found = eight_bit_attention(*given, scaling=0.125, fmt=fmt)
    assert found.shape == (2, 600, 4, 64)
