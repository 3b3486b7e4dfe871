"""Attention over a packed past by the Triton kernels against attention in float64.

On a GPU, else under Triton's interpreter.

Also covers: cache.packed_past, kernels.triton_attention_kernels, kernels.triton_expand,
kernels.triton_tiles, kernels.triton_workspace.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant.cache import packed_past
from kvquant.cache.forward_plan import PackedPast
from kvquant.cache.packed_past import range_blocks
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.models.loading import QuantizedModel
from kvquant.study.schemes import NuqScheme
from tests.support.caches import quantized
from tests.support.models import tiny_model
from tests.support.past_case import PastCase, largest_error

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
def test_ragged_past_and_own_tokens(bits: int, outliers: float) -> None:
    case = PastCase([97, 0, 1, 33, 64, 65, 66], 5, bits=bits, outliers=outliers)
    assert len(case.store.arenas) > 1
    expected = case.reference()
    assert largest_error(case.attend(2), expected) < 6e-3


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("columns", [1, 7])
def test_grouped_queries(group: int, columns: int) -> None:
    case = PastCase([70, 41], columns, heads=2, group=group, dim=64)
    assert largest_error(case.attend(1), case.reference()) < 6e-3


@pytest.mark.parametrize("dim", [32, 128, 256])
@pytest.mark.parametrize("size", [32, 64])
def test_head_dims_and_blocks(dim: int, size: int) -> None:
    case = PastCase([2 * size + 9, size], 3, dim=dim, size=size, heads=2, outliers=0.02)
    assert largest_error(case.attend(1), case.reference()) < 6e-3


@pytest.mark.parametrize("sinks", [0, 5, 40])
def test_sinks_and_scaled_rope(sinks: int) -> None:
    case = PastCase([110, 3, 45], 4, sinks=sinks, factor=1.3, bits=4)
    assert largest_error(case.attend(2), case.reference()) < 6e-3


def test_fp32_queries_keep_their_precision() -> None:
    case = PastCase([101, 40], 6, dtype=torch.float32, heads=2, group=2)
    assert largest_error(case.attend(1), case.reference()) < 1e-5


@pytest.mark.parametrize("step", [1, 2, 50])
def test_protocol_b_reads_everything_quantized(step: int) -> None:
    case = PastCase([130, 67, 64, 20], 20, group=2, dtype=torch.float32)
    # The call's tokens are the last of those stored.
    begins = torch.tensor(case.lengths, device=DEVICE)[:, None] - 20
    case.positions = begins + torch.arange(20, device=DEVICE)
    found = case.attend(step, causal=True)
    assert largest_error(found, case.reference(causal=True)) < 1e-5


@pytest.mark.parametrize(("soft_cap", "learned"), [(0.8, False), (None, True), (0.8, True)])
@pytest.mark.parametrize(("step", "causal"), [(1, False), (50, False), (1, True)])
def test_caps_and_sinks(soft_cap: float | None, learned: bool, step: int, causal: bool) -> None:
    """Sinks count once, in however many parts and splits the past is read."""
    options: dict[str, Any] = {"soft_cap": soft_cap, "learned": learned, "group": 2}
    case = PastCase([130, 67, 0, 20], 5, dtype=torch.float32, **options)
    if causal:  # the call's tokens are the last of those stored
        case.positions = case.positions - 5
    found = case.attend(step, causal=causal)
    assert largest_error(found, case.reference(causal=causal)) < 1e-5


def test_columns_that_are_no_tokens() -> None:
    case = PastCase([50, 35], 9, group=2, dtype=torch.float32)
    valid = case.positions.clone()
    valid[0, :4], valid[1, 2], valid[1, 7:] = -1, -1, -1
    assert largest_error(case.attend(1, valid=valid), case.reference(valid=valid)) < 1e-5


def test_same_result_in_every_run() -> None:
    case = PastCase([150, 80], 5, outliers=0.02, heads=2)
    assert torch.equal(case.attend(1), case.attend(1))


def test_ranges_do_not_change_the_result() -> None:
    case = PastCase([140, 20], 3, dtype=torch.float32)
    torch.testing.assert_close(case.attend(1), case.attend(4), atol=1e-5, rtol=1e-5)


def test_long_block_with_wide_positions() -> None:
    case = PastCase([1024 + 40], 2, size=1024, dim=64, bits=2, calls=1)
    assert case.store.arenas[0].sparse["keys"].count.dtype is torch.int32
    assert largest_error(case.attend(3), case.reference()) < 6e-3


def test_workspace_is_bounded() -> None:
    shape = DecodeShape(3, 128, 1, 64, torch.float16, True)
    for sequences_heads in (1, 8, 512, 100_000):
        tokens = range_blocks(sequences_heads, shape, 2) * 64
        taken = 4 * sequences_heads * 128 * tokens
        assert tokens <= packed_past.MAX_TOKENS
        assert taken <= packed_past.MAX_BYTES or tokens == packed_past.MIN_TOKENS
    assert range_blocks(100_000, replace(shape, block_size=1024), 2) == 1


@torch.inference_mode()
def logits(qm: QuantizedModel, ids: torch.Tensor, mask: Any, chunks: list[int], proto: Any) -> Any:
    cache, out, at = qm.new_cache(proto), [], 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    used, plain = 0, cache.meet

    def meet(*args: Any) -> Any:
        nonlocal used
        plan = plain(*args)
        used += isinstance(plan.path, PackedPast)
        return plan

    cache.meet = meet
    for size in chunks:
        part = slice(at, at + size)
        result = qm.model(
            input_ids=ids[:, part],
            attention_mask=mask[:, : at + size],
            position_ids=places[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        out.append(result.logits)
        at += size
    return torch.where(mask[..., None].bool(), torch.cat(out, 1), 0), used


CAP: dict[str, Any] = {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 4}


# Few tokens and one layer: the interpreter packs ten tokens with outliers in a second.
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("family", "proto", "padded", "outliers"),
    [
        ("llama", "A", True, 0.02),
        ("llama", "B", True, 0.0),
        ("gemma2", "A", False, 0.0),
        ("gpt_oss", "B", False, 0.0),
    ],
)
def test_model_gives_the_logits_of_the_pytorch_path(
    family: str, proto: Any, padded: bool, outliers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = CAP if family == "gemma2" else {}
    options: dict[str, Any] = {"head_dim": 64, "num_hidden_layers": 1, **more}
    model = tiny_model(family, heads=2, kv_heads=1, **options).to(DEVICE)
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, outliers=outliers)
    qm = quantized(model, spec)
    ids = torch.randint(0, 97, (1 + padded, 54), device=DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :40] = 0
    chunks = [36, 7, 1, 10]
    found = {}
    for kernels in ("triton", "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        found[kernels], used = logits(qm, ids, mask, chunks, proto)
        expected = len(chunks) - (proto == "A")
        assert used == (expected if kernels == "triton" else 0)
    torch.testing.assert_close(found["triton"], found["pytorch"], atol=1e-4, rtol=1e-4)


def test_keys_after_rope_are_read_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels packed; they would rotate the keys again."""
    model = tiny_model(heads=2, kv_heads=1, head_dim=64, num_hidden_layers=1).to(DEVICE)
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.0, keys="after-rope")
    qm = quantized(model, spec)
    ids = torch.randint(0, 97, (2, 54), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    found = {}
    for kernels in ("triton", "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        found[kernels], used = logits(qm, ids, mask, [36, 7, 1, 10], "A")
        assert used == 0
    torch.testing.assert_close(found["triton"], found["pytorch"], atol=1e-4, rtol=1e-4)


GPU = [
    # bits, dim, heads, group, size, outliers, lengths, columns, dtype, caps and sinks
    (3, 128, 16, 1, 64, 0.01, [4096, 3000, 4095, 17], 512, torch.float16),
    (3, 64, 8, 8, 64, 0.01, [4096, 17], 512, torch.bfloat16, {"learned": True}),
    (4, 256, 4, 2, 64, 0.01, [2000, 1024], 300, torch.float16, {"soft_cap": 2.0}),
    (3, 128, 8, 4, 64, 0.01, [16384], 1, torch.float16, {"soft_cap": 2.0, "learned": True}),
    (2, 128, 4, 4, 64, 0.02, [4096, 5000], 512, torch.bfloat16),
    (4, 256, 4, 2, 64, 0.01, [2000, 1024], 300, torch.float16),
    (4, 256, 2, 8, 32, 0.01, [2000], 129, torch.bfloat16),
    (3, 64, 8, 3, 128, 0.01, [1500, 4097, 0], 200, torch.float16),
    (3, 64, 8, 7, 1024, 0.0, [5000, 900], 64, torch.bfloat16),
    (3, 128, 8, 4, 64, 0.01, [16384], 1, torch.float16),
    (3, 128, 8, 12, 64, 0.01, [9000, 12], 1, torch.float16),
]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("given", GPU, ids=lambda g: f"{g[0]}bit-{g[1]}x{g[2]}x{g[3]}-{g[7]}")
def test_large_shapes_on_a_gpu(given: Any) -> None:
    bits, dim, heads, group, size, outliers, lengths, columns, dtype, *more = given
    options = more[0] if more else {}
    case = PastCase(
        lengths, columns, bits=bits, dim=dim, heads=heads, group=group, size=size,
        outliers=outliers, dtype=dtype, **options,
    )  # fmt: skip
    bound = 8e-3 if dtype is torch.float16 else 5e-2
    for step in (16, 1 << 20):
        found = case.attend(step)
        assert largest_error(found, case.reference()) < bound
        assert torch.equal(found, case.attend(step))
