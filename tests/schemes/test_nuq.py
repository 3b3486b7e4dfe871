"""NUQ with keys after RoPE: packed as fake, equal to transformers' cache where nothing is lost.

What both kinds of keys share is in the contract of all schemes and in `tests/cache/test_matrix.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.cache.joining import join_caches
from kvquant.formats.rope import rotate
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import NuqScheme
from tests.support.caches import CLOSE, GREEDY, feed, ids, quantized, ragged, step, stored
from tests.support.models import tiny_model
from tests.support.quantizers import assert_fake_is_packed, blocks, random_quantizer

AFTER = NuqScheme(kind="nuq", bits=3, outliers=0.02, block_size=32, keys="after-rope")
BEFORE = AFTER.model_copy(update={"keys": "before-rope"})
EXACT = AFTER.model_copy(update={"outliers": 1.0})  # all outliers: 16 bits
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.02, 1.0])
def test_packed_is_fake_bit_for_bit(bits: int, outliers: float) -> None:
    spec = AFTER.model_copy(update={"bits": bits, "outliers": outliers})
    codec = NuqCodec(spec, random_quantizer(2, 64, bits))
    assert codec.rotated_keys
    assert_fake_is_packed(codec, blocks(0), blocks(1) * 5)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_stored_keys_are_those_that_attention_gets(protocol: Any) -> None:
    """Those of a cache before RoPE, each rotated by its position, and the same values."""
    model = tiny_model()
    rows, tokens, mask = ragged([90, 47], "left")
    caches = []
    for spec in (BEFORE, AFTER):
        qm = quantized(model, spec.model_copy(update={"outliers": 1.0}))
        caches.append(feed(qm, tokens, mask, [90], protocol)[1])
    for row, length in enumerate(map(len, rows)):
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        for n, (before, after) in enumerate(zip(*(stored(c, row) for c in caches), strict=True)):
            if n % 2 == 0:  # keys
                assert not torch.allclose(before, after, atol=0.1)
                before = rotate(before[None], cos, sin)[0]
            torch.testing.assert_close(after, before, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "cohere"])
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_generate_as_with_the_unquantized_cache(family: str, mode: str) -> None:
    """Which holds the same 16-bit keys after RoPE."""
    model = tiny_model(family)
    qm = quantized(model, EXACT)
    prompts = ids(3, 40)
    mask = torch.ones_like(prompts)
    mask[1, :13] = 0
    mask[2, :39] = 0
    settings = {**GREEDY, "max_new_tokens": 40, "attention_mask": mask}
    settings |= {"num_beams": 3} if mode == "beam" else {}
    plain, ours = (
        model.generate(prompts, past_key_values=cache, **settings)
        for cache in (qm.baseline_cache(), qm.new_cache())
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("keep", [1, 20, 97, 129])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_behind_a_crop_are_rotated_by_their_own_positions(keep: int, padded: bool) -> None:
    """Kept keys stay as they were written."""
    model = tiny_model()
    qm = quantized(model, EXACT)
    prompt, more = ids(2, 130), ids(2, 40, 1)
    mask = torch.ones(2, 170, dtype=torch.long)
    if padded:
        mask[1, : min(17, keep - 1)] = 0
    cache = feed(qm, prompt, mask[:, :130], [100, 1, 29])[1]
    cache.crop(keep - 130)
    tokens = torch.cat([prompt[:, :keep], more], 1)
    use = mask[:, : keep + 40]
    positions = (use.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(input_ids=tokens, attention_mask=use, position_ids=positions).logits
        got = model(
            input_ids=more,
            attention_mask=use,
            position_ids=positions[:, keep:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(got, expected[:, keep:], **CLOSE)


def test_joined_prompts_go_on_as_the_batch() -> None:
    qm = quantized(tiny_model(), AFTER)
    rows, tokens, mask = ragged([90, 40, 70], "left")
    cache = join_caches([feed(qm, row[None], None, [len(row)])[1] for row in rows])
    whole = feed(qm, tokens, mask, [90])[1]
    longer = torch.cat([mask, torch.ones(3, 50, dtype=torch.long)], 1)
    found = []
    for held in (cache, whole):
        with torch.inference_mode():
            out = qm.model(
                input_ids=ids(3, 50, 4),
                attention_mask=longer,
                position_ids=mask.sum(1, keepdim=True) + torch.arange(50),
                past_key_values=held,
                use_cache=True,
            )
        found.append(out.logits)
    torch.testing.assert_close(*found, **CLOSE)
    assert cache.lengths == [140, 90, 120]


@pytest.mark.parametrize("jump", [False, True])
def test_positions_that_jump_need_no_table(jump: bool) -> None:
    """Keys hold their rotation, so that none is kept beside them."""
    model = tiny_model()
    qm = quantized(model, EXACT)
    tokens, where = ids(1, 80), torch.arange(80)[None]
    where = torch.where(where >= 50, where + 40, where) if jump else where
    cache = qm.new_cache()
    with torch.inference_mode():
        expected = model(input_ids=tokens, position_ids=where).logits
        parts = []
        for part in (slice(0, 60), slice(60, 61), slice(61, 80)):
            new = {"input_ids": tokens[:, part], "position_ids": where[:, part]}
            parts.append(model(**new, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    assert cache.kept_nbytes == 0


def test_a_table_that_changes_with_the_length_rotates_as_in_the_unquantized_cache() -> None:
    model = tiny_model(max_position_embeddings=64, rope_parameters=DYNAMIC)
    qm = quantized(model, EXACT)
    found, parts = [], ids(2, 150).split([60, 37, 1, 52], 1)
    for cache in (qm.baseline_cache(), qm.new_cache()):
        found.append(torch.cat([step(model, cache, part) for part in parts], 1))
    torch.testing.assert_close(*found, **CLOSE)
    assert cache.kept_nbytes == 0


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_logits_are_those_of_fake_quantization(protocol: Any) -> None:
    """B is a model whose rotated keys and whose values are fake-quantized; A, of one call, none."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model()
    qm = quantized(model, AFTER)
    tokens = ids(2, 80)
    logits, _ = feed(qm, tokens, None, [80], protocol)
    plain, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], iter(qm.codecs or [])

    def coded(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        exact, codec = (key.half(), value.half()), next(calls)
        rows = [codec.fake(*(x[b : b + 1] for x in exact)) for b in range(2)]
        both = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        for fake, x in zip(both, exact, strict=True):
            fake[:, :, : AFTER.sinks] = x[:, :, : AFTER.sinks].float()
        return plain(module, query, *both, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["coded"] = coded
    model.config._attn_implementation = "coded" if protocol == "B" else "sdpa"
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert (next(calls, None) is None) == (protocol == "B")
