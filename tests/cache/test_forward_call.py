"""Calls that end early: the cache is as before, or refused by name; never silently torn.

Also covers: cache.block_layer, cache.past_reader, cache.planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from transformers import DynamicCache

from kvquant.cache.block_store import BlockStore
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.layout import Layout
from kvquant.errors import UserError
from kvquant.study.schemes import KvquantRefScheme
from tests.support.caches import CLOSE, EXACT, LOSSY, SPECS, ids, quantized, step
from tests.support.models import tiny_model

ERRORS = [KeyboardInterrupt, torch.OutOfMemoryError]
# Where a call may end: an attribute of the model, of which the second layer's is taken.
STAGES = {
    "embedding": lambda m: m.model.embed_tokens,
    "rotary table": lambda m: m.model.rotary_emb,
    "norm of layer 0": lambda m: m.model.layers[0].input_layernorm,
    "queries of layer 0": lambda m: m.model.layers[0].self_attn.q_proj,
    "output of layer 0": lambda m: m.model.layers[0].self_attn.o_proj,
    "queries of layer 1": lambda m: m.model.layers[1].self_attn.q_proj,
    "output of layer 1": lambda m: m.model.layers[1].self_attn.o_proj,
    "MLP of layer 1": lambda m: m.model.layers[1].mlp,
    "last norm": lambda m: m.model.norm,
    "logits": lambda m: m.lm_head,
}
UNTOUCHED = ("embedding", "rotary table", "norm of layer 0", "queries of layer 0")


@contextmanager
def failing(target: Any, error: type[BaseException]) -> Iterator[None]:
    """A module, or a method (class, name), that raises."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("here")

    if isinstance(target, tuple):
        with pytest.MonkeyPatch.context() as patch:
            owner, name = target
            patch.setattr(owner, name, fail)
            yield
        return
    handle = target.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def goes_on(qm: Any, cache: Any, fed: list[torch.Tensor], new: torch.Tensor) -> None:
    """A call of `new` gives what it gives on a cache that was fed `fed` and nothing else."""
    fresh = qm.new_cache()
    for tokens in fed:
        step(qm.model, fresh, tokens)
    assert cache.get_seq_length() == fresh.get_seq_length()
    torch.testing.assert_close(step(qm.model, cache, new), step(qm.model, fresh, new))


@pytest.mark.fault(
    "library",
    "Ctrl-C or out of memory at ten stages of a call",
    "the cache is as before the call, or refuses every later one",
)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_call_that_ends_early(stage: str, error: type[BaseException], first: bool) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache, fed = qm.new_cache(), [] if first else [ids(2, 50)]
    for tokens in fed:
        step(qm.model, cache, tokens)
    with failing(STAGES[stage](qm.model), error), pytest.raises(error, match="here"):
        step(qm.model, cache, ids(2, 40, 1))
    assert cache.get_seq_length() == 50 * len(fed)
    assert cache.lengths == [50, 50] * len(fed)
    if stage in UNTOUCHED:
        goes_on(qm, cache, fed, ids(2, 40, 1))
        return
    for refused in (
        lambda: step(qm.model, cache, ids(2, 40, 1)),
        lambda: step(qm.model, cache, ids(2, 1)),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0, 1])),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        cache.copy,
        cache.settle,
    ):
        with pytest.raises(UserError, match=r"^cache: a forward call on it ended early") as told:
            refused()
        assert "reset()" in str(told.value)
        assert "\n" not in str(told.value)
    cache.reset()
    goes_on(qm, cache, [], ids(2, 40, 1))


@pytest.mark.fault(
    "library",
    "Ctrl-C inside the layout or a store",
    "the same",
)
@pytest.mark.parametrize("target", [(Layout, "append"), (BlockStore, "append")])
@pytest.mark.parametrize("tokens", [1, 40])
def test_within_the_cache_itself(target: Any, tokens: int) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    step(qm.model, cache, ids(2, 50))
    with failing(target, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        step(qm.model, cache, ids(2, tokens))
    if target[0] is Layout:
        goes_on(qm, cache, [ids(2, 50)], ids(2, tokens))
    else:
        with pytest.raises(UserError, match="ended early"):
            step(qm.model, cache, ids(2, tokens))


@pytest.mark.fault(
    "library",
    "an error while a call is planned",
    "undone",
)
def test_a_plan_that_is_half_made_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the layout's own change: blocks and lengths go back."""
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    step(qm.model, cache, ids(2, 50))

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache._planner, "begin", stop)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                step(qm.model, cache, ids(2, 100))
    goes_on(qm, cache, [ids(2, 50)], ids(2, 100))
    assert [arena.capacity for arena in cache.layout.arenas].count(2) <= 1


@pytest.mark.fault(
    "library",
    "NaN in the input, then another call",
    "refused by name",
)
def test_nan_in_the_input() -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    embeds = qm.model.model.embed_tokens(ids(1, 60)).clone()
    embeds[0, 50] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"), torch.inference_mode():
        qm.model(inputs_embeds=embeds, past_key_values=cache)
    with pytest.raises(UserError, match="ended early"):
        step(qm.model, cache, ids(1, 60))


def test_a_call_of_the_decoder_alone_ends_with_it() -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model.model(ids(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 30
    with pytest.raises(IndexError), torch.inference_mode():
        qm.model(ids(1, 3), past_key_values=cache, logits_to_keep=object())
    with pytest.raises(UserError, match="ended early"):
        step(qm.model, cache, ids(1, 3))


@pytest.mark.fault(
    "library",
    "a layer called outside a forward call",
    "one error",
)
def test_a_layer_without_a_call() -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    attention = qm.model.model.layers[0].self_attn
    rope = qm.model.model.rotary_emb(torch.zeros(1), torch.arange(3)[None])
    for _ in range(2):  # before any call, and after one
        with pytest.raises(UserError, match="layer 0 was called without a forward call"):
            attention(torch.zeros(1, 3, 64), rope, None, cache)
        step(qm.model, cache, ids(1, 3))
    cache.begin_forward(1, 5, None, torch.device("cpu"))
    with pytest.raises(UserError, match="given 3 columns in a forward call of 5"):
        attention(torch.zeros(1, 3, 64), rope, None, cache)


@pytest.mark.fault(
    "library",
    "a layer called twice or skipped",
    "one error",
)
def test_a_layer_that_is_called_twice_or_skipped() -> None:
    qm = quantized(tiny_model(), LOSSY)
    layers = qm.model.model.layers
    cache = qm.new_cache()
    again = layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: layers[0](*args, **kwargs) and None, with_kwargs=True
    )
    with pytest.raises(UserError, match="layer 0 was called without"):
        step(qm.model, cache, ids(1, 5))
    again.remove()
    cache = qm.new_cache()
    plain, layers[1].self_attn.forward = (
        layers[1].self_attn.forward,
        lambda **k: (
            k["hidden_states"],
            None,
        ),
    )
    with pytest.raises(UserError, match="layer 1 took no part"):
        step(qm.model, cache, ids(1, 5))
    layers[1].self_attn.forward = plain
    with pytest.raises(UserError, match="ended early"):
        step(qm.model, cache, ids(1, 5))


@pytest.mark.fault(
    "library",
    "crop, select or repeat fails in one layer",
    "every later call is refused until reset",
)
def test_a_change_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    qm = quantized(tiny_model(), SPECS[1])
    for change in (
        lambda c: c.crop(-45),
        lambda c: c.batch_select_indices(torch.tensor([0])),
        lambda c: c.batch_repeat_interleave(2),
    ):
        cache = qm.new_cache()
        step(qm.model, cache, ids(2, 80))
        store = cache.layers[1].store
        with monkeypatch.context() as patch:
            for name in ("select", "uncut"):
                patch.setattr(store, name, lambda *args: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                change(cache)
        with pytest.raises(UserError, match=r"^cache: choosing or cutting its sequences failed"):
            step(qm.model, cache, ids(2, 1))


def test_kvquants_own_cache_is_refused_too() -> None:
    qm = quantized(tiny_model(), KvquantRefScheme(kind="kvquant-ref", bits=4))
    cache = qm.new_cache()
    step(qm.model, cache, ids(2, 30))
    layer = qm.model.model.layers[1].self_attn.q_proj
    with failing(layer, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        step(qm.model, cache, ids(2, 4))
    assert cache.get_seq_length() == 30
    with pytest.raises(UserError, match="ended early"):
        step(qm.model, cache, ids(2, 4))
    cache.reset()
    step(qm.model, cache, ids(2, 4))
    with pytest.raises(ValueError, match=r"an earlier column was a token"):
        step(qm.model, cache, ids(2, 1), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="positions that jump"), torch.inference_mode():
        qm.model(ids(2, 1), position_ids=torch.tensor([[9]]), past_key_values=cache)
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache, plain = qm.new_cache(), DynamicCache()
    for held in (cache, plain):  # four bits and 16 bits: near
        step(qm.model, held, ids(2, 4), left[:, :4])
    got, right = (step(qm.model, held, ids(2, 1), left) for held in (cache, plain))
    assert float((got - right).norm() / right.norm()) < 0.1


class TestSequences:
    """What chooses sequences is checked before it changes anything."""

    def cache(self) -> KVQuantCache:
        qm = quantized(tiny_model(), EXACT)
        cache = qm.new_cache()
        step(qm.model, cache, ids(3, 40))
        assert isinstance(cache, KVQuantCache)
        return cache

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (torch.tensor([True, False]), "2 of them, but the cache holds 3"),
            (torch.tensor([True] * 4), "4 of them, but the cache holds 3"),
            (torch.tensor([False] * 3), "no sequence is kept"),
            (torch.tensor([], dtype=torch.long), "no sequence is kept"),
            (torch.tensor([0, 3]), r"\[0, 3\], but the cache holds 3 sequences"),
            (torch.tensor([-4]), r"\[-4\], but the cache holds 3 sequences"),
            (torch.tensor([[0, 1]]), "one dimension"),
            (torch.tensor([0.0, 1.0]), "integers or bools"),
            ([0, 1], "must be a tensor .* got list"),
        ],
    )
    def test_indices(self, given: Any, words: str) -> None:
        cache = self.cache()
        with pytest.raises(ValueError, match=f"^indices: .*{words}"):
            cache.batch_select_indices(given)
        assert cache.lengths == [40] * 3
        cache.batch_select_indices(torch.tensor([-1, 0]))
        assert cache.batch_size == 2

    @pytest.mark.parametrize("given", [[0, 1], [0, 1, 2, 2], [0, 1, 3]])
    def test_beams(self, given: list[int]) -> None:
        cache = self.cache()
        with pytest.raises(ValueError, match=r"^beam_idx: "):
            cache.reorder_cache(torch.tensor(given))
        assert cache.lengths == [40] * 3

    @pytest.mark.parametrize("repeats", [0, -1])
    def test_repeats(self, repeats: int) -> None:
        with pytest.raises(ValueError, match=r"^repeats: must be at least 1"):
            self.cache().batch_repeat_interleave(repeats)

    def test_negative_indices_count_from_the_end(self) -> None:
        qm = quantized(tiny_model(), EXACT)
        caches = []
        for chosen in ([-1, 0], [2, 0]):
            cache = qm.new_cache()
            step(qm.model, cache, ids(3, 40))
            cache.batch_select_indices(torch.tensor(chosen))
            caches.append(step(qm.model, cache, ids(2, 3)))
        torch.testing.assert_close(*caches, **CLOSE)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_cache_that_was_cropped_to_padding_goes_on(protocol: Literal["A", "B"]) -> None:
    model = tiny_model("llama")
    qm = quantized(model, EXACT)
    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = qm.new_cache(protocol)
    with torch.inference_mode():
        model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(-7)
        assert cache.lengths == [0, 0] and cache.get_seq_length() == 3
        more = torch.cat([mask[:, :3], torch.ones(2, 5, dtype=torch.long)], 1)
        found = model(
            tokens[:, :5],
            attention_mask=more,
            position_ids=torch.arange(5)[None].expand(2, 5),
            past_key_values=cache,
        )
        expected = model(tokens[:, :5], past_key_values=DynamicCache(config=model.config))
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert cache.lengths == [5, 5]
