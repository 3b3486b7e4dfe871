"""What users of transformers rely on, against the unquantized cache (all outliers = 16 bits)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvquant.cache.footprint import cache_nbytes
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.schemes import NuqScheme
from tests.support.caches import CLOSE, EXACT, GREEDY, LOSSY, feed, ids, quantized, ragged, step
from tests.support.models import tiny_model

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", list(ROPES))
@pytest.mark.parametrize("spec", [EXACT, LOSSY], ids=["exact", "lossy"])
def test_rope_scaling(name: str, spec: NuqScheme) -> None:
    """Keys are stored before RoPE, so a scaled rotary table must be applied when they are read."""
    limit = 64 if name == "dynamic" else 512  # dynamic changes its table beyond the limit
    model = tiny_model(max_position_embeddings=limit, rope_parameters=ROPES[name])
    tokens = ids(2, 150)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    qm = quantized(model, spec)
    tolerance: dict[str, Any] = CLOSE if spec is EXACT else {"atol": 0.3, "rtol": 0.3}
    torch.testing.assert_close(step(model, qm.new_cache("B"), tokens), expected, **tolerance)
    cache = qm.new_cache()
    parts = [step(model, cache, part) for part in tokens.split([97, 1, 52], 1)]
    if name == "dynamic":  # the unquantized model reads the first tokens with another table
        torch.testing.assert_close(parts[-1][:, -1], expected[:, -1], atol=0.3, rtol=0.3)
    else:
        torch.testing.assert_close(torch.cat(parts, 1), expected, **tolerance)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", "greedy"), ("llama", "sample"), *((family, "beam") for family in MODEL_FAMILIES)],
)
def test_generate(family: str, mode: str) -> None:
    model = tiny_model(family)
    qm = quantized(model, EXACT)
    prompts = ids(3, 40)
    mask = torch.ones_like(prompts)
    mask[1, :13] = 0
    mask[2, :39] = 0
    settings = {**GREEDY, "max_new_tokens": 40 if family == "llama" else 12}
    settings |= {"sample": {"do_sample": True, "top_k": 5}, "beam": {"num_beams": 3}}.get(mode, {})
    torch.manual_seed(3)
    plain = model.generate(prompts, attention_mask=mask, **settings)
    torch.manual_seed(3)
    ours = model.generate(prompts, attention_mask=mask, past_key_values=qm.new_cache(), **settings)
    assert torch.equal(plain, ours)


def test_multi_turn() -> None:
    """A second turn goes on from the cache of the first."""
    model = tiny_model()
    qm = quantized(model, EXACT)
    cache, tokens = qm.new_cache(), ids(1, 50)
    for turn in range(3):
        plain = model.generate(tokens, max_new_tokens=30, **GREEDY)
        ours = model.generate(tokens, past_key_values=cache, max_new_tokens=30, **GREEDY)
        assert torch.equal(plain, ours)
        tokens = torch.cat([plain, ids(1, 20, turn + 1)], 1)
    assert cache.get_seq_length() == tokens.shape[1] - 21  # the last token was never fed


def test_copies_of_a_prompt_go_their_own_ways() -> None:
    model = tiny_model()
    qm = quantized(model, LOSSY)
    prompt, cache = ids(1, 100), qm.new_cache()
    step(model, cache, prompt)
    before = cache_nbytes(cache)
    results = []
    for seed in (1, 2):
        again = copy.deepcopy(cache)
        results.append(step(model, again, ids(1, 60, seed)))
        assert again.get_seq_length() == 160
    assert cache.get_seq_length() == 100
    assert cache_nbytes(cache) == before
    for seed, got in zip((1, 2), results, strict=True):
        alone = qm.new_cache()
        step(model, alone, prompt)
        torch.testing.assert_close(step(model, alone, ids(1, 60, seed)), got)


@pytest.mark.parametrize("keep", [0, 1, 20, 97, 99, 129])
@pytest.mark.parametrize("padded", [False, True])
def test_crop(keep: int, padded: bool) -> None:
    model = tiny_model()
    qm = quantized(model, EXACT)
    prompt, more = ids(2, 130), ids(2, 40, 1)
    mask = torch.ones(2, 170, dtype=torch.long)
    if padded:
        mask[1, : min(17, max(keep - 1, 0))] = 0
    cache = qm.new_cache()
    step(model, cache, prompt, mask[:, :130] if padded else None)
    cache.crop(keep - 130)
    assert cache.get_seq_length() == keep
    tokens = torch.cat([prompt[:, :keep], more], 1)
    use = mask[:, : keep + 40] if padded else None
    positions = None if use is None else (use.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(input_ids=tokens, attention_mask=use, position_ids=positions).logits
        got = model(
            input_ids=more,
            attention_mask=use,
            position_ids=None if positions is None else positions[:, keep:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(got, expected[:, keep:], **CLOSE)


def test_crop_counts_as_transformers_does() -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    step(qm.model, cache, ids(1, 70))
    cache.crop(0)
    assert cache.get_seq_length() == 70
    cache.crop(-5)
    assert cache.get_seq_length() == 65
    cache.crop(30)  # older releases: what to keep
    assert cache.get_seq_length() == 30
    cache.crop(-30)
    assert cache.get_seq_length() == 0


def test_select_and_repeat() -> None:
    model = tiny_model()
    qm = quantized(model, LOSSY)
    prompt = ids(3, 80)
    cache = qm.new_cache()
    step(model, cache, prompt)
    assert cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.lengths == [80] * 4
    got = step(model, cache, ids(1, 7, 5).expand(4, -1))
    alone = qm.new_cache()
    step(model, alone, prompt[[2, 2, 0, 0]])
    expected = step(model, alone, ids(1, 7, 5).expand(4, -1))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["chosen", "cropped"])
def test_what_is_left_without_padding_needs_no_mask(how: str) -> None:
    """A mask was asked for as long as any sequence had ever been padded."""
    qm = quantized(tiny_model(), EXACT)
    rows, tokens, mask = ragged([70, 41], "right")
    _, cache = feed(qm, tokens, mask, [70])
    alone = qm.new_cache()
    if how == "chosen":
        cache.batch_select_indices(torch.tensor([0]))
        step(qm.model, alone, rows[0][None])
    else:
        cache.crop(-30)
        step(qm.model, alone, tokens[:, :40])
    for more in ids(cache.batch_size, 12, 5).split([1, 1, 10], 1):
        found, want = (step(qm.model, held, more) for held in (cache, alone))
        torch.testing.assert_close(found, want, **CLOSE)


def test_sizes_reset_and_refusals() -> None:
    model = tiny_model()
    qm = quantized(model, LOSSY)
    cache = qm.new_cache()
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    newest = hasattr(cache, "get_max_length")
    assert (cache.get_max_length() if newest else cache.get_max_cache_shape()) == -1
    step(model, cache, ids(2, 45))
    assert cache.get_seq_length() == 45
    assert cache.get_mask_sizes(7, 0) == (52, 0)
    assert not cache.is_compileable
    with pytest.raises(NotImplementedError, match="offloading"):
        cache.offload(0)
    with pytest.raises(ValueError, match="a batch of 3, but the cache holds 2; give it as many by"):
        step(model, cache, ids(3, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = qm.new_cache()
    assert torch.equal(step(model, cache, ids(2, 45)), step(model, fresh, ids(2, 45)))


def test_bytes_are_the_storages_that_torch_holds() -> None:
    """Every storage reachable from the cache, counted once, is what `nbytes` says."""
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    step(qm.model, cache, ids(2, 300))
    for _ in range(70):
        step(qm.model, cache, ids(2, 1))
    storages: dict[int, int] = {}
    for layer in cache.layers:
        store = layer.store
        tensors = [*store.sinks, *store.tail]
        for arena in store.arenas:
            tensors += arena.dense.values()
            for s in arena.sparse.values():
                tensors += [s.begin, s.count, *s._positions, *s._values]
        for t in tensors:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    tables = sum(layer.codec.shared_bytes for layer in cache.layers)
    assert sum(storages.values()) + tables == cache_nbytes(cache)
