"""The report of backends agrees with what a cache of the scheme asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels import backends
from kvquant.kernels.backends import DeviceFacts
from kvquant.kernels.cache_shape import CacheShape
from kvquant.quantization.nuq import fit
from kvquant.schemes import backend_report as module
from kvquant.schemes.allocated import AllocatedCodec
from kvquant.schemes.backend_report import backend_report
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import AllocatedScheme, Fp16Scheme, KiviScheme, NuqScheme
from tests.support.quantizers import random_allocated

NUQ = NuqScheme(kind="nuq", bits=3, sinks=2, block_size=128)
AFTER_ROPE = NUQ.model_copy(update={"keys": "after-rope"})
MODEL: dict[str, Any] = {
    "head_dim": 128, "kv_heads": 8, "query_heads": 32, "dtype": torch.bfloat16,
}  # fmt: skip


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    facts = DeviceFacts("cuda", capability=(9, 0))
    monkeypatch.setattr(backends, "device_facts", lambda device: facts)
    monkeypatch.setenv("KVQUANT_KERNELS", "auto")
    return torch.device("cuda")


def test_a_gpu_gets_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = backend_report(NUQ, **MODEL, device=on_gpu(monkeypatch))
    assert [s.backend for s in found.values()] == ["cuda", "cuda", "triton"]
    assert [line for s in found.values() for line in s.lines()] == [
        "quantize and pack: cuda", "decode step: cuda", "attention over a packed past: triton",
    ]  # fmt: skip


def test_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_gpu(monkeypatch)
    found = backend_report(NUQ, **MODEL, device=device, protocol="B", static_rope=False)
    assert [r.split(":")[0] for r in found["decode"].reasons("cuda")] == [
        "protocol", "static_rope", "kept_rope",
    ]  # fmt: skip
    kivi = backend_report(KiviScheme(kind="kivi", bits=4), **MODEL, device=device)
    assert {s.backend for s in kivi.values()} == {"pytorch"}
    assert "'kivi'" in kivi["pack"].reasons("cuda")[0]
    assert backend_report(Fp16Scheme(kind="fp16"), **MODEL, device=device) == {}


def test_keys_after_rope_are_packed_by_kernels_and_read_by_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = backend_report(AFTER_ROPE, **MODEL, device=on_gpu(monkeypatch))
    assert [s.backend for s in found.values()] == ["cuda", "pytorch", "pytorch"]
    for operation in ("decode", "past"):
        for _, (reason,) in found[operation].refused:
            assert reason.startswith("rotated_keys: keys are stored after RoPE, and kernels")


@pytest.mark.parametrize("spec", [NUQ, AFTER_ROPE], ids=lambda spec: spec.keys)
def test_the_shape_is_the_codecs(spec: NuqScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CacheShape] = []
    monkeypatch.setattr(module, "report", lambda shape, device: asked.append(shape))
    backend_report(spec, **MODEL, device=torch.device("cpu"))
    levels = fit("nf", 3)
    tables = LayerQuantizer(torch.zeros(8, 128), torch.ones(8, 128), levels, levels)
    codec = NuqCodec(spec, tables)
    assert codec.cache_shape(128, 8, 32, torch.bfloat16) == replace(asked[0], query_dtype=None)


@pytest.mark.parametrize("value_range", ["token", "token-head"])
def test_the_shape_of_allocated_codes_is_the_codecs(
    value_range: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[CacheShape] = []
    spec = AllocatedScheme(
        kind="allocated", sinks=2, block_size=128, outliers=0.01, value_range=value_range
    )
    found = backend_report(spec, **MODEL, device=on_gpu(monkeypatch))
    assert found["pack"].backend == "cuda"
    monkeypatch.setattr(module, "report", lambda shape, device: asked.append(shape))
    backend_report(spec, **MODEL, device=torch.device("cpu"))
    codec = AllocatedCodec(spec, random_allocated(8, 128))
    codec.expect_rotated_values()  # as those of a model that is loaded from files
    assert codec.cache_shape(128, 8, 32, torch.bfloat16) == replace(asked[0], query_dtype=None)
