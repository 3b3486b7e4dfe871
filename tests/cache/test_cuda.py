"""The cache on a GPU: kernels against the PyTorch path, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvquant.models.loading import QuantizedModel
from kvquant.study.schemes import KiviScheme, NuqScheme
from tests.support.caches import feed, quantized
from tests.support.models import tiny_model
from tests.support.quantizers import random_quantizer

CAP: dict[str, Any] = {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 4}


def on_gpu(
    spec: Any, dtype: torch.dtype = torch.float32, family: str = "llama", **options: Any
) -> QuantizedModel:
    return quantized(tiny_model(family, **options).to(dtype).cuda(), spec)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("proto", ["A", "B"])
@pytest.mark.parametrize(
    ("bits", "family"),
    [(2, "llama"), (3, "llama"), (4, "llama"), (3, "gemma2"), (3, "gpt_oss")],
)
def test_kernels_and_pytorch_give_the_same(
    bits: int, family: str, proto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = CAP if family == "gemma2" else {}
    if family != "llama":
        options = {**options, "head_dim": 64}
    spec = NuqScheme(kind="nuq", bits=bits, block_size=32)
    qm = on_gpu(spec, family=family, **options)
    for codec in qm.codecs or []:
        codec.widen(50.0)  # biases bring keys out of the ranges that these tables have
    ids = torch.randint(0, 97, (3, 150), device="cuda")
    mask = torch.ones_like(ids)
    # single columns are tokens: on a GPU nobody looks at a step's mask before it is taken
    mask[1, :60], mask[2, :96] = 0, 0
    found = []
    for kernels in ("triton", "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        logits, _ = feed(qm, ids, mask, [97, 1, 1, 51], proto)
        found.append(torch.where(mask[..., None].bool(), logits, 0))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("proto", ["A", "B"])
def test_keys_after_rope_are_packed_by_kernels_and_read_by_pytorch(
    proto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(heads=4, kv_heads=2, head_dim=64).half().cuda()
    tables = [
        random_quantizer(2, 64, 3, zero=0.05, scale=(0.5, 0.8), seed=layer) for layer in range(2)
    ]
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, keys="after-rope")
    qm = quantized(model, spec, tables)
    ids = torch.randint(0, 97, (3, 150), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :60], mask[2, :96] = 0, 0
    found = []
    for kernels in ("auto", "pytorch"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        logits, cache = feed(qm, ids, mask, [97, 1, 1, 51], proto)
        cache.settle()
        assert cache.layers[0].store.packed_by_kernels == (kernels == "auto")
        reasons = cache.step_refusals(ids.device)
        assert any(reason.startswith("rotated_keys: ") for reason in reasons)
        found.append(torch.where(mask[..., None].bool(), logits, 0))
    torch.testing.assert_close(found[0], found[1], atol=5e-3, rtol=5e-3)


def test_padding_in_a_step_is_reported_later() -> None:
    qm = on_gpu(NuqScheme(kind="nuq", bits=4, block_size=32))
    ids = torch.randint(0, 97, (2, 120), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :101] = 0
    with pytest.raises(ValueError, match="a decode step hid a stored token, showed padding"):
        feed(qm, ids, mask, [97, 1, 1, 1, 20], "A")[1].settle()


@pytest.mark.parametrize(
    "spec",
    [
        NuqScheme(kind="nuq", bits=2, outliers=1.0, block_size=32),
        NuqScheme(kind="nuq", bits=4, block_size=32),
        NuqScheme(kind="nuq", bits=4, block_size=32, keys="after-rope"),
        KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    ],
    ids=["exact", "nuq4", "nuq4-after-rope", "kivi4"],
)
def test_generate_in_half_precision(spec: Any) -> None:
    qm = on_gpu(spec, torch.float16)
    prompts = torch.randint(1, 97, (2, 120), device="cuda")
    mask = torch.ones_like(prompts)
    mask[1, :33] = 0
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = qm.new_cache()
    out = qm.model.generate(prompts, attention_mask=mask, past_key_values=cache, **settings)
    assert out.shape == (2, 160)
    assert cache.lengths == [159, 126]


@pytest.mark.parametrize("kernels", ["auto", "pytorch"])
def test_sequences_that_share_blocks_keep_their_outliers(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys after RoPE are read by PyTorch, whoever packed them; copies of a prompt share blocks."""
    monkeypatch.setenv("KVQUANT_KERNELS", kernels)
    model = tiny_model(heads=4, kv_heads=2, head_dim=64).half().cuda()
    tables = [random_quantizer(2, 64, 3, scale=(0.5, 0.8), seed=layer) for layer in range(2)]
    spec = NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.05, keys="after-rope")
    qm = quantized(model, spec, tables)
    prompt, more = (torch.randint(0, 97, (1, n), device="cuda") for n in (150, 20))
    found = []
    for copies in (1, 5):
        cache = qm.new_cache()
        with torch.inference_mode():
            qm.model(input_ids=prompt, past_key_values=cache)
            cache.batch_repeat_interleave(copies)
            logits = qm.model(input_ids=more.repeat(copies, 1), past_key_values=cache).logits
        cache.settle()
        found.append(logits)
    torch.testing.assert_close(found[1], found[0].expand_as(found[1]), atol=5e-3, rtol=5e-3)
