"""Steps of one size over a static 16-bit cache, against the growing cache."""

from __future__ import annotations

import pytest
import torch

from kvquant.models.static_decoding import StaticDecoder
from kvquant.study.schemes import Fp16StaticScheme
from tests.support.caches import CLOSE, feed, quantized, ragged
from tests.support.models import tiny_model


@pytest.mark.parametrize("lengths", [[40, 40], [30, 7, 19]])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_steps_are_those_of_the_growing_cache(lengths: list[int], family: str, device: str) -> None:
    model = tiny_model(family, heads=4, kv_heads=2).to(device)
    if device == "cuda":
        model = model.half()
    _, ids, mask = ragged(lengths, "left")
    ids, mask = ids.to(device), mask.to(device)
    qm = quantized(model, Fp16StaticScheme(kind="fp16-static", room=2))
    usual = model.config._attn_implementation
    cache = feed(qm, ids, mask, [ids.shape[1]])[1]
    growing = qm.baseline_cache()
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        qm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=growing
        )
    decoder = StaticDecoder(model, cache, mask, 20)
    for step in range(20):
        tokens = torch.full((len(lengths), 1), step + 1, device=device)
        mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        with torch.inference_mode():
            expected = qm.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=growing,
            ).logits[:, -1]
        torch.testing.assert_close(decoder.step(tokens), expected, **CLOSE)
    with pytest.raises(ValueError, match="all steps were made"):
        decoder.step(tokens)
    assert model.config._attn_implementation == usual


def test_what_does_not_fit_the_cache_is_refused() -> None:
    qm = quantized(tiny_model(), Fp16StaticScheme(kind="fp16-static", room=2))
    _, ids, mask = ragged([20, 20], "left")
    cache = feed(qm, ids, None, [20])[1]
    with pytest.raises(ValueError, match=r"mask: has shape \(2, 10\), but the cache holds"):
        StaticDecoder(qm.model, cache, mask[:, :10], 4)
    with pytest.raises(ValueError, match="new_tokens: must be at least 1"):
        StaticDecoder(qm.model, cache, mask, 0)
    with pytest.raises(ValueError, match=r"cache holds \(0, 0\)"):
        StaticDecoder(qm.model, qm.new_cache(), mask, 4)
