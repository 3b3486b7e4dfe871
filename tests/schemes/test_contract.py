"""What every registered scheme kind must do, whoever wrote its cache.

Kinds that are listed nowhere here are tested with the options of :func:`derived`.

Also covers: schemes.kivi, schemes.registry, study.dotted, study.own_schemes, study.peer_schemes,
study.peer_schemes_calibrated, study.scheme_kinds, study.scheme_options,
study.transformers_schemes.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from typing import Any

import pytest
import torch

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.errors import UserError
from kvquant.evaluation.perplexity import measure_windows
from kvquant.models.generation import greedy
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import SCHEME_KINDS, SchemeKind
from kvquant.study.schemes import (
    AllocatedScheme,
    BlockGtqScheme,
    CqScheme,
    Fp8Scheme,
    Fp16Scheme,
    Fp16StaticScheme,
    HfFp8Scheme,
    HfHqqScheme,
    HfQuantoScheme,
    Int4HadamardScheme,
    KiviScheme,
    KvarnScheme,
    KvquantRefScheme,
    NuqScheme,
    TurboQuantScheme,
    WushKvScheme,
)
from tests.support.caches import feed, quantized, ragged
from tests.support.models import tiny_model
from tests.support.quantizers import relative_error


def derived(kind: SchemeKind) -> Any:
    """The kind with its defaults; options without one get the largest value of their choice."""
    schema = kind.options.model_json_schema()
    needed = {name: schema["properties"][name] for name in schema["required"]}
    options = {
        name: option["const"] if "const" in option else max(option["enum"])
        for name, option in needed.items()
    }
    return kind.options.model_validate(options)


def with_others(specs: list[Any], registered: list[SchemeKind]) -> list[Any]:
    """The given schemes, and one of every registered kind that none of them is of."""
    known = {spec.kind for spec in [*specs, *NOT_OURS]}
    return [*specs, *(derived(kind) for kind in registered if kind.name not in known)]


# The model's own cache, and those of transformers (below), which lack some of what ours can do.
NOT_OURS: list[Any] = [
    Fp16Scheme(kind="fp16"),
    HfQuantoScheme(kind="hf-quanto", bits=4),
    HfHqqScheme(kind="hf-hqq", bits=4),
    HfFp8Scheme(kind="hf-fp8"),
]
CHOSEN: list[Any] = [
    AllocatedScheme(kind="allocated", block_size=32),
    AllocatedScheme(kind="allocated", bits=4.3, block_size=32, sinks=0, value_range="token-head"),
    AllocatedScheme(kind="allocated", bits=2.3, block_size=64, outliers=0.0, rotation=False),
    Fp16StaticScheme(kind="fp16-static", room=5),
    NuqScheme(kind="nuq", bits=4, block_size=32),
    NuqScheme(kind="nuq", bits=3, block_size=32, datatype="nf"),
    NuqScheme(kind="nuq", bits=2, block_size=32, sinks=0),
    NuqScheme(kind="nuq", bits=4, block_size=32, keys="after-rope"),
    NuqScheme(kind="nuq", bits=3, block_size=64, sinks=4, keys="after-rope"),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16, sinks=1),
    KiviScheme(kind="kivi", bits=2, group=16, residual=0, sinks=3),
    Fp8Scheme(kind="fp8", block_size=16),
    Fp8Scheme(kind="fp8", block_size=32, scale="none", residual=7),
    TurboQuantScheme(kind="turboquant", bits=4, block_size=16, sinks=1),
    TurboQuantScheme(kind="turboquant", bits=2, block_size=32),
    Int4HadamardScheme(kind="int4-hadamard", block_size=16),
    Int4HadamardScheme(kind="int4-hadamard", block_size=16, sinks=1),
    Fp8Scheme(kind="fp8", block_size=16, sinks=4),
    KvarnScheme(kind="kvarn", bits=4, tile=32, sinks=1),
    KvarnScheme(kind="kvarn", bits=4, value_bits=2, tile=16, sinks=0, residual=16),
    KvarnScheme(kind="kvarn", bits=2, tile=16, sinks=3),
    BlockGtqScheme(kind="block-gtq", bits=4.0, value_bits=4, block_size=16, sinks=1),
    BlockGtqScheme(kind="block-gtq", bits=2.5, value_bits=2, block_size=32, residual=7),
    WushKvScheme(kind="wush-kv", bits=4, sinks=1, residual=0),
    WushKvScheme(kind="wush-kv", bits=3, value_bits=2, block_size=32, sinks=0, residual=7),
    WushKvScheme(kind="wush-kv", bits=4, sinks=16, residual=16),
    CqScheme(kind="cq", bits=4.0, channels=1, block_size=16, sinks=1),
    CqScheme(kind="cq", bits=4.0, channels=2, block_size=16),
    CqScheme(kind="cq", bits=2.0, channels=2, block_size=32, residual=7),
    KvquantRefScheme(kind="kvquant-ref", bits=4, room=5),
    KvquantRefScheme(kind="kvquant-ref", bits=3, outliers=0.0, sinks=0),
    KvquantRefScheme(kind="kvquant-ref", bits=2, sinks=5),
]
OURS = with_others(CHOSEN, list(SCHEME_KINDS.values()))
PACKS_BLOCKS = [kind for kind in SCHEME_KINDS.values() if kind.codec is not None]


def _hf(spec: Any, package: str) -> Any:
    there = importlib.util.find_spec(package) is not None
    return pytest.param(spec, marks=pytest.mark.skipif(not there, reason=f"needs {package}"))


def _has_fp8() -> bool:
    from transformers import cache_utils

    return hasattr(cache_utils, "Fp8QuantizedLayer")


HF = [
    _hf(HfQuantoScheme(kind="hf-quanto", bits=4, group=16, residual=24), "optimum"),
    _hf(HfQuantoScheme(kind="hf-quanto", bits=2, group=16, residual=24), "optimum"),
    _hf(HfHqqScheme(kind="hf-hqq", bits=4, group=16, residual=24), "hqq"),
    _hf(HfHqqScheme(kind="hf-hqq", bits=8, group=16, axis=1, residual=24), "hqq"),
    pytest.param(
        HfFp8Scheme(kind="hf-fp8"),
        marks=pytest.mark.skipif(not _has_fp8(), reason="this transformers has no FP8 cache"),
    ),
]


def name(spec: Any) -> str:
    return f"{spec.kind}{getattr(spec, 'bits', '')}-{getattr(spec, 'sinks', 0)}"


CHOSEN_SINKING: list[Any] = [
    AllocatedScheme(kind="allocated", block_size=32, outliers=0.0),
    NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.0),
    NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.0, keys="after-rope"),
    KiviScheme(kind="kivi", bits=2, group=16, residual=16),
    Fp8Scheme(kind="fp8", block_size=16),
    TurboQuantScheme(kind="turboquant", bits=3, block_size=16),
    Int4HadamardScheme(kind="int4-hadamard", block_size=16),
    KvarnScheme(kind="kvarn", bits=2, tile=16, residual=16),
    BlockGtqScheme(kind="block-gtq", block_size=16),
    WushKvScheme(kind="wush-kv", bits=3, residual=16),
    CqScheme(kind="cq", bits=3.0, channels=2, block_size=16),
]
SINKING = with_others(CHOSEN_SINKING, PACKS_BLOCKS)


@pytest.mark.parametrize("spec", SINKING, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_sinks_are_exact_and_their_bits_are_counted(spec: Any, protocol: str) -> None:
    """Of equal numbers of quantized tokens: 16 bits an element more for each sink, none less."""
    ids = torch.randint(1, 97, (1, 83), generator=torch.Generator().manual_seed(3))
    found = []
    for sinks in (0, 3):
        qm = quantized(tiny_model(), spec.model_copy(update={"sinks": sinks}))
        _, cache = feed(qm, ids[:, : 80 + sinks], None, [80 + sinks], protocol)
        found.append((cache_nbytes(cache), cache_elements(cache)))
        held = cache.layers[0].store.sinks[1]
        assert held.shape[2] == sinks and held.dtype is torch.float16
        if sinks:  # the first layer's values depend on the token alone
            exact = quantized(tiny_model(), Fp16StaticScheme(kind="fp16-static", room=1))
            _, plain = feed(exact, ids[:, :83], None, [83], protocol)
            assert torch.equal(held, plain.layers[0].values[:, :, :3].half())
    elements = 2 * 2 * 2 * 16 * 3
    assert found[1][1] - found[0][1] == elements
    assert found[1][0] - found[0][0] == 2 * elements


def test_every_scheme_that_packs_blocks_takes_sinks() -> None:
    assert {s.kind for s in SINKING} == {kind.name for kind in PACKS_BLOCKS}


@pytest.mark.parametrize("spec", SINKING, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("dim", [12, 20])
def test_a_head_dim_is_refused_before_the_first_call_or_works(spec: Any, dim: int) -> None:
    """Blocks of two kinds could not be packed, which only a call with enough tokens told."""
    model = tiny_model(head_dim=dim)
    try:
        qm = quantized(model, spec)
        for codec in qm.codecs or []:
            codec.check_model(2, dim)
    except UserError as error:
        assert str(dim) in str(error)
        return
    logits, _ = feed(qm, torch.randint(1, 97, (1, 140)), None, [100, 40])
    assert logits.isfinite().all()


def test_every_kind_is_tested() -> None:
    assert {s.kind for s in [*OURS, *NOT_OURS]} == set(SCHEME_KINDS)


@pytest.mark.parametrize("kind", SCHEME_KINDS.values(), ids=lambda kind: kind.name)
def test_a_registration_names_what_there_is(kind: SchemeKind) -> None:
    assert kind.label and kind.summary
    assert set(kind.protocols) <= {"A", "B"} and kind.protocols
    for named in (kind.codec, kind.caches):
        assert named is None or callable(load(named))
    spec = derived(kind)
    assert spec.nominal_bits <= 16 and spec.registration is kind
    if kind.calibrated:
        with pytest.raises(UserError, match=f"kind '{kind.name}' needs a quantizer file"):
            build_codecs(spec, 2, None)
            build_caches(spec, ModelShape(2, 2, 16), None)
    if not kind.quantizes:
        assert spec.nominal_bits == 16


@pytest.mark.thinned(5)
@pytest.mark.parametrize("spec", OURS, ids=name)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_sequence_in_a_ragged_batch_equals_itself_alone(
    spec: Any, side: str, protocol: str
) -> None:
    qm = quantized(tiny_model(), spec)
    lengths = [90, 41, 1, 33]
    rows, ids, mask = ragged(lengths, side)
    logits, cache = feed(qm, ids, mask, [60, 30] if side == "left" else [90], protocol)
    assert cache_elements(cache, mask) == 2 * 2 * 2 * 16 * sum(lengths)
    for b, row in enumerate(rows):
        width = int((mask[b, :60] == 1).sum()) if side == "left" else len(row)
        chunks = [c for c in (width, len(row) - width) if c]
        alone, _ = feed(qm, row[None], None, chunks, protocol)
        torch.testing.assert_close(logits[b, mask[b].bool()], alone[0], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("spec", OURS, ids=name)
def test_chunks_equal_one_call_in_protocol_b(spec: Any) -> None:
    if spec.kind in ("kivi", "kvarn") or not spec.quantizes or getattr(spec, "residual", False):
        pytest.skip("its tokens are not quantized one by one")
    qm = quantized(tiny_model(), spec)
    ids = torch.randint(0, 97, (1, 80), generator=torch.Generator().manual_seed(2))
    whole, _ = feed(qm, ids, None, [80], "B")
    parts, _ = feed(qm, ids, None, [37, 1, 1, 16, 25], "B")
    torch.testing.assert_close(whole, parts, atol=5e-3, rtol=5e-3)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_generate_with_left_padding(spec: Any) -> None:
    qm = quantized(tiny_model(), spec)
    _, ids, mask = ragged([54, 27], "left")
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"attention_mask": mask, "max_new_tokens": 16}
    plain = qm.model.generate(ids, past_key_values=qm.baseline_cache(), **settings)
    cache = qm.new_cache()
    ours = qm.model.generate(ids, past_key_values=cache, **settings)
    assert ours.shape == plain.shape == (2, 70)
    # the first answer token is the prompt's alone, which attends in full precision
    assert torch.equal(ours[:, 54], plain[:, 54])
    assert cache.get_seq_length() == 69


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_padded_steps_are_near_the_unquantized_ones(spec: Any) -> None:
    qm = quantized(tiny_model(), spec)
    _, ids, mask = ragged([60, 43], "left")
    chunks = [40, 12, *[1] * 8]
    found, _ = feed(qm, ids, mask, chunks)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        exact = qm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    seen = mask.bool()
    seen[:, :40] = False
    error = relative_error(found[seen], exact[seen]) ** 0.5
    bits = min(spec.nominal_bits, 8)
    assert error < {8: 0.02, 4: 0.1, 3: 0.2, 2: 0.3}[bits]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_beams_reorder_the_cache(spec: Any) -> None:
    qm = quantized(tiny_model(), spec)
    _, ids, mask = ragged([40, 27], "left")
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3}
    plain = qm.model.generate(ids, past_key_values=qm.baseline_cache(), **settings)
    ours = qm.model.generate(ids, past_key_values=qm.new_cache(), **settings)
    assert ours.shape == plain.shape
    if getattr(spec, "bits", 16) >= 8:
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_chosen_sequences_go_on_as_before(spec: Any) -> None:
    qm = quantized(tiny_model(), spec)
    ids = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(5))
    token = torch.tensor([[3], [4], [5]])
    with torch.inference_mode():
        cache = qm.new_cache()
        qm.model(input_ids=ids, past_key_values=cache, use_cache=True)
        other = copy.deepcopy(cache)
        expected = qm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
        order = torch.tensor([2, 0])
        other.batch_select_indices(order)
        found = qm.model(input_ids=token[order], past_key_values=other, use_cache=True).logits
    torch.testing.assert_close(found, expected[order], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_guessed_tokens_are_taken_back_or_refused_in_one_line(spec: Any) -> None:
    """Caches that cannot be cut ended `generate` with a NotImplementedError that named no fix."""
    qm = quantized(tiny_model(), spec)
    prompt = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(5)).repeat(1, 3)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"max_new_tokens": 20, "prompt_lookup_num_tokens": 4}
    cache = qm.new_cache()
    if spec.kind == "kvquant-ref" or spec.kind.startswith("hf-"):
        with pytest.raises(UserError, match=r"^crop: .*prompt lookup.*another kind of scheme"):
            qm.model.generate(prompt, past_key_values=cache, **settings)
        return
    found = qm.model.generate(prompt, past_key_values=cache, **settings)
    assert found.shape == (1, 80) and cache.get_seq_length() < 80


@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_perplexity_and_answers_run(spec: Any) -> None:
    qm = quantized(tiny_model(), spec)
    ids = torch.randint(1, 97, (1, 96), generator=torch.Generator().manual_seed(6))
    for protocol in spec.protocols:
        found = measure_windows(qm, ids, protocol, 24, kl=True)
        assert found.kl is not None and found.nll.shape == found.kl.shape == (1, 95)
        assert -1e-6 < float(found.kl.mean()) < 0.2  # a random model is nearly indifferent
        assert bool(found.kl.any()) == spec.quantizes
    answers = greedy(qm, [[3] * 30, [5] * 11], 4, batch_size=2, eos_ids=[])
    assert [len(a) for a in answers.tokens] == [4, 4]
    assert answers.cache_elements == 2 * 2 * 2 * 16 * 41


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spec", [Fp16Scheme(kind="fp16"), *OURS, *HF], ids=name)
def test_windows_of_a_batch_are_measured_as_one_at_a_time(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm = quantized(tiny_model(), spec)
    ids = torch.randint(1, 97, (3, 150), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr("kvquant.evaluation.perplexity.LOGIT_POSITIONS", 40)
    for protocol in spec.protocols:
        together = measure_windows(qm, ids, protocol, 64, kl=True)
        alone = [measure_windows(qm, one[None], protocol, 64, kl=True) for one in ids]
        nll, kl = (torch.cat([getattr(a, x) for a in alone]) for x in ("nll", "kl"))
        same = torch.allclose(together.nll, nll, atol=2e-4, rtol=1e-4)
        assert together.kl is not None
        same &= torch.allclose(together.kl, kl, atol=2e-4, rtol=1e-3)
        same &= together.cache_bytes == sum(a.cache_bytes for a in alone)
        # along axis 1, HQQ's levels differ by less than shows here
        assert same == (spec.batches or getattr(spec, "axis", 0) == 1)
        assert together.cache_elements == sum(a.cache_elements for a in alone)


@pytest.mark.parametrize("spec", [Fp16Scheme(kind="fp16"), *OURS, *HF], ids=name)
def test_caches_are_gone_after_a_measurement(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector, which would let a GPU fill up first."""
    qm = quantized(tiny_model(), spec)
    caches: list[Any] = []
    plain = qm.new_cache

    def seen(protocol: Any) -> Any:
        cache = plain(protocol)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(qm, "new_cache", seen)
    gc.disable()
    try:
        measure_windows(qm, torch.randint(1, 97, (2, 40)), spec.protocols[0], 20, kl=True)
        greedy(qm, [[3] * 30, [5] * 11], 4, batch_size=2, eos_ids=[])
        assert [ref() for ref in caches] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("spec", [*OURS, *HF], ids=name)
def test_bytes_are_those_of_long_contexts(spec: Any) -> None:
    """Bits an element at 480 tokens lie between the nominal width and 16 bits of tail on top."""
    model = tiny_model()
    qm = quantized(model, spec)
    ids = torch.randint(1, 97, (2, 480), generator=torch.Generator().manual_seed(8))
    _, cache = feed(qm, ids, None, [480])
    bits = 8 * cache_nbytes(cache) / cache_elements(cache)
    width = spec.nominal_bits
    assert width <= bits < (20 if spec.kind in ("kvquant-ref", "fp16-static") else width + 6)
