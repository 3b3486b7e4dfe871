"""Caches of single prompts that become the cache of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvquant.cache import joining
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.cache.joining import join_caches
from kvquant.errors import UserError
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp16Scheme,
    Fp16StaticScheme,
    HfQuantoScheme,
    KiviScheme,
    NuqScheme,
)
from tests.support.caches import CLOSE, feed, quantized, ragged, stored
from tests.support.models import tiny_model

NUQ = NuqScheme(kind="nuq", bits=3, outliers=0.02, block_size=32)
SPECS = [
    NUQ,
    AllocatedScheme(kind="allocated", bits=3.4, rotation=False, block_size=32),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    Fp16Scheme(kind="fp16"),
    Fp16StaticScheme(kind="fp16-static", room=8),
]


def singles(qm: Any, rows: list[torch.Tensor]) -> list[Any]:
    """A cache per prompt."""
    return [feed(qm, row[None], None, [len(row)])[1] for row in rows]


def further(qm: Any, cache: Any, mask: torch.Tensor, steps: int, chunk: int = 1) -> torch.Tensor:
    """Logits of further tokens, `[batch, steps * chunk, vocabulary]`."""
    tokens = torch.randint(1, 97, (len(mask), steps * chunk), generator=torch.manual_seed(3))
    logits = []
    with torch.inference_mode():
        for part in tokens.split(chunk, 1):
            first = mask.sum(1, keepdim=True)
            mask = torch.cat((mask, torch.ones_like(part)), 1)
            out = qm.model(
                input_ids=part,
                attention_mask=mask,
                position_ids=first + torch.arange(chunk),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("lengths", [[70, 70, 70], [100, 33, 1, 64]])
def test_joined_caches_are_that_of_the_batch(spec: Any, lengths: list[int]) -> None:
    qm = quantized(tiny_model(), spec)
    rows, ids, mask = ragged(lengths, "left")
    whole = feed(qm, ids, mask if min(lengths) < max(lengths) else None, [ids.shape[1]])[1]
    parts = singles(qm, rows)
    joined = join_caches(parts)
    assert joined is parts[0]
    assert joined.get_seq_length() == ids.shape[1]
    for cache in parts[1:]:
        assert cache.get_seq_length() == 0
    if hasattr(joined, "layout"):
        assert joined.lengths == lengths
        for row in range(len(lengths)):
            for mine, theirs in zip(stored(joined, row), stored(whole, row), strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
    assert cache_elements(joined, mask) == cache_elements(whole, mask)
    if spec.kind != "fp16":
        assert cache_nbytes(joined) <= 1.2 * cache_nbytes(whole)
    given = further(qm, joined, mask, 40)  # also fills blocks
    torch.testing.assert_close(given, further(qm, whole, mask, 40), **CLOSE)


def test_joined_caches_take_chunks_and_selection() -> None:
    qm = quantized(tiny_model(), NUQ)
    rows, ids, mask = ragged([90, 40, 70], "left")
    cache = join_caches(singles(qm, rows))
    chunk = further(qm, cache, mask, 2, chunk=50)
    other = feed(qm, ids, mask, [90])[1]
    torch.testing.assert_close(chunk, further(qm, other, mask, 2, chunk=50), **CLOSE)
    chosen = torch.tensor([2, 0])
    cache.batch_select_indices(chosen)
    assert cache.lengths == [170, 190]
    for mine, theirs in zip(stored(cache, 0), stored(other, 2), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
    more = join_caches([cache, *singles(qm, [rows[1]])])  # a batch and one more prompt
    assert more.lengths == [170, 190, 40]


def test_what_cannot_be_joined_is_refused() -> None:
    model = tiny_model()
    qm, other = quantized(model, NUQ), quantized(model, NUQ)
    rows, _, _ = ragged([40, 40], "left")
    first, second = singles(qm, rows)
    with pytest.raises(UserError, match="none to join"):
        join_caches([])
    with pytest.raises(UserError, match="given twice"):
        join_caches([first, first])
    with pytest.raises(UserError, match="is empty"):
        join_caches([first, qm.new_cache()])
    with pytest.raises(UserError, match="different models, schemes or protocols"):
        join_caches([first, *singles(other, rows[:1])])
    with pytest.raises(UserError, match="cannot be joined; use caches of one scheme"):
        join_caches([first, qm.baseline_cache()])
    with pytest.raises(UserError, match="is empty"):
        join_caches([qm.baseline_cache(), qm.baseline_cache()])
    kept, jumping = singles(qm, rows[:1])[0], qm.new_cache()
    with torch.inference_mode():
        qm.model(
            input_ids=rows[0][None],
            position_ids=2 * torch.arange(40)[None],
            past_key_values=jumping,
        )
    with pytest.raises(UserError, match="positions that are not counted"):
        join_caches([kept, jumping])
    assert join_caches([first, second]).lengths == [40, 40]  # refusals changed nothing


@pytest.mark.parametrize("spec", [NUQ, Fp16Scheme(kind="fp16")], ids=["nuq", "fp16"])
def test_prompts_that_attended_in_different_bits_are_refused(spec: Any) -> None:
    """Later turns of some sequences would attend as their own prompts did not."""
    qm = quantized(tiny_model(), spec)
    rows, _, _ = ragged([40, 40], "left")
    first, second = singles(qm, rows)
    second.prompt_attention = "8-bit"
    with pytest.raises(UserError, match="caches: their prompts attend in different bits"):
        join_caches([first, second])


def test_quantized_caches_of_transformers_are_refused() -> None:
    pytest.importorskip("optimum.quanto")
    qm = quantized(tiny_model(), HfQuantoScheme(kind="hf-quanto", bits=4))
    rows, _, _ = ragged([40, 40], "left")
    with pytest.raises(UserError, match="prefill all prompts in one call"):
        join_caches(singles(qm, rows))


def test_default_positions_are_refused_where_they_would_count_padding() -> None:
    qm = quantized(tiny_model(), NUQ)
    rows, _, _ = ragged([70, 30], "left")
    cache = join_caches(singles(qm, rows))
    mask = torch.ones(2, 71, dtype=torch.long)
    mask[1, :40] = 0
    with pytest.raises(ValueError, match="position_ids: needed"), torch.inference_mode():
        qm.model(input_ids=rows[0][:2, None], attention_mask=mask, past_key_values=cache)
    given = further(qm, cache, mask[:, :70], 3)  # the refused call has changed nothing
    assert given.isfinite().all() and cache.lengths == [73, 33]
    equal = join_caches(singles(qm, [rows[0], rows[0]]))
    with torch.inference_mode():
        qm.model(input_ids=rows[0][:2, None], past_key_values=equal)


@torch.inference_mode()
def test_default_positions_of_one_and_given_ones_of_another() -> None:
    qm = quantized(tiny_model(), NUQ)
    rows, ids, mask = ragged([40, 25], "left")
    whole = feed(qm, ids, mask, [40])[1]
    default, given = qm.new_cache(), qm.new_cache()
    qm.model(input_ids=ids, attention_mask=mask, past_key_values=default)
    qm.model(input_ids=rows[0][None], position_ids=torch.arange(40)[None], past_key_values=given)
    cache = join_caches([default, given])
    all_rows = torch.cat((mask, torch.ones(1, 40, dtype=torch.long)))
    found = further(qm, cache, all_rows, 3)
    assert not cache.kept_nbytes
    other = join_caches([whole, *singles(qm, rows[:1])])
    torch.testing.assert_close(found, further(qm, other, all_rows, 3), **CLOSE)


def test_tokens_of_another_dtype_are_refused() -> None:
    model = tiny_model()
    qm = quantized(model, NUQ)
    rows, _, _ = ragged([40, 40], "left")
    first = singles(qm, rows[:1])[0]
    model.bfloat16()
    second = singles(qm, rows[1:])[0]
    with pytest.raises(UserError, match=r"dtype torch\.bfloat16, the first torch\.float16"):
        join_caches([first, second])
    assert first.lengths == second.lengths == [40]


def test_unquantized_caches_are_empty_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    qm = quantized(tiny_model(), Fp16Scheme(kind="fp16"))
    caches = singles(qm, ragged([40, 40], "left")[0])
    plain, calls = joining._side_by_side, []

    def fails(parts: list[torch.Tensor], columns: int) -> torch.Tensor:
        calls.append(columns)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(parts, columns)

    monkeypatch.setattr(joining, "_side_by_side", fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        join_caches(caches)
    assert [cache.get_seq_length() for cache in caches] == [0, 0]


def test_shared_layers_are_refused() -> None:
    qm = quantized(tiny_model(), Fp16Scheme(kind="fp16"))
    cache = singles(qm, ragged([40, 40], "left")[0])[0]
    with pytest.raises(UserError, match="given twice"):
        join_caches([cache, copy.copy(cache)])
    assert cache.get_seq_length() == 40
    assert join_caches(iter(singles(qm, ragged([9, 9], "left")[0]))).get_seq_length() == 9
