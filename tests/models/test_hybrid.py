"""Models some of whose layers have a sliding window, over all uses of a cache.

Also covers: models.layer_kinds, models.rotary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.cache.joining import join_caches
from kvquant.cache.memory_formula import window_footprint
from kvquant.cache.window_layer import WindowLayer
from kvquant.cache.window_plan import ROLLBACK
from kvquant.calibration.build import build_layers
from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.evaluation.perplexity import measure_windows
from kvquant.kernels.limits import cuda_decode, triton_past
from kvquant.models.layer_kinds import layer_kinds, position_limit
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.rotary import same_angles, static_rope
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import Fp8Scheme, Fp16Scheme, KvquantRefScheme, NuqScheme
from tests.support.cache_uses import LENGTH, fed, padded, reordered, sharpen
from tests.support.caches import CLOSE, EXACT, GREEDY, feed, ids, quantized, ragged, step
from tests.support.hybrids import ALTERNATING, BASES, HYBRID, WINDOW
from tests.support.hybrids import tiny_hybrid as tiny
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.quantizers import narrow_tables, relative_error, save_made_quantizer

hybrids = pytest.mark.parametrize("name", HYBRID)


def dynamic(model: Any) -> DynamicCache:
    """The unquantized cache of transformers."""
    return DynamicCache(config=model.config)


@torch.inference_mode()
def alone(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence without a cache, `[tokens, vocabulary]`."""
    logits: torch.Tensor = model(input_ids=row[None]).logits[0]
    return logits


USES: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "chunks and steps": fed,
    "left padding": padded("left"),
    "right padding": padded("right"),
    "a reordered batch": reordered,
}


@pytest.mark.feature("{use}", "{name}+windows")
@hybrids
@pytest.mark.parametrize("use", USES)
def test_a_16_bit_cache_gives_what_the_unquantized_one_gives(name: str, use: str) -> None:
    model = tiny(name)
    qm = quantized(model, EXACT)
    expected = USES[use](model, dynamic(model))
    torch.testing.assert_close(USES[use](model, qm.new_cache()), expected, **CLOSE)
    if use == "chunks and steps":  # protocol B reads each token back that it has just stored
        torch.testing.assert_close(USES[use](model, qm.new_cache("B")), expected, **CLOSE)
        torch.testing.assert_close(USES[use](model, qm.baseline_cache()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma3", {"sliding_window": 12}),
        ("gemma3", {"rope_parameters": {**BASES, "sliding_attention": BASES["full_attention"]}}),
        ("gemma3", {"rope_parameters": {**BASES, "full_attention": BASES["sliding_attention"]}}),
        ("gemma2", {"attn_logit_softcapping": None}),
    ],
    ids=["window", "local base", "global base", "cap"],
)
def test_what_the_others_compare_tells_models_apart(name: str, options: dict[str, Any]) -> None:
    """Each option changes logits by far more than the tolerance of the comparisons."""
    found = [alone(tiny(name, **more), ids(1, 90)[0]) for more in ({}, options)]
    assert float((found[0] - found[1]).abs().max()) > 5 * CLOSE["atol"]


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "full"])
def test_they_tell_sinks_apart(layer: int) -> None:
    """Of either kind of layer, and of two heads."""
    model = tiny("gpt_oss")
    found = [alone(model, ids(1, 90)[0])]
    sinks = model.model.layers[layer].self_attn.sinks
    for changed in (sinks.flip(0), torch.full_like(sinks, -1e9)):
        sinks.data = changed
        found.append(alone(model, ids(1, 90)[0]))
        assert float((found[-1] - found[0]).abs().max()) > 3 * CLOSE["atol"]


@pytest.mark.feature("crop", "{name}+windows")
@hybrids
def test_tokens_are_taken_back_and_others_follow(name: str) -> None:
    """Before the window is full, and after as many tokens as there is room for."""
    model = tiny(name)
    cache = quantized(model, EXACT).new_cache()
    first, parts = ids(2, 120), ids(2, 40, 1).split([30, 1, 9], 1)
    step(model, cache, first)
    for keep, more in ((120 - ROLLBACK, parts), (9, parts[:1])):
        cache.crop(keep - cache.get_seq_length())
        found = torch.cat([step(model, cache, part) for part in more], 1)
        whole = torch.cat((first[:, :keep], *more), 1)
        with torch.inference_mode():
            expected = model(input_ids=whole).logits[:, keep:]
        torch.testing.assert_close(found, expected, **CLOSE)
        cache.reset()
        step(model, cache, first[:, :60])  # fewer than the ring holds


@pytest.mark.refused(
    "`crop` by more than 64 tokens, of a model with sliding windows that are full",
    "`crop`, and how many can be taken back; crop less, or feed the prompt again",
)
def test_more_tokens_than_the_window_holds_are_not_taken_back() -> None:
    model = tiny("gemma3")
    cache, tokens = quantized(model, EXACT).new_cache(), ids(1, 160)
    step(model, cache, tokens[:, :120])
    with pytest.raises(UserError, match=r"crop: sequence 0 has 120 tokens and would keep 55, but"):
        cache.crop(-ROLLBACK - 1)
    cache.crop(-40)
    step(model, cache, tokens[:, 80:90])
    with pytest.raises(UserError, match=r"has 90 tokens and would keep 50, .* at most 64 can be"):
        cache.crop(-40)  # the 40 tokens of before are lost for good
    found = step(model, cache, tokens[:, 90:])
    torch.testing.assert_close(found[0], alone(model, tokens[0])[90:], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_each_sequence_of_a_batch_gets_what_it_would_get_alone(side: str) -> None:
    """A window counts tokens, not columns: padding between two tokens takes no place in it."""
    model = tiny("gemma3")
    rows, tokens, mask = ragged([90, 47, 71], "left" if side == "left" else "right")
    if side == "holes":
        places = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
        mask = mask.gather(1, places)
        for b, row in enumerate(rows):
            tokens[b, mask[b].bool()] = row
    more = ids(3, 30, 3)
    both = torch.cat((tokens, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    qm = quantized(model, EXACT)
    for chunks in ([90, 30], [40, 50, 1, 1, 28]):
        logits, _ = feed(qm, *both, chunks)
        for b, row in enumerate(rows):
            expected = alone(model, torch.cat((row, more[b])))
            torch.testing.assert_close(logits[b][both[1][b].bool()], expected, **CLOSE)


def test_default_positions_of_a_padded_batch_are_followed_by_counted_ones() -> None:
    """Tokens are rotated by their place in the sequence in both kinds of layers."""
    model = tiny("gemma3")
    rows, tokens, mask = ragged([60, 40], "left")
    cache, more = quantized(model, EXACT).new_cache(), ids(2, 20, 3)
    step(model, cache, tokens, mask)  # without positions: those of the second count padding
    whole = torch.cat((mask, torch.ones_like(more)), 1)
    with torch.inference_mode():
        found = model(
            input_ids=more,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1)[:, 60:],
            past_key_values=cache,
        ).logits
    for b, row in enumerate(rows):
        expected = alone(model, torch.cat((row, more[b])))[len(row) :]
        torch.testing.assert_close(found[b], expected, **CLOSE)


@pytest.mark.refused(
    "`position_ids` that jump after others than counted ones, with sliding windows",
    "`position_ids`: positions that go on by one",
)
def test_positions_that_jump() -> None:
    """They are followed where earlier keys were rotated by what the model gave, else refused."""
    model = tiny("gemma3")
    qm, tokens = quantized(model, EXACT), ids(1, 50)
    found = []
    for cache in (qm.new_cache(), dynamic(model)):
        step(model, cache, tokens[:, :30])
        at = torch.arange(100, 120)[None]
        with torch.inference_mode():
            out = model(input_ids=tokens[:, 30:], position_ids=at, past_key_values=cache)
        found.append(out.logits)
    torch.testing.assert_close(*found, **CLOSE)
    cache = qm.new_cache()
    for start in (7, 100):  # the first tokens are rotated by their count, not from 7 on
        at = torch.arange(start, start + 20)[None]
        if start == 100:
            with pytest.raises(ValueError, match="position_ids: do not continue those of earlier"):
                model(input_ids=tokens[:, :20], position_ids=at, past_key_values=cache)
            break
        model(input_ids=tokens[:, :20], position_ids=at, past_key_values=cache)


@pytest.mark.feature("fp16 and bf16 weights", "{name}+windows")
@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_weights(name: str, dtype: torch.dtype) -> None:
    model = tiny(name)
    with torch.inference_mode():
        exact = model(input_ids=ids(2, LENGTH)).logits
    model = model.to(dtype)
    error = relative_error(fed(model, dynamic(model)).float(), exact)
    found = fed(model, quantized(model, EXACT).new_cache())
    assert found.dtype is dtype
    assert relative_error(found.float(), exact) < 1.5 * error + 0.01


@pytest.mark.feature("4 bits, own calibration", "{name}+windows")
@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
def test_four_bits_from_the_models_own_calibration_are_close(name: str) -> None:
    """Calibration leaves out the layers with a window."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny(name, num_hidden_layers=3, layer_types=types)
    text, spec = ids(1, 128, 5), CalibrationSpec(windows=1, window=128, sinks=1)
    found = calibrate(model, [text[0].tolist()], spec)
    assert len(found) == 1
    scheme = NuqScheme(kind="nuq", bits=4, block_size=32)
    kv_heads = model.config.num_key_value_heads
    built, _ = build_layers(found, scheme, spec.outlier_fractions, kv_heads)
    qm = quantized(model, scheme, built)
    for protocol in ("A", "B"):
        logits = feed(qm, text, None, [64, 1, 63], protocol)[0][0]
        assert 0 < relative_error(logits, alone(model, text[0])) < 0.08


def test_a_quantizer_file_holds_the_layers_that_see_all_tokens(tmp_path: Path) -> None:
    model, scheme = tiny("gemma3"), NuqScheme(kind="nuq", bits=3, block_size=32)
    tables = narrow_tables(scheme, 2, 16, 2)
    file = save_made_quantizer(tmp_path / "one.json", scheme, "0", tables[:1])
    qm = load_quantized_model(model, quantizer=file)
    expected = fed(model, quantized(model, scheme, tables[:1]).new_cache())
    assert torch.equal(fed(model, qm.new_cache()), expected)
    file = save_made_quantizer(tmp_path / "two.json", scheme, "0", tables)
    with pytest.raises(UserError, match="is for 2 layers of 2 x 16, the model has 1 that see all"):
        load_quantized_model(model, quantizer=file)


def test_a_saved_model_loads_generates_and_is_measured(tmp_path: Path) -> None:
    tiny("gemma3", vocab_size=512).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    qm = load_quantized_model(tmp_path, Fp8Scheme(kind="fp8", block_size=16), device="cpu")
    assert qm.codecs is not None and len(qm.codecs) == 1
    assert qm.kinds.windows == (WINDOW, None)
    measured = measure_windows(qm, ids(1, 64), "B", 32)
    plain = measure_windows(
        load_quantized_model(qm.model, Fp16Scheme(kind="fp16")), ids(1, 64), "B", 32
    )
    assert relative_error(measured.nll, plain.nll) < 0.01


def test_a_family_that_caps_scores_is_loaded_with_an_implementation_that_does(
    tmp_path: Path,
) -> None:
    tiny("gemma2", vocab_size=512).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    qm = load_quantized_model(tmp_path, device="cpu")
    assert qm.model.config._attn_implementation == "eager"


@pytest.mark.feature("prompt lookup", "gemma3+windows")
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_generation_over_the_window(options: dict[str, Any]) -> None:
    """Guessed tokens are taken back; without guesses, prompts of a batch are of several lengths."""
    model = tiny("gemma3", initializer_range=0.3)
    qm = quantized(model, EXACT)
    rows, tokens, mask = ragged([70, 41], "left")
    if options:
        tokens = torch.cat((rows[0], rows[0], rows[0]))[None]
        mask = torch.ones_like(tokens)
    given = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 40, **GREEDY}
    found = model.generate(**given, past_key_values=qm.new_cache(), **options)
    assert torch.equal(found, model.generate(**given))


def test_bits_are_those_of_allocated_rings_and_of_tokens_in_reach() -> None:
    model = tiny("gemma3")
    cache = quantized(model, EXACT).new_cache()
    heads, dim, calls = 2, 16, []
    window, packed = cache.layers
    assert isinstance(window, WindowLayer)
    for size in (20, 1, 30, 1, 60, 1, 1):
        step(model, cache, ids(2, size))
        calls.append([size, size])
        assert window.ring is not None
        held = sum(x.untyped_storage().nbytes() for x in window.ring)
        assert window.nbytes == held == window_footprint(WINDOW, heads, dim, calls).total
        assert cache_nbytes(cache) == held + packed.store.nbytes
        tokens = cache.get_seq_length()
        seen = tokens + min(tokens, WINDOW - 1)
        assert cache_elements(cache) == 2 * 2 * heads * dim * seen
    assert window_footprint(WINDOW, 1, 1, calls).total == 2 * 2 * 2 * (WINDOW + ROLLBACK)


def test_the_baseline_holds_a_window_where_the_model_has_one() -> None:
    model = tiny("gemma3")
    cache = quantized(model, Fp16Scheme(kind="fp16")).new_cache()
    step(model, cache, ids(2, 90))
    columns = 90 + WINDOW - 1
    assert cache_nbytes(cache) == 2 * 2 * 2 * 2 * 16 * columns
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    assert cache_elements(cache, mask) == 2 * 2 * 16 * (150 + 2 * (WINDOW - 1))
    assert cache_elements(cache) == 2 * 2 * 2 * 16 * columns


def test_copies_joined_caches_and_chosen_sequences() -> None:
    model = tiny("gemma3")
    qm, tokens, more = quantized(model, EXACT), ids(1, 100), ids(1, 20, 1)
    parts = [tokens[:, :40], tokens]
    caches = [qm.new_cache() for _ in parts]
    for cache, part in zip(caches, parts, strict=True):
        step(model, cache, part)
    copies = [cache.copy() for cache in caches]
    step(model, copies[1], ids(1, 90, 2))  # as many as its rings hold
    joined = join_caches(caches)
    joined.batch_select_indices(torch.tensor([1, 0, 1]))
    joined.batch_repeat_interleave(2)
    mask = torch.ones(6, 120, dtype=torch.long)
    mask[2:4, :60] = 0
    positions = (mask.cumsum(1) - 1)[:, 100:]
    with torch.inference_mode():
        found = model(
            input_ids=more.expand(6, -1),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=joined,
        ).logits
    for b, part in enumerate([tokens] * 2 + [tokens[:, :40]] * 2 + [tokens] * 2):
        expected = alone(model, torch.cat((part, more), 1)[0])[part.shape[1] :]
        torch.testing.assert_close(found[b], expected, **CLOSE)
    again = step(model, copies[0], more)  # neither joining nor the other copy touched it
    expected = alone(model, torch.cat((tokens[:, :40], more), 1)[0])[40:]
    torch.testing.assert_close(again[0], expected, **CLOSE)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
def test_kvquants_own_procedure(name: str) -> None:
    """It gives what `nuq` gives with the same tables, in all uses that it has."""
    model, reference = tiny(name), KvquantRefScheme(kind="kvquant-ref", bits=4, sinks=1)
    nuq = NuqScheme(kind="nuq", bits=4, sinks=1, block_size=32, outliers=reference.outliers)
    tables = narrow_tables(nuq, 2, 16, 1)
    caches = [quantized(model, spec, tables) for spec in (reference, nuq)]
    every: list[tuple[str, Any]] = [*((use, "A") for use in USES), ("chunks and steps", "B")]
    for use, protocol in every:
        found, expected = (USES[use](model, qm.new_cache(protocol)) for qm in caches)
        assert relative_error(found, expected) < 1e-4
    cache = caches[0].new_cache()
    step(model, cache, ids(2, 50))
    copied = cache.copy()
    cache.batch_repeat_interleave(2)
    found = step(model, cache, ids(2, 9, 1).repeat_interleave(2, 0))
    torch.testing.assert_close(found[::2], found[1::2])  # experts add up tokens in some order
    torch.testing.assert_close(step(model, copied, ids(2, 9, 1)), found[::2])
    window = next(layer for layer in copied.layers if isinstance(layer, WindowLayer))
    packed = 2 * 2 * 16 * 2 * 59
    assert window.nbytes > 0 and cache_elements(copied) == packed + 2 * 2 * 16 * 2 * (WINDOW - 1)
    copied.reset()
    assert window.nbytes == 0 and copied.batch_size == -1
    torch.testing.assert_close(
        fed(model, copied), USES["chunks and steps"](model, caches[0].new_cache())
    )
    with pytest.raises(UserError, match="position_ids: a cache of kind 'kvquant-ref' with sliding"):
        model(
            input_ids=ids(1, 9),
            position_ids=torch.arange(5, 14)[None],
            past_key_values=caches[0].new_cache(),
        )


def test_a_model_of_windows_alone_quantizes_nothing_and_says_so() -> None:
    model = tiny("mistral")
    with pytest.warns(UserWarning, match=r"\(sliding_window: 24\), .* 'nuq' quantizes nothing"):
        qm = load_quantized_model(model, NuqScheme(kind="nuq", bits=3))
    cache = qm.new_cache()
    expected = fed(model, dynamic(model))
    torch.testing.assert_close(fed(model, cache), expected, **CLOSE)
    (refusal,) = cache.step_refusals(torch.device("cpu"))
    assert refusal.startswith("model: all layers have a sliding window")
    with pytest.raises(UserError, match=r"layer: 1 has a sliding window, which is kept in 16"):
        cache.key_outliers(1)
    with pytest.raises(UserError, match=r"\(sliding_window: 24\), .* there is nothing to calibr"):
        calibrate(model, [ids(1, 64)[0].tolist()], CalibrationSpec(windows=1, window=64))


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_without_an_earlier_token_is_refused(window: int) -> None:
    model = tiny("gemma3", sliding_window=window)
    with pytest.raises(UserError, match=f"sliding_window: {window} tokens leave no earlier one"):
        quantized(model, EXACT)


def test_caches_that_do_not_know_a_kind_of_layer_are_refused() -> None:
    model = tiny("gemma3")
    quantized(model, EXACT)
    with pytest.raises(UserError, match=r"all layers have a sliding window, .* 'kvquant-ref'"):
        quantized(tiny("mistral"), KvquantRefScheme(kind="kvquant-ref", bits=4))
    cache = quantized(tiny("gemma3", sliding_window=12), EXACT).new_cache()
    with pytest.raises(UserError, match="cache: was made for another sliding_window than the mod"):
        step(model, cache, ids(1, 9))
    local = {**BASES, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    other = quantized(tiny("gemma3", rope_parameters=local), EXACT).new_cache()
    with pytest.raises(UserError, match="cache: was made for a model with another rotary embed"):
        step(model, other, ids(1, 9))
    capped = tiny("gemma2")
    quantized(capped, EXACT)
    cache = quantized(tiny("gemma2", attn_logit_softcapping=2.0), EXACT).new_cache()
    with pytest.raises(UserError, match="cache: was made for another attn_logit_softcapping than"):
        step(capped, cache, ids(1, 9))


def test_kernels_know_the_cap() -> None:
    """That they follow it is tested where they are."""
    model = tiny("gemma2")
    cache = quantized(model, EXACT).new_cache()
    step(model, cache, ids(1, 40))
    shape = cache._planner._stored_shape()
    assert shape is not None and shape.soft_cap == 0.2
    assert shape.decode_shape.soft_cap == 0.2
    for limits in (cuda_decode, triton_past):
        of_cap = set(limits(shape)) - set(limits(replace(shape, soft_cap=None)))
        assert not of_cap


def test_rotary_tables_by_type_of_layer() -> None:
    model = tiny("gemma3")
    kinds = layer_kinds(model.model)
    assert (kinds.full_rope, kinds.window_rope) == ("full_attention", "sliding_attention")
    assert (kinds.full, kinds.window, kinds.unreached) == ([1], WINDOW, None)
    assert position_limit(model.config) == 4 * 512
    assert static_rope(model, "full_attention")
    rotary = model.model.rotary_emb
    assert same_angles(rotary, tiny("gemma3").model.rotary_emb)
    assert not same_angles(rotary, tiny("ministral").model.rotary_emb)


def test_a_window_beyond_the_models_length_keeps_its_own_rotary_table() -> None:
    """Layers that see all tokens share a table, so others stay layers with a window."""
    model = tiny("gemma3", sliding_window=4 * 512)
    qm = quantized(model, EXACT)
    assert (qm.kinds.windows, qm.kinds.unreached) == ((4 * 512, None), None)
    assert (qm.kinds.full_rope, qm.kinds.window_rope) == ("full_attention", "sliding_attention")
    expected = fed(model, dynamic(model))
    torch.testing.assert_close(fed(model, qm.new_cache()), expected, **CLOSE)
    types = ["sliding_attention"] * 2
    alike = layer_kinds(tiny("gemma3", sliding_window=4 * 512, layer_types=types).model)
    assert (alike.full_rope, alike.unreached) == ("sliding_attention", 4 * 512)


def test_caches_of_two_models_of_windows_alone_are_not_joined() -> None:
    """They have no codecs that would tell them apart."""
    caches = []
    for theta in (10000.0, 500.0):
        model = tiny("mistral", rope_parameters={"rope_type": "default", "rope_theta": theta})
        caches.append(quantized(model, EXACT).new_cache())
        step(model, caches[-1], ids(1, 20))
    with pytest.raises(UserError, match="caches: they are of different models"):
        join_caches(caches)
    assert len(join_caches([caches[0], caches[0].copy()]).lengths) == 2


def test_a_window_that_only_the_mask_of_a_layer_has() -> None:
    """SmolLM3 masks by `layer_types`, whatever `use_sliding_window` tells its attention."""
    given: dict[str, Any] = {**ALTERNATING, "use_sliding_window": False, "no_rope_layers": [1, 1]}
    model = tiny_model("smollm3", **given)
    sharpen(model)
    qm = quantized(model, EXACT)
    assert qm.kinds.windows == (WINDOW, None)
    torch.testing.assert_close(fed(model, qm.new_cache()), fed(model, dynamic(model)), **CLOSE)


def test_a_plain_model_has_one_kind_of_layers() -> None:
    found: QuantizedModel = quantized(tiny_model(), EXACT)
    assert found.kinds.windows == (None, None)
    assert (found.kinds.full_rope, found.kinds.window_rope) == (None, None)
    plan = found.new_cache().begin_forward(1, 4, None, torch.device("cpu"))
    assert plan.window is None
