"""Transformers' caches behind our interface: numbers are theirs, bytes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import cache_utils

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.errors import UserError
from kvquant.models.loading import load_quantized_model
from kvquant.schemes import hf_quantized
from kvquant.study.schemes import HfFp8Scheme, HfHqqScheme, HfQuantoScheme, SchemeSpec
from tests.support.caches import feed, quantized, ragged
from tests.support.models import save_tiny, tiny_model

QUANTO = HfQuantoScheme(kind="hf-quanto", bits=4, group=16, residual=24)


def test_the_numbers_are_those_of_transformers() -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = tiny_model().half()
    qm = quantized(model, QUANTO)
    ids = torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(0))
    theirs = cache_utils.QuantizedCache(
        "quanto", model.config, nbits=4, axis_key=0, axis_value=0, q_group_size=16,
        residual_length=24,
    )  # fmt: skip
    chunks = [40, 1, 30, 1, 18]
    found, _ = feed(qm, ids, None, chunks)
    logits, at = [], 0
    with torch.inference_mode():
        for size in chunks:
            part = ids[:, at : at + size]
            logits.append(model(input_ids=part, past_key_values=theirs, use_cache=True).logits)
            at += size
    assert torch.equal(found, torch.cat(logits, 1))


@pytest.mark.parametrize("bits", [4, 2])
def test_quanto_bytes_include_scales_padding_and_residual(bits: int) -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    qm = quantized(tiny_model(), HfQuantoScheme(kind="hf-quanto", bits=bits, group=16, residual=24))
    _, ids, mask = ragged([64, 32], "left")
    _, cache = feed(qm, ids, mask, [64])
    elements = 2 * 2 * 2 * 2 * 16 * 64  # padding is stored
    assert 8 * cache_nbytes(cache) == elements * (bits + 32 / 16)
    assert cache_elements(cache, mask) == elements * 96 / 128
    assert cache.quantize_seconds > 0
    with torch.inference_mode():
        qm.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert 8 * cache_nbytes(cache) == elements * (bits + 32 / 16) + 2 * 2 * 2 * 2 * 16 * 16


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_bytes(bits: int) -> None:
    pytest.importorskip("hqq", reason="needs hqq")
    qm = quantized(tiny_model(), HfHqqScheme(kind="hf-hqq", bits=bits, group=16))
    ids = torch.randint(1, 97, (1, 64))
    _, cache = feed(qm, ids, None, [64])
    assert 8 * cache_nbytes(cache) / cache_elements(cache) == bits + 32 / 16


def test_hqq_of_3_bits_is_refused_with_the_reason() -> None:
    parse: Any = TypeAdapter(SchemeSpec).validate_python
    with pytest.raises(ValidationError, match="3 bits are broken in HQQ"):
        parse({"kind": "hf-hqq", "bits": 3})
    with pytest.raises(ValidationError, match="must be 2, 4 or 8"):
        parse({"kind": "hf-hqq", "bits": 5})
    assert parse({"kind": "hf-hqq", "bits": 2}).axis == 0


def test_protocol_b_is_refused() -> None:
    for spec in (QUANTO, HfFp8Scheme(kind="hf-fp8")):
        if isinstance(spec, HfFp8Scheme) and not hasattr(cache_utils, "Fp8QuantizedLayer"):
            continue
        if spec is QUANTO:
            pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
        qm = quantized(tiny_model(), spec)
        with pytest.raises(UserError, match="protocol B: impossible for scheme kind 'hf-"):
            qm.new_cache("B")


@pytest.mark.parametrize(
    ("spec", "package"),
    [(QUANTO, "optimum-quanto"), (HfHqqScheme(kind="hf-hqq", bits=4), "hqq")],
    ids=["quanto", "hqq"],
)
def test_a_missing_package_is_named(
    spec: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_quantized, "_installed", lambda module: False)
    with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
        hf_quantized.check(spec, 2, 64)


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    with pytest.raises(UserError, match="no Fp8QuantizedLayer; install a newer release or use"):
        hf_quantized.check(HfFp8Scheme(kind="hf-fp8"), 2, 64)


def test_options_that_do_not_fit_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_quantized, "_installed", lambda module: True)
    with pytest.raises(UserError, match="group: 64 does not divide the 3 x 16"):
        hf_quantized.check(HfQuantoScheme(kind="hf-quanto", bits=4), 3, 16)
    with pytest.raises(UserError, match="axis: HQQ packs 4 groups together along axis 1"):
        hf_quantized.check(HfHqqScheme(kind="hf-hqq", bits=2, axis=1), 1, 64)
    hf_quantized.check(HfHqqScheme(kind="hf-hqq", bits=2, axis=1), 8, 128)


def test_a_saved_model_loads_in_one_call(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")

    folder = save_tiny(tmp_path)
    qm = load_quantized_model(folder, QUANTO, device="cpu")
    ids = torch.randint(1, 50, (1, 30))
    out = qm.model.generate(ids, past_key_values=qm.new_cache(), max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 33
