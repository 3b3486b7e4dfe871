"""What `generate` and the cache API of transformers ask of a cache, against the 16-bit cache.

`tests/cache/test_cache_behaviour.py` compares tokens; here are logits, the ways of generating that
crop or repeat a cache, and what a compiled model does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.benchmarks.append_stores import append_codec
from kvquant.cache.footprint import cache_nbytes
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.study.schemes import NuqScheme
from tests.support.caches import CLOSE, EXACT, GREEDY, LOSSY, ids, quantized, step, stored
from tests.support.models import tiny_model

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 7, "temperature": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 2, "do_sample": True},
}


def both(qm: QuantizedModel, prompts: torch.Tensor, mask: Any, **options: Any) -> list[Any]:
    """`generate` over the 16-bit cache and over ours, from the same random state."""
    out = []
    for cache in (qm.baseline_cache(), qm.new_cache()):
        torch.manual_seed(5)
        out.append(
            qm.model.generate(
                prompts,
                attention_mask=mask,
                past_key_values=cache,
                return_dict_in_generate=True,
                **{**GREEDY, **options},
            )
        )
    return out


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_every_step(mode: str, padded: bool) -> None:
    """All outliers: the logits of `generate` are those of the 16-bit cache to rounding."""
    qm = quantized(tiny_model(), EXACT)
    prompts = ids(2, 70)
    mask = torch.ones_like(prompts)
    if padded:
        mask[1, :41] = 0
    plain, ours = both(qm, prompts, mask, max_new_tokens=36, output_logits=True, **MODES[mode])
    assert torch.equal(plain.sequences, ours.sequences)
    assert len(ours.logits) == 36
    for a, b in zip(plain.logits, ours.logits, strict=True):
        torch.testing.assert_close(b, a, atol=2e-3, rtol=2e-3)


@pytest.mark.feature("prompt lookup", "llama")
@pytest.mark.parametrize("sample", [False, True])
def test_guessed_tokens_are_taken_back(sample: bool) -> None:
    """Prompt lookup feeds guesses and crops those that were wrong."""
    qm = quantized(tiny_model(), EXACT)
    prompts = ids(1, 20).repeat(1, 3)
    options = {"max_new_tokens": 50, "prompt_lookup_num_tokens": 4, "do_sample": sample}
    plain, ours = both(qm, prompts, torch.ones_like(prompts), **options)
    assert torch.equal(plain.sequences, ours.sequences)
    cache = ours.past_key_values
    assert isinstance(cache, KVQuantCache)
    assert cache.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.feature("assistant model", "llama")
def test_an_assistant_with_a_quantized_cache_of_its_own() -> None:
    model, assistant = tiny_model(), tiny_model(heads=2)
    qm = quantized(model, EXACT)
    prompts = ids(1, 40)
    options = {"assistant_model": assistant, "max_new_tokens": 30}
    plain, ours = both(qm, prompts, torch.ones_like(prompts), **options)
    assert torch.equal(plain.sequences, ours.sequences)


def test_crop_then_generate_then_another_turn() -> None:
    """An answer is taken back, another turn goes on, over both caches."""
    qm = quantized(tiny_model(), EXACT)
    results = []
    for cache in (qm.baseline_cache(), qm.new_cache()):
        first = qm.model.generate(ids(2, 50), past_key_values=cache, max_new_tokens=40, **GREEDY)
        cache.crop(-37)  # 89 columns are held; of the answer two tokens are kept
        tokens = torch.cat([first[:, :52], ids(2, 11, 3)], 1)
        second = qm.model.generate(
            tokens,
            past_key_values=cache,
            max_new_tokens=20,
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert cache.get_seq_length() == 63 + 19
        results.append((second.sequences, torch.stack(second.logits)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], **CLOSE)


def test_a_crop_within_the_tail_leaves_no_trace() -> None:
    """Tokens that are not packed yet are cut exactly: the cache is as if they had never come."""
    qm = quantized(tiny_model(), LOSSY)
    cache, fresh = qm.new_cache(), qm.new_cache()
    step(qm.model, cache, ids(2, 70))
    step(qm.model, fresh, ids(2, 70))
    for n in (1, 7, 20):  # 70 tokens: 1 sink, 64 packed, 5 in the tail, room for 26 more
        step(qm.model, cache, ids(2, n, n))
        cache.crop(-n)
    for row in range(2):
        for a, b in zip(stored(cache, row), stored(fresh, row), strict=True):
            assert torch.equal(a, b)
    more = ids(2, 50, 9)
    assert torch.equal(step(qm.model, cache, more), step(qm.model, fresh, more))


def test_reorder_and_a_mask_of_sequences() -> None:
    qm = quantized(tiny_model(), LOSSY)
    prompts, more = ids(4, 100), ids(1, 9, 4)
    cache = qm.new_cache()
    step(qm.model, cache, prompts)
    before = cache_nbytes(cache)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    assert cache_nbytes(cache) <= before  # no block was copied
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    assert cache.batch_size == 3
    alone = qm.new_cache()
    step(qm.model, alone, prompts[[3, 0, 2]])
    got = step(qm.model, cache, more.expand(3, -1))
    expected = step(qm.model, alone, more.expand(3, -1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_reorder_of_a_padded_batch_moves_its_positions() -> None:
    qm = quantized(tiny_model(), LOSSY)
    prompts = ids(3, 80)
    mask = torch.ones_like(prompts)
    mask[1, :50], mask[2, :79] = 0, 0
    order = torch.tensor([2, 1, 1])
    cache = qm.new_cache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        qm.model(prompts, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.reorder_cache(order)
        assert cache.lengths == [1, 30, 30]
        longer = torch.cat([mask[order], torch.ones(3, 5, dtype=torch.long)], 1)
        where = positions[order, -1:] + 1 + torch.arange(5)
        more = ids(1, 5, 6).expand(3, -1)
        got = qm.model(
            more, attention_mask=longer, position_ids=where, past_key_values=cache
        ).logits
        for row, (source, length) in enumerate(((2, 1), (1, 30), (1, 30))):
            alone = qm.new_cache()
            step(qm.model, alone, prompts[source : source + 1, 80 - length :])
            expected = step(qm.model, alone, more[:1])
            torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_what_transformers_asks_a_cache() -> None:
    """Every public question of `Cache`, before and after tokens."""
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    assert len(cache) == 2
    assert cache.is_sliding == [False, False]
    assert not cache.is_compileable  # so `generate` does not compile by itself
    assert not cache.has_previous_state() if hasattr(cache, "has_linear") else True
    assert cache.get_seq_length() == cache.get_seq_length(1) == 0
    assert cache.get_mask_sizes(9, 0) == (9, 0)
    step(qm.model, cache, ids(2, 33))
    assert cache.get_seq_length() == cache.get_seq_length(1) == 33
    if hasattr(cache, "get_query_offset"):
        assert cache.get_query_offset() == 33
    for layer in cache.layers:
        assert layer.get_max_cache_shape() == -1
        assert layer.get_mask_sizes(torch.arange(4)) == (37, 0)  # older releases give positions
        with pytest.raises(NotImplementedError, match="offload"):
            layer.offload()
    assert "KVQuantCache" in repr(cache)
    cache.reset()
    assert cache.get_seq_length() == cache_nbytes(cache) == 0
    assert cache.batch_size == -1


@pytest.mark.refused(
    "`cache_implementation` beside a cache that is passed in",
    "`cache_implementation`, by transformers itself; leave it out",
)
def test_generate_refuses_what_it_cannot_do_by_name() -> None:
    """A cache that is passed in and a cache that `generate` should make exclude each other."""
    qm = quantized(tiny_model(), LOSSY)
    with pytest.raises(ValueError, match="cache_implementation"):
        qm.model.generate(
            ids(1, 10),
            past_key_values=qm.new_cache(),
            cache_implementation="static",
            max_new_tokens=2,
        )


@pytest.mark.feature("`torch.compile`", "llama")
# What is compiled does not depend on how many outliers a block has.
@pytest.mark.parametrize(
    ("spec", "whole"), [(EXACT, True), (LOSSY, False)], ids=["exact-model", "lossy-forward"]
)
def test_a_compiled_decode_step_gives_the_same(spec: NuqScheme, whole: bool) -> None:
    """`torch.compile` traces the model around the cache: graphs break there, results stay."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = 12  # more than the versions of a function that torch compiles before it gives up
    model = tiny_model(num_hidden_layers=layers)
    install_attention(model)
    codec = append_codec(spec, 2, 16, torch.device("cpu"))
    assert codec is not None
    qm = QuantizedModel(model, None, spec, [codec] * layers)
    compiled = torch.compile(model if whole else model.forward, backend="eager")
    expected, got = qm.new_cache(), qm.new_cache()
    prompt = ids(2, 60)
    step(model, expected, prompt)
    step(model, got, prompt)
    for i in range(10):  # a block becomes full on the way
        token = ids(2, 1, i)
        with torch.inference_mode():
            ours = compiled(input_ids=token, past_key_values=got, use_cache=True).logits
        torch.testing.assert_close(step(model, expected, token), ours, atol=1e-5, rtol=1e-5)
    assert got.lengths == expected.lengths == [70, 70]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs < 12  # the same for all layers and steps
    torch._dynamo.reset()


@pytest.mark.refused(
    "`torch.compile` with `fullgraph=True`",
    "the cache looks at the mask on the host; leave `fullgraph` out",
)
def test_compiled_as_one_graph_is_refused_clearly() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    step(qm.model, cache, ids(1, 60))
    compiled = torch.compile(qm.model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="the mask on the host"), torch.inference_mode():
        compiled(input_ids=ids(1, 1), past_key_values=cache)
    torch._dynamo.reset()
