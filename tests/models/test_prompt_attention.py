"""8-bit attention of prompts: in transformers' models, over our caches, and what is refused.

Also covers: cache.whole_columns, kernels.prompt_attention, models.window_mask.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import kvquant
from kvquant.cache import kvquant_cache
from kvquant.cache.attending import Protocol
from kvquant.cache.forward_plan import PackedPast
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.errors import UserError
from kvquant.kernels import prompt_attention as kernels
from kvquant.kernels.masked_attention import masked_attention
from kvquant.kernels.prompt_attention import MIN_COLUMNS, attend
from kvquant.models import prompt_attention
from kvquant.models.loading import QuantizedModel
from kvquant.models.prompt_attention import NAME
from kvquant.models.window_mask import read_window_mask, window_mask
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.presets import scheme_from
from kvquant.study.scheme_kinds import SCHEME_KINDS, PromptAttention
from kvquant.study.schemes import Fp16Scheme
from tests.support.cache_uses import sharpen
from tests.support.caches import EXACT, GREEDY, LOSSY, feed, ids, quantized, ragged, step
from tests.support.hybrids import HYBRID, WINDOW, tiny_hybrid
from tests.support.models import save_tiny, tiny_model

LENGTH = 200
SIDES: tuple[PromptAttention, ...] = ("8-bit", "16-bit")
SPECS = {"fp16": Fp16Scheme(kind="fp16"), "16 bits in blocks": EXACT, "nuq3": LOSSY}
# How far logits of 8-bit and 16-bit prompts are from each other, over their standard deviation.
BOUND = 0.2
# The same keys in tiles that begin elsewhere, which have other scales, or in fp16.
AGAIN = 0.15
PLAIN = [name for name in MODEL_FAMILIES if name not in ("gemma2", "gpt_oss")]


def asked(spec: Any, eight: bool = True) -> Any:
    """A scheme with the option."""
    return spec.model_copy(update={"prompt_attention": "8-bit" if eight else "16-bit"})


def tiny(family: str = "llama", **options: Any) -> Any:
    """A tiny model whose scores depend on positions."""
    model = tiny_model(family, **options)
    sharpen(model)
    return model


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square of a difference over the standard deviation of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """The 8-bit attentions of a test: columns of queries and keys, and whether there is a mask."""
    calls: list[tuple[int, int, bool]] = []

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((q.shape[2], k.shape[2], options["valid"] is not None))
        return attend(q, k, v, **options)

    monkeypatch.setattr(prompt_attention, "attend", noted)
    return calls


@torch.inference_mode()
def alone(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of a call without a cache."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **options).logits
    return logits


@pytest.mark.feature("8-bit prompts", "{family}")
@pytest.mark.parametrize("family", PLAIN)
def test_prompts_of_all_families_are_close(
    family: str, counted: list[tuple[int, int, bool]]
) -> None:
    """By name as any model of transformers, over the unquantized cache, and over ours (A and B)."""
    model, tokens = tiny(family), ids(2, LENGTH)
    layers = len(model.model.layers)
    expected = alone(model, tokens)
    named = tiny(family, attention=NAME)
    found = alone(named, tokens)
    assert counted == [(LENGTH, LENGTH, False)] * layers
    assert 1e-4 < apart(found, expected) < BOUND
    cases: tuple[tuple[Any, Protocol], ...] = ((SPECS["fp16"], "A"), (EXACT, "A"), (EXACT, "B"))
    for spec, protocol in cases:
        counted.clear()
        qm = quantized(model, asked(spec))
        logits = step(model, qm.new_cache(protocol), tokens)
        assert counted == [(LENGTH, LENGTH, False)] * layers
        assert apart(logits, found) < AGAIN, (spec.kind, protocol)
        assert apart(logits, expected) < BOUND
        assert model.config._attn_implementation == "sdpa"
        counted.clear()
        assert apart(step(model, qm.baseline_cache(), tokens), expected) < 1e-2
        assert not counted


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize("name", SPECS)
def test_padding_changes_nothing_but_rounding(name: str, protocol: Any, side: str) -> None:
    """Against the same sequences by themselves, each in the same attention."""
    rows, tokens, mask = ragged([LENGTH, 140, 170], side)
    qm = quantized(tiny(), asked(SPECS[name]))
    found, _ = feed(qm, tokens, mask, [LENGTH], protocol)
    for b, row in enumerate(rows):
        expected, _ = feed(qm, row[None], None, [len(row)], protocol)
        assert apart(found[b][mask[b].bool()], expected[0]) < AGAIN


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize("name", ["fp16", "16 bits in blocks"])
def test_chunks_give_what_the_whole_gives(
    name: str, protocol: Any, side: str | None, counted: list[tuple[int, int, bool]]
) -> None:
    """Chunks of many columns attend in 8 bits to the past, too; short ones and steps in 16 bits."""
    tokens, mask = ids(2, 420), None
    if side is not None:
        _, tokens, mask = ragged([420, 300], side)
    qm = quantized(tiny(), asked(SPECS[name]))
    sixteen = quantized(qm.model, SPECS[name])
    expected, _ = feed(sixteen, tokens, mask, [420], protocol)
    found, _ = feed(qm, tokens, mask, [150, 60, 1, MIN_COLUMNS, 81], protocol)
    layers = len(qm.model.model.layers)
    assert [q for q, *_ in counted] == [150] * layers + [MIN_COLUMNS] * layers
    there = slice(None) if mask is None else mask.bool()
    assert apart(found[there], expected[there]) < BOUND


def test_protocol_b_reads_back_what_a_sequence_has_stored(
    counted: list[tuple[int, int, bool]],
) -> None:
    """A lossy cache: the second chunk sees the codes of its own tokens in the right places."""
    _, tokens, mask = ragged([330, 290], "left")
    eight, sixteen = (quantized(tiny(), asked(LOSSY, which)) for which in (True, False))
    found, _ = feed(eight, tokens, mask, [160, 170], "B")
    expected, _ = feed(sixteen, tokens, mask, [160, 170], "B")
    exact, _ = feed(sixteen, tokens, mask, [160, 170], "A")
    there = mask.bool()
    assert counted
    assert apart(found[there], expected[there]) < BOUND
    assert apart(exact[there], expected[there]) > 1.5 * apart(found[there], expected[there])


@pytest.mark.parametrize("columns", [1, 40, MIN_COLUMNS - 1])
def test_few_columns_are_exactly_those_of_16_bit_attention(columns: int) -> None:
    """Padded, over a past or without one, by name and over caches."""
    model, named = tiny(), tiny(attention=NAME)
    _, tokens, mask = ragged([columns + 3, columns], "left")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for at in (0, columns + 3):
        given = torch.cat((mask, torch.ones_like(mask)), 1)[:, : at + columns + 3]
        if at + columns + 3 - at >= MIN_COLUMNS:
            given, part = given[:, : at + columns], tokens[:, -columns:]
        else:
            part = tokens
        with torch.inference_mode():
            both = [
                one(part, attention_mask=given[:, : at + part.shape[1]], past_key_values=cache)
                for one, cache in zip((model, named), caches, strict=True)
            ]
        assert torch.equal(both[0].logits, both[1].logits)
        if part is not tokens:
            break


@pytest.mark.parametrize("name", [name for name in HYBRID if name not in ("gemma2", "gpt_oss")])
def test_windows_are_kept(name: str, counted: list[tuple[int, int, bool]]) -> None:
    """Those that hide columns attend in 16 bits, whatever the padding."""
    _, tokens, mask = ragged([LENGTH, 150], "left")
    model = tiny_hybrid(name)
    expected = alone(model, tokens, attention_mask=mask)
    named = tiny_hybrid(name, attention=NAME)
    there = mask.bool()
    assert apart(alone(named, tokens, attention_mask=mask)[there], expected[there]) < BOUND
    assert counted
    for spec in (SPECS["fp16"], EXACT):
        qm = quantized(model, asked(spec))
        found, _ = feed(qm, tokens, mask, [LENGTH])
        # positions of padded batches count tokens here
        wanted, _ = feed(quantized(model, SPECS["fp16"]), tokens, mask, [LENGTH])
        assert apart(found[there], wanted[there]) < BOUND
        parts, _ = feed(qm, tokens, mask, [140, 60])
        assert apart(parts[there], wanted[there]) < BOUND


@pytest.mark.parametrize("spec", [None, SPECS["fp16"], EXACT], ids=["by name", "fp16", "ours"])
def test_windows_without_padding_need_no_mask(
    spec: Any, counted: list[tuple[int, int, bool]]
) -> None:
    """So that the kernels take them, whose windows know no padding."""
    model, tokens = tiny_hybrid("gemma3", attention=NAME if spec is None else None), ids(2, LENGTH)
    if spec is None:
        alone(model, tokens)
    else:
        step(model, quantized(model, asked(spec)).new_cache(), tokens)
    assert counted == [(LENGTH, LENGTH, False)] * len(model.model.layers)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, for which it waits on a GPU."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("window", [64, None])
def test_layers_with_windows_read_their_mask_once_per_call(
    padded: bool, window: int | None
) -> None:
    """Whether the layers say how long their window is or leave it to the mask."""
    module = tiny_hybrid("gemma3", attention=NAME).model.layers[0].self_attn
    q, k = torch.randn(2, 4, LENGTH, 16), torch.randn(2, 2, LENGTH, 16)
    for left, length in ((10, 64), (150, 64), (10, 32)):
        tokens = torch.ones(2, LENGTH, dtype=torch.bool)
        tokens[0, : left * padded] = False
        mask = prompt_attention.eight_bit_mask(
            2, LENGTH, LENGTH, mask_function=sliding_window_causal_mask_function(length),
            local_size=length, attention_mask=tokens, device="cpu",
        )  # fmt: skip
        expected = attend(
            q, k, k, scaling=0.25, valid=tokens if padded else None, window=window or length
        )
        with Reads() as reads:
            for _ in range(3):
                found, _ = prompt_attention.eight_bit_prompt(
                    module, q, k, k, mask, scaling=0.25, sliding_window=window
                )
        assert torch.equal(found[tokens], expected[tokens])
        assert mask is not None
        moved, _ = prompt_attention.eight_bit_prompt(  # as for layers on other devices
            module, q, k, k, mask.clone(), scaling=0.25, sliding_window=window
        )
        assert torch.equal(moved[tokens], expected[tokens])
        assert reads.count <= 1


def test_a_mask_that_has_changed_is_read_again() -> None:
    mask = window_mask(torch.ones(2, 5, dtype=torch.bool), 3)
    assert read_window_mask(mask) == (3, None)
    mask[0, 1] = 0
    length, valid = read_window_mask(mask)
    assert valid is not None
    assert (length, valid.tolist()) == (3, [[True, False, True, True, True], [True] * 5])
    assert read_window_mask(torch.zeros_like(mask))[0] == 0


def test_a_window_that_hides_a_column_is_computed_in_16_bits() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 160, 16) for heads in (4, 2, 2))
    valid = torch.ones(2, 160, dtype=torch.bool)
    valid[0, :30] = False
    at = torch.arange(160)
    seen = (at[:, None] >= at) & (at[:, None] - at < WINDOW) & valid[:, None, None]
    expected = masked_attention(q, k, v, seen | torch.eye(160, dtype=torch.bool), 0.25)
    padded = [torch.where(valid[:, None, :, None], x, torch.nan) for x in (q, k, v)]
    found = attend(*padded, scaling=0.25, valid=valid, window=WINDOW)
    torch.testing.assert_close(found[valid], expected[valid])  # whatever padding holds
    wide = attend(q, k, v, scaling=0.25, valid=valid, window=160)
    torch.testing.assert_close(wide, attend(q, k, v, scaling=0.25, valid=valid))
    assert kernels.MIN_COLUMNS > WINDOW


@pytest.mark.feature("8-bit prompts: beams, guessed tokens, copies", "llama")
@pytest.mark.parametrize("name", SPECS)
def test_generate_uses_it_for_the_prompt_alone(
    name: str, counted: list[tuple[int, int, bool]]
) -> None:
    model = tiny()
    qm = quantized(model, asked(SPECS[name]))
    layers = len(model.model.layers)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}):
        counted.clear()
        out = model.generate(
            ids(1, LENGTH),
            past_key_values=qm.new_cache(),
            **{**GREEDY, "max_new_tokens": 5, **options},
        )
        assert out.shape == (1, LENGTH + 5)
        first = LENGTH + options.get("prompt_lookup_num_tokens", 0)  # guesses come with the prompt
        assert counted == [(first, first, False)] * layers
    cache = qm.new_cache()
    step(model, cache, ids(1, LENGTH))
    counted.clear()
    step(model, copy.deepcopy(cache), ids(1, MIN_COLUMNS, 1))
    assert counted == [(MIN_COLUMNS, LENGTH + MIN_COLUMNS, False)] * layers


@pytest.mark.parametrize("scheme", ["fp16-static", "kivi-4", "fp8", "turboquant-3", "hf-fp8"])
def test_caches_of_other_kinds_take_it(scheme: str, counted: list[tuple[int, int, bool]]) -> None:
    """Peers of ours, transformers' quantized caches, and 16 bits that are allocated once."""
    if scheme == "hf-fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no such cache")
    options = {"group": 16, "residual": 16} if scheme.startswith("kivi") else {}
    spec = scheme_from(scheme).model_copy(update=options)
    model = tiny()
    _, tokens, mask = ragged([LENGTH + 130, LENGTH], "left")
    found = []
    for which in (True, False):
        qm = kvquant.load(model, asked(spec, which))
        found.append(feed(qm, tokens, mask, [LENGTH, 130])[0][mask.bool()])
    layers = len(model.model.layers)
    assert [q for q, *_ in counted] == [LENGTH] * layers + [130] * layers
    assert 1e-4 < apart(*found) < BOUND


def test_two_models_of_one_object_keep_their_own(counted: list[tuple[int, int, bool]]) -> None:
    model = tiny()
    eight = kvquant.load(model, scheme="fp8", prompt_attention="8-bit")
    sixteen = kvquant.load(model, scheme="fp8")
    step(model, sixteen.new_cache(), ids(1, LENGTH))
    assert not counted
    step(model, eight.new_cache(), ids(1, LENGTH))
    assert counted
    assert isinstance(eight.new_cache(), KVQuantCache)
    assert (eight.approximates, kvquant.load(model).approximates) == (True, False)
    plain = kvquant.load(model, prompt_attention="8-bit")
    assert plain.approximates and not plain.quantizes
    counted.clear()
    alone(model, ids(1, LENGTH))  # without a cache of either
    assert not counted


@pytest.mark.parametrize("own", ["sdpa", "eager", NAME])
def test_calls_of_two_threads_over_one_model_keep_their_own(own: str) -> None:
    """Both are in the second layer at once, one in 8 bits, one in 16."""
    model = tiny(attention=own)
    _, tokens, mask = ragged([LENGTH, 150], "left")
    tokens, mask = tokens[1:], mask[1:]
    both = {which: kvquant.load(model, scheme="fp16", prompt_attention=which) for which in SIDES}
    expected = {which: step(model, qm.new_cache(), tokens, mask) for which, qm in both.items()}
    meeting = threading.Barrier(2, timeout=60)

    def meet(*args: Any) -> None:
        meeting.wait()

    handle = model.model.layers[1].register_forward_pre_hook(meet)

    def ask(which: PromptAttention) -> torch.Tensor:
        return step(model, both[which].new_cache(), tokens, mask)

    with ThreadPoolExecutor(2) as threads:
        found = dict(zip(SIDES, threads.map(ask, SIDES), strict=True))
    handle.remove()
    for which in SIDES:
        there = mask.bool()
        torch.testing.assert_close(found[which][there], expected[which][there])
    assert model.config._attn_implementation == own


def test_a_call_that_fails_leaves_the_model_its_own_attention() -> None:
    model = tiny()
    qm = kvquant.load(model, prompt_attention="8-bit")

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        step(model, qm.new_cache(), ids(1, LENGTH))
    handle.remove()
    expected = alone(tiny(), ids(1, LENGTH))
    torch.testing.assert_close(alone(model, ids(1, LENGTH)), expected)
    assert model.config._attn_implementation == "sdpa"
    step(model, qm.new_cache(), ids(1, LENGTH))
    assert kvquant.unwrap(qm).config._attn_implementation == "sdpa"


def test_a_saved_model_is_loaded_by_name_and_by_option(
    tmp_path: Path, counted: list[tuple[int, int, bool]]
) -> None:
    folder = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    found = alone(model, ids(1, LENGTH))
    assert counted
    qm = kvquant.load(folder, prompt_attention="8-bit", device="cpu")
    assert qm.scheme.prompt_attention == "8-bit"
    assert apart(step(qm.model, qm.new_cache(), ids(1, LENGTH)), found) < AGAIN
    named = kvquant.load(model)  # its own attention says what is meant
    assert named.scheme.prompt_attention == "8-bit"
    counted.clear()
    step(model, kvquant.load(model, prompt_attention="16-bit").new_cache(), ids(1, LENGTH))
    step(model, named.baseline_cache(), ids(1, LENGTH))
    assert not counted


@pytest.mark.refused("8-bit prompts with {what}", "the field, and 16-bit attention")
@pytest.mark.parametrize(
    ("what", "family", "field"),
    [
        ("soft-capping of scores", "gemma2", "attn_logit_softcapping"),
        ("attention sinks", "gpt_oss", "'sinks'"),
    ],
)
def test_models_that_need_more_are_refused_when_loaded(what: str, family: str, field: str) -> None:
    with pytest.raises(UserError, match=field) as found:
        kvquant.load(tiny(family, sliding_window=None), prompt_attention="8-bit")
    assert "use 16-bit attention" in str(found.value)
    named = tiny(family, attention=NAME)
    sixteen = kvquant.load(named, prompt_attention="16-bit").new_cache()
    for cache in (None, sixteen):  # sdpa, which would take its place, leaves them out in silence
        with pytest.raises(UserError, match="8-bit attention of prompts has no") as found:
            step(named, cache, ids(1, LENGTH))
        assert "attn_implementation: eager" in str(found.value)


@pytest.mark.parametrize("family", ["bloom", "mpt", "xglm"])
@pytest.mark.parametrize("columns", [LENGTH, 20])
def test_models_whose_layers_attend_by_themselves_are_refused(family: str, columns: int) -> None:
    """They would take the lack of a mask for attention to all tokens, later ones included."""
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=64, d_model=64, num_layers=1, n_layer=1, n_head=4,
        attention_heads=4, ffn_dim=96,
    )  # fmt: skip
    named = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    with pytest.raises(UserError, match=f"attn_implementation: {NAME}: layers of model_type"):
        alone(named, ids(1, columns))


def test_calls_that_ask_for_more_are_refused() -> None:
    named = tiny(attention=NAME)
    tokens = ids(1, LENGTH)
    cache = StaticCache(config=named.config, max_cache_len=300)
    with pytest.raises(UserError, match="past_key_values: a static cache"):
        step(named, cache, tokens)
    with pytest.raises(UserError, match="attention_mask: 8-bit attention"):
        alone(named, tokens, attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    packed = torch.cat((torch.arange(90), torch.arange(LENGTH - 90)))[None]
    with pytest.raises(UserError, match="attention_mask: 8-bit attention"):
        alone(named, tokens, position_ids=packed)
    with pytest.raises(UserError, match="output_attentions: 8-bit attention"):
        alone(named, tokens, output_attentions=True)
    module = named.model.layers[0].self_attn
    q, k = torch.randn(1, 4, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    for options, told in (
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"is_causal": False}, "is_causal"),
        ({"dropout": 0.1}, "attention_dropout"),
        ({"value": k[..., :8]}, "head_dim"),
    ):
        given: dict[str, Any] = {"value": k, **options}
        with pytest.raises(UserError, match=told):
            prompt_attention.eight_bit_prompt(module, q, k, attention_mask=None, **given)


@pytest.mark.parametrize("spec", [SPECS["fp16"], EXACT], ids=["fp16", "ours"])
def test_gradients_are_refused(spec: Any) -> None:
    model = tiny()
    model.requires_grad_(True)
    qm = quantized(model, asked(spec))
    loss = model(ids(1, LENGTH), past_key_values=qm.new_cache()).logits.square().mean()
    with pytest.raises(UserError, match="gradients: 8-bit attention of prompts has none"):
        loss.backward()


def test_chunked_attention_is_refused_and_sliding_windows_are_not() -> None:
    def mask(function: Any) -> torch.Tensor | None:
        return prompt_attention.eight_bit_mask(
            1, LENGTH, LENGTH, mask_function=function, local_size=64, device="cpu"
        )

    found = mask(sliding_window_causal_mask_function(64))
    assert found is not None and found.shape == (1, LENGTH) and set(found.unique().tolist()) == {64}
    with pytest.raises(UserError, match="attention_mask"):
        mask(chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.long)))


def test_the_option_is_checked_by_name() -> None:
    with pytest.raises(UserError, match="prompt_attention: '4-bit' is neither"):
        kvquant.load(tiny(), prompt_attention="4-bit")  # type: ignore[arg-type]
    unable = [kind for kind in SCHEME_KINDS.values() if not kind.prompt_attention]
    assert [kind.name for kind in unable] == ["kvquant-ref"]
    options = {"kind": "kvquant-ref", "bits": 3, "prompt_attention": "8-bit"}
    with pytest.raises(UserError, match="kind 'kvquant-ref' has an attention of its own"):
        kvquant.load(tiny(), scheme=options)


def test_a_compiled_model_gives_the_same() -> None:
    model = tiny()
    qm = kvquant.load(model, prompt_attention="8-bit")
    expected = step(model, qm.new_cache(), ids(1, LENGTH))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(step(compiled, qm.new_cache(), ids(1, LENGTH)), expected)
    assert isinstance(qm, QuantizedModel)


def test_a_compiled_model_without_cache_is_told_what_it_needs() -> None:
    """Where transformers cannot look at positions, it masks as if rows held several sequences."""
    model, tokens = tiny(attention=NAME), ids(1, LENGTH)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        with pytest.raises(UserError, match=r"^attention_mask: .* needs attention_mask\)"):
            compiled(tokens, use_cache=False)
        given = compiled(tokens, torch.ones_like(tokens), use_cache=False).logits
    torch.testing.assert_close(given, expected)


@torch.inference_mode()
def chunked(qm: QuantizedModel, tokens: torch.Tensor, mask: torch.Tensor, proto: Protocol) -> Any:
    """Logits of a prompt and a long turn over its codes, zero in padding; and the second path."""
    cache, out, at, paths = qm.new_cache(proto), [], 0, []
    meet = cache.meet

    def noted(*args: Any) -> Any:
        plan = meet(*args)
        paths.append(plan.path)
        return plan

    cache.meet = noted
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for size in (mask.shape[1] - 40, 40):
        part = slice(at, at + size)
        result = qm.model(
            input_ids=tokens[:, part],
            attention_mask=mask[:, : at + size],
            position_ids=places[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        out.append(result.logits)
        at += size
    return torch.where(mask[..., None].bool(), torch.cat(out, 1), 0).float(), paths[-1]


@pytest.mark.parametrize("proto", ["A", "B"])
@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param("triton", marks=pytest.mark.exhaustive),  # 20 s by the interpreter
        pytest.param("auto", marks=pytest.mark.gpu),
    ],
)
def test_kernels_attend_over_a_packed_past(
    kernels: str, proto: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are expanded and quantized range by range, with padding in both calls."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kernels == "auto" and device.type == "cpu":
        pytest.skip("needs a CUDA device")
    model = tiny_model("llama", heads=2, kv_heads=1, head_dim=64, num_hidden_layers=1)
    sharpen(model)
    kind = torch.float16 if device.type == "cuda" else torch.float32
    for module in (prompt_attention, kvquant_cache):  # the interpreter is slow
        monkeypatch.setattr(module, "MIN_COLUMNS", 40)
    spec = scheme_from({"kind": "nuq", "bits": 4, "block_size": 32, "outliers": 0})
    qm = quantized(model.to(device, kind), asked(spec))
    tokens = torch.randint(0, 97, (2, 85 if device.type == "cpu" else 600), device=device)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    mask[0, -7:] = 0
    found = {}
    for wished in (kernels, "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", wished)
        found[wished], path = chunked(qm, tokens, mask, proto)
        by_kernels = isinstance(path, PackedPast) and path.prompt is not None
        assert by_kernels is (wished == kernels)
    assert apart(found[kernels], found["pytorch"]) < AGAIN
