"""The cache that is allocated once: the growing one's numbers, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.cache.footprint import cache_nbytes
from kvquant.study.schemes import Fp16StaticScheme
from tests.support.caches import feed, quantized
from tests.support.models import tiny_model


def test_it_is_the_growing_cache_without_reallocation() -> None:
    qm = quantized(tiny_model(), Fp16StaticScheme(kind="fp16-static", room=20))
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    found, cache = feed(qm, ids, None, [40, 1, 1, 18])
    grown = qm.baseline_cache()
    logits, at = [], 0
    with torch.inference_mode():
        for size in (40, 1, 1, 18):
            part = ids[:, at : at + size]
            logits.append(qm.model(input_ids=part, past_key_values=grown, use_cache=True).logits)
            at += size
    assert torch.equal(found, torch.cat(logits, 1))
    assert cache_nbytes(cache) == 2 * 2 * 2 * 2 * 16 * 60 * 2  # layers, K and V, batch, heads
    place = cache.layers[0].keys.data_ptr()
    with torch.inference_mode():  # the room is used up
        qm.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() != place
    assert torch.equal(cache.layers[0].keys[:, :, :60], grown.layers[0].keys)


def test_writes_stay_in_place_while_there_is_room() -> None:
    qm = quantized(tiny_model(), Fp16StaticScheme(kind="fp16-static", room=8))
    ids = torch.randint(1, 97, (1, 10))
    _, cache = feed(qm, ids, None, [4])
    place = cache.layers[1].values.data_ptr()
    with torch.inference_mode():
        for _ in range(8):
            qm.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert cache.layers[1].values.data_ptr() == place


@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("later", [torch.no_grad, torch.enable_grad])
def test_a_prompt_in_inference_mode_goes_on_outside(reserved: bool, later: Any) -> None:
    """As `generate` does, which runs in `torch.no_grad`."""
    qm = quantized(tiny_model(), Fp16StaticScheme(kind="fp16-static", room=8))
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    _, cache = feed(qm, ids[:, :50], None, [40, 10])
    if reserved:
        cache.reserve(20)
    with later():
        parts = [qm.model(part, past_key_values=cache).logits for part in ids[:, 50:].split(5, 1)]
    want, _ = feed(qm, ids, None, [40, 10, 5, 5])
    torch.testing.assert_close(torch.cat(parts, 1), want[:, 50:])
