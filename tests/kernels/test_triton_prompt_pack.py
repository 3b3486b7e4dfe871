"""Operands of 8-bit attention by the Triton kernels, bit by bit those of the specification.

Also covers: kernels.triton_prompt_pack_kernels.
"""

from __future__ import annotations

import math

import pytest
import torch

from kvquant.kernels.eight_bit_attention import (
    REST_BITS,
    TILE,
    EightBitFormat,
    quantize_keys,
    quantize_queries,
    quantize_values,
    rotate_heads,
    smooth_keys,
)

pytest.importorskip("triton")
from kvquant.kernels.triton_prompt_pack import QUERIES, pack_keys, pack_queries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMAT = EightBitFormat()
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bf16


def rows_of(blobs: torch.Tensor, rows: int, width: int, swizzled: bool) -> torch.Tensor:
    """Bytes of `[..., rows, width]` from tiles as the CUDA kernel's products read them."""
    tiles = blobs.unflatten(-1, (rows, width // 16, 16))
    if not swizzled:
        return tiles.flatten(-2)
    row = torch.arange(rows, device=blobs.device)
    turn = row % 8 if width == 128 else row // 2 % 4
    at = torch.arange(width // 16, device=blobs.device) ^ turn[:, None]
    return tiles.gather(-2, at[..., None].expand(tiles.shape)).flatten(-2)


def token_order() -> torch.Tensor:
    """Which of 32 tokens lies where in a tile of values."""
    halves, lanes, numbers = range(2), range(4), range(4)
    return torch.tensor(
        [16 * h + i // 2 * 8 + 2 * t + i % 2 for h in halves for t in lanes for i in numbers],
        device=DEVICE,
    )


def values_of(blobs: torch.Tensor, dim: int) -> torch.Tensor:
    """E4M3 `[batch_size, num_kv_heads, tokens, head_dim]` from tiles of values."""
    channels = blobs.unflatten(-1, (dim, TILE // 16, 16))
    at = torch.arange(TILE // 16, device=DEVICE) ^ (torch.arange(dim, device=DEVICE) % 8)[:, None]
    placed = channels.gather(-2, at[..., None].expand(channels.shape)).flatten(-2)
    order = torch.cat([token_order() + first for first in range(0, TILE, 32)])
    values = torch.empty_like(placed)
    values[..., order] = placed
    return values.transpose(-1, -2).flatten(2, 3).view(torch.float8_e4m3fn)


def given(dim: int, dtype: torch.dtype, length: int = 200) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(dim)
    kv = torch.randn(2, 2, 2, length, dim, dtype=dtype, device=DEVICE)
    kv[0] += 3 * torch.randn(2, 2, 1, dim, device=DEVICE)
    return torch.randn(2, 4, length, dim, dtype=dtype, device=DEVICE), kv[0], kv[1]


def all_tokens(length: int) -> torch.Tensor:
    return torch.tensor([[length, length, 0]] * 2, dtype=torch.int32, device=DEVICE)


def nearly_all_equal(found: torch.Tensor, expected: torch.Tensor, share: float = 0.01) -> None:
    """Codes of numbers on the border of two may differ, by one: sums have another order."""
    difference = (found.float() - expected.float()).abs()
    assert (difference > 0).float().mean() < share
    assert difference.max() <= 1 + 0.13 * expected.float().abs().max()  # of e4m3, an eighth


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, HALF)])
def test_operands_are_those_of_the_specification(
    dim: int, dtype: torch.dtype, swizzled: bool
) -> None:
    queries, keys, values = given(dim, dtype)
    length = queries.shape[2]
    packed = pack_keys(keys, values, all_tokens(length), None, swizzled=swizzled)
    asked = pack_queries(queries, packed, None, 0.3, order=None, offsets=True, swizzled=swizzled)
    k = rows_of(packed.keys[0], TILE, dim, swizzled).flatten(2, 3)[:, :, :length]
    expected, scales = quantize_keys(keys, FORMAT)
    nearly_all_equal(k, expected)
    torch.testing.assert_close(packed.key_scales[..., None], scales, rtol=1e-5, atol=0)
    q = rows_of(asked.queries[0], QUERIES, dim, swizzled).flatten(2, 3)[:, :, :length]
    expected, scales = quantize_queries(queries, FORMAT)
    nearly_all_equal(q, expected)
    found = asked.scales.flatten(2)[:, :, :length, None] / (0.3 * math.log2(math.e))
    torch.testing.assert_close(found, scales, rtol=1e-5, atol=0)
    assert asked.offsets is not None
    mean = keys.float().mean(2, keepdim=True).repeat_interleave(2, 1)
    added = (queries.float() * mean).sum(-1) * (0.3 * math.log2(math.e))
    torch.testing.assert_close(asked.offsets.flatten(2)[:, :, :length], added, rtol=1e-4, atol=1e-4)
    if packed.values is None:
        assert not swizzled
        assert len(packed.keys) == len(asked.queries) == 1
        return
    v = values_of(packed.values[0], dim)[:, :, :length]
    expected, scales = quantize_values(values)
    if DEVICE.type == "cuda":
        nearly_all_equal(v, expected)
    else:  # the interpreter rounds ties away from zero, and carries into exponents wrongly
        assert (v.float() != expected.float()).float().mean() < 0.04
    torch.testing.assert_close(packed.value_scales[:, :, None], scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, HALF)])
def test_second_numbers_hold_what_the_first_left_over(dim: int, dtype: torch.dtype) -> None:
    queries, keys, values = given(dim, dtype)
    length = queries.shape[2]
    packed = pack_keys(keys, values, all_tokens(length), None, swizzled=True)
    asked = pack_queries(queries, packed, None, 1.0, order=None, offsets=False, swizzled=True)
    for blobs, rows, scale, expected in (
        (packed.keys, TILE, packed.key_scales[..., None], smooth_keys(keys)),
        (asked.queries, QUERIES, asked.scales / math.log2(math.e), rotate_heads(queries.float())),
    ):
        first, second = (rows_of(x, rows, dim, True).float() for x in blobs)
        assert second.abs().max() <= 2 ** (REST_BITS - 1)
        found = (first + second / 2**REST_BITS) * scale[..., None]
        # Half a unit of the second numbers, and sums in another order.
        bound = scale[..., None].expand_as(found) * (0.51 / 2**REST_BITS + 1e-3)
        found, bound = (x.flatten(2, 3)[:, :, :length] for x in (found, bound))
        assert ((found - expected).abs() <= bound).all()
    assert packed.values is not None
    found = sum(values_of(x, dim)[:, :, :length].float() for x in packed.values)
    found = found * packed.value_scales[:, :, None]
    wide = values.float()
    close = (found - wide).abs() <= wide.abs() / 2**8 + packed.value_scales[:, :, None] / 2**9
    # The interpreter's rounding again.
    assert close.all() if DEVICE.type == "cuda" else close.float().mean() > 0.94


def test_padding_is_neither_read_nor_measured() -> None:
    queries, keys, values = given(64, torch.float16, 90)
    valid = torch.ones(2, 90, dtype=torch.bool, device=DEVICE)
    valid[0, :30], valid[1, 70:] = False, False
    columns = valid.logical_not().byte().argsort(stable=True, dim=1).int()
    tokens = valid.sum(1)
    counts = torch.stack((tokens, tokens, 0 * tokens), 1).int()
    for x in (keys, values, queries):
        x.transpose(1, 2)[~valid] = float("nan")
    packed = pack_keys(keys, values, counts, columns, swizzled=False)
    for b, own in enumerate((slice(30, 90), slice(0, 70))):
        part = keys[b : b + 1, :, own]
        expected, scales = quantize_keys(part, FORMAT)
        count = part.shape[2]
        nearly_all_equal(
            packed.keys[0][b : b + 1, :, 0].unflatten(-1, (TILE, 64))[:, :, :count], expected
        )
        torch.testing.assert_close(packed.key_scales[b : b + 1, :, :1, None], scales)
        largest = values[b, :, own].float().abs().amax(1)
        torch.testing.assert_close(packed.value_scales[b], largest / 448)


def test_channels_in_another_order() -> None:
    queries, keys, values = given(64, torch.float16, 70)
    order = torch.stack([torch.randperm(64, device=DEVICE) for _ in range(2)])
    placed = keys.take_along_dim(order[None, :, None], 3)
    packed = pack_keys(placed, values, all_tokens(70), None, swizzled=False)
    asked = pack_queries(
        queries, packed, None, 1.0, order=order.int(), offsets=False, swizzled=False
    )
    moved = queries.take_along_dim(order.repeat_interleave(2, 0)[None, :, None], 3)
    expected, _ = quantize_queries(moved, FORMAT)
    found = asked.queries[0].unflatten(-1, (QUERIES, 64)).flatten(2, 3)[:, :, :70]
    nearly_all_equal(found, expected)
