"""Decode steps of a model that run as a graph by themselves."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch

from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.late_check import LateCheck
from kvquant.models import graph_calls
from kvquant.models.graph_calls import STEPS_BEFORE, GraphedCalls
from kvquant.models.hooks import install_attention, uninstall_attention
from kvquant.study.schemes import NuqScheme
from tests.support.caches import CLOSE, GREEDY, LOSSY, ids, quantized
from tests.support.model_features import LowRank
from tests.support.models import tiny_model
from tests.support.quantizers import constant_quantizer

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Recorded:
    """Stands in for the decoder on a CPU: runs the model and counts the steps."""

    steps = 0
    made = 0
    failing: Exception | None = None

    def __init__(self, model: Any, cache: KVQuantCache, room: int, *, borrowed: bool) -> None:
        assert borrowed
        Recorded.made += 1
        self._model: Any = model
        self._cache: Any = weakref.proxy(cache)
        self.positions = torch.tensor(cache.lengths)[:, None]

    def ready(self) -> Any:
        """Has nothing to capture; `failing` says how it fails."""
        if Recorded.failing is not None:
            raise Recorded.failing
        return self

    def replay(self, captured: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Runs a step as usual."""
        Recorded.steps += 1
        self._cache.graphs = False
        counts, mask = self._cache._padding._counts, None
        if counts is not None:
            one = torch.ones_like(counts[:, :1])
            mask = torch.cat((counts.diff(dim=1, prepend=0 * one), one), 1)
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=self.positions,
            past_key_values=self._cache,
        )
        self._cache.graphs = True
        self.positions = self.positions + 1
        logits: torch.Tensor = out.logits[:, -1]
        return logits


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Steps on a CPU are taken for steps on a GPU."""
    plain = graph_calls._is_step

    class OnGpu(torch.Tensor):
        """A tensor that claims to be on a GPU."""

        is_cuda = True  # type: ignore[assignment]

    def refuse(self: LateCheck, mask: Any, positions: Any) -> None:
        """Raises at once what a GPU tells later."""
        if positions is not None and bool(positions):
            raise ValueError("position_ids: a decode step did not go on")

    def is_step(given: dict[str, Any]) -> bool:
        claimed = {
            name: value.as_subclass(OnGpu) if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        return plain(claimed)

    monkeypatch.setattr(graph_calls, "_is_step", is_step)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graph_calls, "GraphedDecoder", Recorded)
    monkeypatch.setattr(LateCheck, "note", refuse)
    monkeypatch.setattr(Recorded, "steps", 0)
    monkeypatch.setattr(Recorded, "made", 0)
    return Recorded


@torch.inference_mode()
def run(model: Any, cache: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of tokens that come one by one, `[batch, n, vocabulary]`."""
    parts = [
        model(input_ids=part, past_key_values=cache, use_cache=True, **options).logits
        for part in tokens.split(1, 1)
    ]
    return torch.cat(parts, 1)


def filled(qm: Any) -> Any:
    """A cache of two prompts."""
    cache = qm.new_cache()
    with torch.inference_mode():
        qm.model(input_ids=ids(2, 50), past_key_values=cache)
    return cache


@pytest.mark.parametrize("unread", [{}, {"tokenizer": object()}])
def test_steps_run_as_a_graph_after_a_few(
    unread: dict[str, object], recorded: type[Recorded]
) -> None:
    """Also where `generate` hands its tokenizer on to the model, as it does with stop strings."""
    qm = quantized(tiny_model(), LOSSY)
    tokens = ids(2, 30, seed=1)
    plain = filled(qm)
    plain.graphs = False
    expected = run(qm.model, plain, tokens)
    assert recorded.made == 0
    cache = filled(qm)
    torch.testing.assert_close(run(qm.model, cache, tokens, **unread), expected, **CLOSE)
    assert recorded.made == 1
    assert recorded.steps == 30 - STEPS_BEFORE
    assert cache.lengths == [80, 80]


def test_a_change_of_the_cache_ends_the_graph(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    first, chunk, last = ids(2, 15, seed=1), ids(2, 5, seed=2), ids(2, 15, seed=3)
    results = []
    for graphs in (False, True):
        cache = filled(qm)
        cache.graphs = graphs
        parts = [run(qm.model, cache, first)]
        with torch.inference_mode():
            parts.append(qm.model(input_ids=chunk, past_key_values=cache).logits)
        parts.append(run(qm.model, cache, last))
        cache.crop(-3)
        parts.append(run(qm.model, cache, last))
        cache.reorder_cache(torch.tensor([1, 1]))
        parts.append(run(qm.model, cache, first))
        results.append(parts)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert recorded.made == 4
    assert recorded.steps == 4 * (15 - STEPS_BEFORE)


CHANGES: dict[str, Any] = {
    "moved weights": lambda model: model.double().float(),
    "another head": lambda model: setattr(model, "lm_head", copy.deepcopy(model.lm_head)),
    "another weight": lambda model: setattr(
        model.lm_head, "weight", torch.nn.Parameter(-model.lm_head.weight, requires_grad=False)
    ),
    "other data": lambda model: setattr(model.lm_head.weight, "data", -model.lm_head.weight.data),
    "a hook": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *a: -a[-1]),
    "a layer's forward": lambda model: setattr(
        model.model.layers[0].mlp, "forward", model.model.layers[1].mlp.forward
    ),
    "training": lambda model: model.train(),
    "an adapter that is turned off": lambda model: setattr(model.model.layers[1].mlp, "off", True),
    "an adapter's setting of another name": lambda model: model.model.layers[1].mlp.__dict__.update(
        ranks=model.model.layers[1].mlp.__dict__.pop("rank")
    ),
    "an adapter's strength": lambda model: model.model.layers[1].mlp.scaling.update(default=2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_ends_the_graph(recorded: type[Recorded], change: str) -> None:
    qm = quantized(tiny_model(), LOSSY)
    if "adapter" in change:
        qm.model.model.layers[1].mlp = LowRank(qm.model.model.layers[1].mlp, 64, 64)
    cache = filled_graph(qm)
    assert recorded.made == 1
    CHANGES[change](qm.model)
    run(qm.model, cache, ids(2, STEPS_BEFORE))
    assert recorded.made == 1
    run(qm.model, cache, ids(2, 2))
    assert recorded.made == 2


def test_another_model_has_no_part_in_the_graph(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache, tokens = filled_graph(qm), ids(2, 1)
    other = copy.deepcopy(qm.model)
    other.lm_head.weight.mul_(-1)
    torch.testing.assert_close(run(other, cache.copy(), tokens), run(other, cache, tokens), **CLOSE)
    assert recorded.made == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("cannot be captured"), torch.cuda.OutOfMemoryError("CUDA out of memory")]
)
def test_a_capture_that_fails_is_no_failure_of_the_call(
    recorded: type[Recorded], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm = quantized(tiny_model(), LOSSY)
    tokens, plain = ids(2, 30, seed=1), filled(qm)
    plain.graphs = False
    expected = run(qm.model, plain, tokens)
    monkeypatch.setattr(Recorded, "failing", error)
    torch.testing.assert_close(run(qm.model, filled(qm), tokens), expected, **CLOSE)
    assert (recorded.made, recorded.steps) == (1, 0)


def test_what_the_configuration_asks_for_is_given(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = filled_graph(qm)
    qm.model.config.output_hidden_states = True
    with torch.inference_mode():
        out = qm.model(input_ids=ids(2, 1), past_key_values=cache)
    assert out.hidden_states is not None


def test_beams_never_capture(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = qm.new_cache()
    qm.model.generate(ids(2, 40), past_key_values=cache, num_beams=3, max_new_tokens=30, **GREEDY)
    assert recorded.made == 0


def test_generate_uses_the_graph(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    prompt = ids(2, 40)
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    for given in (None, mask):
        recorded.made = recorded.steps = 0
        options: dict[str, Any] = {"attention_mask": given, "max_new_tokens": 30, **GREEDY}
        found = qm.model.generate(prompt, past_key_values=qm.new_cache(), **options)
        assert recorded.made == 1
        assert recorded.steps > 30 - STEPS_BEFORE - 4
        cache = qm.new_cache()
        cache.graphs = False
        plain = qm.model.generate(prompt, past_key_values=cache, **options)
        assert torch.equal(found, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"labels": torch.zeros(2, 1, dtype=torch.long)},
        {"logits_to_keep": torch.tensor([0])},
        {"return_dict": False},
    ],
    ids=str,
)
def test_other_calls_run_as_usual(recorded: type[Recorded], options: dict[str, Any]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = filled(qm)
    with torch.inference_mode():
        for part in ids(2, 20).split(1, 1):
            qm.model(input_ids=part, past_key_values=cache, **options)
    assert recorded.made == 0


def test_wrong_masks_are_refused_in_graphed_steps(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = filled(qm)
    run(qm.model, cache, ids(2, 20))
    assert recorded.made == 1
    mask = torch.ones(2, 71, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        run(qm.model, cache, ids(2, 1), attention_mask=mask)
    with pytest.raises(ValueError, match="position_ids"):
        run(qm.model, filled_graph(qm), ids(2, 1), position_ids=torch.zeros(3, 1).long())


def filled_graph(qm: Any) -> Any:
    """A cache whose next step runs as a graph."""
    cache = filled(qm)
    run(qm.model, cache, ids(2, 20))
    return cache


def test_steps_that_cannot_be_captured_are_not_tried_again(
    recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        tried.append(args)
        raise ValueError("cache: the decode kernel does not take it")

    monkeypatch.setattr(graph_calls, "GraphedDecoder", refuse)
    qm = quantized(tiny_model(), LOSSY)
    run(qm.model, filled(qm), ids(2, 30))
    assert len(tried) == 1


def test_the_model_stays_what_it_was() -> None:
    model = tiny_model()
    own, signature = type(model), inspect.signature(model.forward)
    install_attention(model)
    install_attention(model)
    assert isinstance(model, GraphedCalls)
    assert isinstance(model, own)
    assert type(model).__name__ == own.__name__
    assert inspect.signature(model.forward) == signature
    assert model.can_generate()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, GraphedCalls)
        with torch.inference_mode():
            expected = model(input_ids=ids(1, 9)).logits
            torch.testing.assert_close(other(input_ids=ids(1, 9)).logits, expected)
    uninstall_attention(model)
    assert type(model) is own


def test_a_cache_with_a_graph_is_freed_at_once(recorded: type[Recorded]) -> None:
    qm = quantized(tiny_model(), LOSSY)
    cache = filled_graph(qm)
    known = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert known() is None
    finally:
        gc.enable()


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("padded", [False, True])
    def test_generate_by_a_graph_agrees(
        self, padded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model("llama", head_dim=64).half().cuda()
        spec = NuqScheme(kind="nuq", bits=3, block_size=32)
        qm = quantized(model, spec, [constant_quantizer(2, 64, 3, 0.4)] * 2)
        prompt = ids(2, 70).cuda()
        mask = torch.ones_like(prompt)
        if padded:
            mask[1, :20] = 0
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 120, **GREEDY}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        plain = qm.new_cache()
        plain.graphs = False
        expected = model.generate(prompt, past_key_values=plain, **options)
        cache = qm.new_cache()
        found = model.generate(prompt, past_key_values=cache, **options)
        assert cache.steps.decoder is not None
        assert cache.lengths == plain.lengths
        same = (found.sequences == expected.sequences).all(0).long().cumprod(0).sum() - 70
        assert same > 20  # a near tie may fall the other way later
        for a, b in zip(found.logits[:same], expected.logits[:same], strict=True):
            assert (a - b).abs().max() < 0.05 * b.std()
        cache.settle()

    def test_a_model_that_waits_for_the_device_decodes_without(self) -> None:
        """Its steps cannot be captured; what the failed capture counted is taken back."""
        model = tiny_model("llama", head_dim=64).half().cuda()
        spec = NuqScheme(kind="nuq", bits=3, block_size=32)
        qm = quantized(model, spec, [constant_quantizer(2, 64, 3, 0.4)] * 2)
        prompt = ids(2, 70).cuda()
        plain = qm.new_cache()
        plain.graphs = False
        expected = model.generate(prompt, past_key_values=plain, max_new_tokens=60, **GREEDY)
        waits = model.lm_head.register_forward_hook(
            lambda m, a, out: out * out.isfinite().all().item()
        )
        cache = qm.new_cache()
        found = model.generate(prompt, past_key_values=cache, max_new_tokens=60, **GREEDY)
        waits.remove()
        assert cache.steps.refused
        assert torch.equal(found, expected)
