"""8-bit attention by the kernels, beside float64 attention and beside the specification.

On a GPU, else under Triton's interpreter; the CUDA kernel on a Hopper GPU alone.

Also covers: kernels.cuda_prompt_attention, kernels.triton_prompt_attention,
kernels.triton_prompt_attention_kernels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.kernels.cuda_build import compile_cubin
from kvquant.kernels.cuda_prompt_attention import PromptShape, header, heads_together
from kvquant.kernels.eight_bit_attention import (
    TILE,
    EightBitFormat,
    eight_bit_attention,
    quantize_keys,
    quantize_queries,
    quantize_values,
)
from kvquant.kernels.prompt_attention import attend

pytest.importorskip("triton")
from kvquant.kernels.prompt_parts import PromptParts, token_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
)
backends = pytest.mark.parametrize("backend", ["triton", CUDA])
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bf16
FORMATS = {"triton": EightBitFormat(values="16-bit"), "cuda": EightBitFormat()}
# Error of all outputs over their length; weights and values of e4m3 have three fraction bits.
BOUNDS = {"triton": 0.02, "cuda": 0.05}
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PADDED: dict[str, Any] = {
    "left": st.lists(st.integers(0, 350), min_size=2, max_size=2),
    "right": st.lists(st.integers(0, 349), min_size=2, max_size=2),
    "asked": st.integers(1, 700),
    "seed": st.integers(0, 99),
}


def case(
    heads: int = 4,
    kv_heads: int = 2,
    length: int = 700,  # so that some tiles are neither the first nor next to a row
    dim: int = 64,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    k = torch.randn(2, kv_heads, length, dim) + 2 * torch.randn(2, kv_heads, 1, dim)
    both = torch.randn(2, heads, length, dim), k, torch.randn(2, kv_heads, length, dim)
    q, k, v = (x.to(DEVICE, dtype) for x in both)
    return q, k, v


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The definition, in float64."""
    group, asked, length = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    back = torch.arange(length, device=q.device)[length - asked :, None]
    back = back - torch.arange(length, device=q.device)
    seen = (back >= 0) & (back < (window or length))
    seen = seen[None, None] if valid is None else seen & valid[:, None, None]
    scores = (q.double() @ k.mT * scaling).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v.nan_to_num(0.0)).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@backends
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [(4, 2, 64, torch.float16), (3, 3, 128, HALF), (4, 1, 128, torch.float16)],
)
def test_a_prompt(backend: Any, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = case(heads, kv_heads, dim=dim, dtype=dtype)
    parts = PromptParts(q, kv_heads, dim**-0.5, 1, backend)
    parts.add(k, v)
    found = parts.result()
    assert found.dtype is dtype
    assert error(found, exact(q, k, v, dim**-0.5)) < BOUNDS[backend]
    specified = eight_bit_attention(q, k, v, scaling=dim**-0.5, fmt=FORMATS[backend])
    # Codes on the border of two, and sums in another order.
    assert error(found, specified.double()) < 0.3 * BOUNDS[backend]


@backends
def test_a_long_prompt_with_a_dominating_first_key(backend: Any) -> None:
    """Half of each row's weight is on the first key: the other keys must not vanish beside it."""
    q, k, v = case(1, 1, 700)
    q, k = q * 0.01, k * 0.01
    q[..., 0], k[:, :, 0, 0] = 1.0, 8 * math.log(700)
    parts = PromptParts(q, 1, 0.125, 1, backend)
    parts.add(k, v)
    assert error(parts.result(), exact(q, k, v, 0.125)) < BOUNDS[backend]


FINE = pytest.mark.parametrize("start", [0, 4 * TILE, 5 * TILE])  # first, next to the rows, theirs


def weight_in_a_tile(start: int) -> Case:
    """The last 60 of 700 queries, whose weight is all in the tile that begins at `start`."""
    q, k, v = case(1, 1)
    q = 4 * q[:, :, 5 * TILE :]
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, start : start + TILE, 0] = 200.0
    return q, k, v


@backends
@FINE
def test_scores_of_fine_tiles(backend: Any, start: int) -> None:
    """They are without the errors of 8-bit scores, which are a multiple of all others here."""
    q, k, v = weight_in_a_tile(start)
    parts = PromptParts(q, 1, 0.125, 1, backend)
    parts.add(k, v)
    codes, scales = quantize_keys(k, FORMATS[backend])
    coarse_k = codes * scales.repeat_interleave(TILE, 2)[:, :, :700]
    codes, scales = quantize_queries(q, FORMATS[backend])
    expected = exact(q, k, v, 0.125)
    coarse = error(exact(codes * scales, coarse_k, v, 0.125), expected)
    assert coarse > 0.08
    assert error(parts.result(), expected) < 0.3 * coarse


@backends
@FINE
def test_values_of_fine_tiles(backend: Any, start: int) -> None:
    """They lie in the middle between two of e4m3, which would round all the same way."""
    q, k, v = weight_in_a_tile(start)
    v = v.clamp(-1, 1)
    v[:, :, 300], v[:, :, start : start + TILE] = 1.0, 248 / 448
    parts = PromptParts(q, 1, 0.125, 1, backend)
    parts.add(k, v)
    codes, scales = quantize_values(v)
    expected = exact(q, k, v, 0.125)
    coarse = error(exact(q, k, codes.float() * scales, 0.125), expected)
    assert coarse > 0.03
    assert error(parts.result(), expected) < 0.1 * coarse


@settings(max_examples=6, deadline=None)
@given(**PADDED)
def test_padding_on_either_side_by_triton(**padded: Any) -> None:
    padding_on_either_side("triton", **padded)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@settings(max_examples=40, deadline=None)
@given(**PADDED)
def test_padding_on_either_side_by_cuda(**padded: Any) -> None:
    padding_on_either_side("cuda", **padded)


def padding_on_either_side(
    backend: Any, left: list[int], right: list[int], asked: int, seed: int
) -> None:
    q, k, v = case(2, 1, seed=seed)
    q = q[:, :, 700 - asked :]
    valid = torch.ones(2, 700, dtype=torch.bool, device=DEVICE)
    for b in range(2):
        valid[b, : left[b]], valid[b, 700 - right[b] :] = False, False
    expected = exact(q, k, v, 0.125, valid)
    own = valid[:, 700 - asked :]
    expected[~own] = 0
    for x in (k, v):
        x.transpose(1, 2)[~valid] = float("nan")
    q.transpose(1, 2)[~own] = float("nan")
    parts = PromptParts(q, 1, 0.125, 1, backend, columns=token_columns(own))
    tokens, mine = valid.sum(1), own.sum(1)
    counts = torch.stack((mine, tokens, tokens - mine), 1).int()
    parts.add(k, v, counts, columns=token_columns(valid))
    found = parts.result()
    assert not found[~own].any()
    if own.any():
        assert error(found, expected) < BOUNDS[backend]
        fmt = FORMATS[backend]
        specified = eight_bit_attention(q, k, v, scaling=0.125, valid=valid, fmt=fmt)
        assert error(found, specified.double()) < 0.3 * BOUNDS[backend]


@backends
def test_parts_are_one_softmax(backend: Any) -> None:
    """Ranges of a past whose channels lie in another order, one of them empty, then own tokens."""
    q, k, v = case(4, 2)
    q = q[:, :, 600:]
    order = torch.stack([torch.randperm(64, device=DEVICE) for _ in range(2)])
    placed = k.take_along_dim(order[None, :, None], 3)
    parts = PromptParts(q, 2, 0.125, 4, backend)

    def past(first: int, stop: int, keys: int) -> None:
        counts = torch.tensor([[100, keys, keys]] * 2, dtype=torch.int32, device=DEVICE)
        parts.add(placed[:, :, first:stop], v[:, :, first:stop], counts, order=order.int())

    past(0, 530, 530)
    past(530, 600, 70)
    past(0, 130, 0)
    parts.add(k[:, :, 600:], v[:, :, 600:])
    assert error(parts.result(), exact(q, k, v, 0.125)) < BOUNDS[backend]


@backends
@pytest.mark.parametrize("window", [1, 70, 256, 512])
def test_sliding_windows(backend: Any, window: int) -> None:
    q, k, v = case(2, 1)
    parts = PromptParts(q, 1, 0.125, 1, backend)
    parts.add(k, v, window=window)
    assert error(parts.result(), exact(q, k, v, 0.125, window=window)) < BOUNDS[backend]


@backends
def test_keys_that_come_later_are_not_seen(backend: Any) -> None:
    """A part of a past, read by position, may begin behind some of the queries."""
    q, k, v = case(1, 1, 600)
    parts = PromptParts(q, 1, 0.125, 2, backend)
    for first, stop in ((0, 96), (96, 600)):
        counts = torch.tensor([[600, stop - first, -first]] * 2, dtype=torch.int32, device=DEVICE)
        parts.add(k[:, :, first:stop], v[:, :, first:stop], counts)
    assert error(parts.result(), exact(q, k, v, 0.125)) < BOUNDS[backend]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 8, 128), (9, 3, 64), (16, 2, 128)])
def test_long_prompts_on_a_gpu(heads: int, kv_heads: int, dim: int) -> None:
    q, k, v = case(heads, kv_heads, 4099, dim)
    found = attend(q, k, v, scaling=dim**-0.5)
    specified = eight_bit_attention(q, k, v, scaling=dim**-0.5)
    assert error(found, specified.double()) < 0.02
    for _ in range(20):
        assert torch.equal(attend(q, k, v, scaling=dim**-0.5), found)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_cuda_kernel_compiles_without_a_gpu(dim: int, bf16: bool) -> None:
    pytest.importorskip("cuda.bindings")
    shape = PromptShape(dim, bf16)
    assert compile_cubin("prompt_attention.cu", header(shape), "sm_90a")
    assert shape.shared_bytes <= 227 * 1024


def test_heads_take_turns_in_whole_groups() -> None:
    for heads, kv_heads, keys in ((32, 32, 1024), (32, 8, 65536), (9, 3, 100), (1, 1, 1 << 20)):
        together = heads_together(heads, kv_heads, keys, 128)
        assert heads % together == 0
        assert together % (heads // kv_heads) == 0


@backends
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(backend: Any, which: str, number: float) -> None:
    """8-bit numbers and maxima would leave it out: a query that sees it must not look right."""
    q, k, v = case(1, 1, 150)
    {"queries": q, "keys": k, "values": v}[which][0, 0, 60, 5] = number
    parts = PromptParts(q, 1, 0.125, 1, backend)
    parts.add(k, v)
    found = parts.result()
    seen = found[0, 60] if which == "queries" else found[0, 149]
    assert not seen.isfinite().all()
    assert found[1].isfinite().all()  # another sequence
