"""The cache inside real attention: chunks, batches, padding, families, protocols.

Also covers: cache.attending, cache.footprint, cache.interface.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.schemes import NuqScheme
from tests.support.caches import GREEDY, SPECS, feed, quantized, stored
from tests.support.models import tiny_model


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{s.bits}")
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["gqa", "mha"])
def test_chunks_store_the_same_as_one_shot_in_protocol_b(spec: Any, kv_heads: int) -> None:
    qm = quantized(tiny_model(kv_heads=kv_heads), spec)
    ids = torch.randint(0, 97, (1, 150))
    whole, one = feed(qm, ids, None, [150], "A")
    assert whole.shape[1] == 150
    length = one.get_seq_length()
    assert length == 150
    # the first layer's keys and values do not depend on what attention reads
    _, parts = feed(qm, ids, None, [37, 1, 1, 64, 47], "A")
    for a, b in zip(stored(one, 0)[:2], stored(parts, 0)[:2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    assert cache_elements(one) == cache_elements(parts) == 2 * 2 * kv_heads * 16 * 150


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{s.bits}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("proto", ["A", "B"])
def test_a_sequence_in_a_ragged_batch_equals_itself_alone(spec: Any, side: str, proto: Any) -> None:
    qm = quantized(tiny_model(), spec)
    lengths = [130, 71, 1, 33]
    rows = [torch.randint(0, 97, (n,)) for n in lengths]
    ids, mask = torch.zeros(4, 130, dtype=torch.long), torch.zeros(4, 130, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(130 - len(row), 130) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    logits, cache = feed(qm, ids, mask, [130], proto)
    assert cache_elements(cache) == 2 * 2 * 2 * 16 * sum(lengths)
    for b, row in enumerate(rows):
        alone, single = feed(qm, row[None], None, [len(row)], proto)
        shown = mask[b].bool()
        torch.testing.assert_close(logits[b, shown], alone[0], atol=2e-3, rtol=1e-3)
        for a, c in zip(stored(cache, b)[:2], stored(single, 0)[:2], strict=True):
            torch.testing.assert_close(a, c, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{s.bits}")
def test_a_first_call_is_read_back_at_once_or_in_pieces(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qm = quantized(tiny_model(), spec)
    ids = torch.randint(0, 97, (3, 150))
    found = []
    for most in (1 << 26, 0):
        monkeypatch.setattr("kvquant.cache.past_reader.MAX_READ_BACK", most)
        found.append(feed(qm, ids, None, [150], "B"))
    (at_once, one), (in_pieces, other) = found
    torch.testing.assert_close(at_once, in_pieces, atol=1e-4, rtol=1e-4)
    for a, b in zip(stored(one, 2)[:2], stored(other, 2)[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_all_outliers_is_the_unquantized_model(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(0, 97, (2, 90))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    qm = quantized(model, NuqScheme(kind="nuq", bits=2, outliers=1.0, block_size=32))
    for proto, chunks in (("A", [90]), ("B", [90]), ("A", [50, 1, 39]), ("B", [33, 57])):
        logits, _ = feed(qm, ids, None, chunks, proto)
        torch.testing.assert_close(logits, expected, atol=5e-3, rtol=5e-3)


def test_left_padded_decode_follows_the_unquantized_model() -> None:
    model = tiny_model()
    qm = quantized(model, NuqScheme(kind="nuq", bits=2, outliers=1.0, block_size=32))
    prompts = torch.randint(1, 97, (2, 40))
    mask = torch.ones_like(prompts)
    mask[1, :13] = 0
    settings = {**GREEDY, "max_new_tokens": 8}
    plain = model.generate(prompts, attention_mask=mask, **settings)
    ours = model.generate(prompts, attention_mask=mask, past_key_values=qm.new_cache(), **settings)
    assert torch.equal(plain, ours)


def test_beam_search_reorders_the_cache() -> None:
    model = tiny_model()
    qm = quantized(model, NuqScheme(kind="nuq", bits=2, outliers=1.0, block_size=32))
    prompts = torch.randint(1, 97, (2, 40))
    settings = {**GREEDY, "max_new_tokens": 6, "num_beams": 3}
    plain = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    ours = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=qm.new_cache(),
        **settings,
    )
    assert torch.equal(plain, ours)


def test_bytes_fall_with_bits_and_are_those_of_the_tensors() -> None:
    model = tiny_model()
    ids = torch.randint(0, 97, (1, 400))
    sizes = []
    for bits in (4, 3, 2):
        qm = quantized(model, NuqScheme(kind="nuq", bits=bits, block_size=32))
        _, cache = feed(qm, ids, None, [400], "A")
        sizes.append(cache_nbytes(cache))
    assert sizes[0] > sizes[1] > sizes[2]
    _, baseline = None, qm.baseline_cache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=baseline, use_cache=True)
    assert 8 * cache_nbytes(baseline) / cache_elements(baseline) == 16.0


def test_errors_name_the_fix() -> None:
    qm = quantized(tiny_model(), SPECS[0])
    with pytest.raises(ValueError, match="protocol"):
        qm.new_cache("C")  # type: ignore[arg-type]
    cache = qm.new_cache()
    with pytest.raises(RuntimeError, match="load_quantized_model"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(ValueError, match="attention_mask"):
        cache.begin_forward(2, 5, torch.ones(2, 4), torch.device("cpu"))
    with pytest.raises(ValueError, match="without a single token"):
        mask = torch.zeros(2, 3)
        cache.begin_forward(2, 3, mask, torch.device("cpu"))
