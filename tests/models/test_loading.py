"""Ways in which a model comes in: a folder, a device map, a loaded model, quantized weights.

Also covers: models.base_model.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.models.loading import default_dtype, load_quantized_model
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import KiviScheme
from tests.support.caches import ids, step
from tests.support.models import save_tiny, tiny_model

KIVI = KiviScheme(kind="kivi", bits=4, group=16, residual=16)


def logits(qm: Any, tokens: torch.Tensor) -> torch.Tensor:
    cache = qm.new_cache()
    return torch.cat([step(qm.model, cache, part) for part in tokens.split(30, 1)], 1)


def test_a_loaded_model_gives_what_its_folder_gives(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path, positions=256)
    own = load_quantized_model(folder, KIVI, device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    given = load_quantized_model(loaded, KIVI, tokenizer="mine")
    mapped = load_quantized_model(folder, KIVI, device_map="cpu", dtype=torch.float32)
    assert given.model is loaded
    assert given.tokenizer == "mine"
    assert load_quantized_model(loaded, KIVI).tokenizer is None
    assert not loaded.training
    tokens = ids(2, 70)
    expected = logits(own, tokens)
    assert torch.equal(logits(given, tokens), expected)
    assert torch.equal(logits(mapped, tokens), expected)
    assert own.device == given.device == mapped.device == torch.device("cpu")


class Coded(torch.nn.Module):
    """A projection with 8-bit weights, as libraries that quantize weights put in its place."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        scale = plain.weight.abs().amax() / 127
        codes = (plain.weight / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.scale, self.bias = scale, plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantized_weights() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Coded(getattr(layer.self_attn, name)))
    model.model.embed_tokens = model.model.embed_tokens.bfloat16()
    model = model.bfloat16()
    qm = load_quantized_model(model, KIVI)
    assert qm.dtype is torch.bfloat16
    tokens = ids(1, 40)
    with torch.inference_mode():
        expected = model(tokens).logits
    got = logits(qm, tokens)[:, :30]
    assert float((got - expected[:, :30]).norm() / expected[:, :30].norm()) < 0.02


@pytest.mark.parametrize(
    ("saved", "device", "kind"),
    [
        (torch.bfloat16, "cuda", torch.bfloat16),
        ("bfloat16", "cuda:1", torch.bfloat16),
        (torch.float16, "cuda", torch.float16),
        (torch.float32, "cuda", torch.float16),
        (None, "cuda", torch.float16),
        (torch.bfloat16, "cpu", torch.float32),
    ],
)
def test_default_type_of_weights(saved: Any, device: str, kind: torch.dtype) -> None:
    assert default_dtype(SimpleNamespace(dtype=saved), torch.device(device)) is kind


def test_what_does_not_fit_a_loaded_model() -> None:
    for options in ({"device": "cpu"}, {"dtype": torch.float16}, {"device_map": "auto"}):
        with pytest.raises(UserError, match="model: is loaded"):
            load_quantized_model(tiny_model(), KIVI, **options)
    with pytest.raises(UserError, match="device_map: says where"):
        load_quantized_model("nowhere", KIVI, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="model: 'Linear' is not supported"):
        load_quantized_model(torch.nn.Linear(2, 2), KIVI)


@pytest.mark.refused(
    "weights that are offloaded (to the CPU or a disk), or a layer on several GPUs",
    "`device_map`, and what is where; each layer as a whole on one GPU",
)
def test_offloaded_weights_are_refused() -> None:
    model = tiny_model()
    model.model.layers[1].to("meta")
    told = r"^device_map: the model is on cpu, meta; the quantized cache needs all of it on GPUs"
    with pytest.raises(UserError, match=told):
        load_quantized_model(model, KIVI)
    with pytest.raises(UserError, match=told):
        calibrate(model, [[1] * 40], CalibrationSpec())
    with pytest.raises(UserError, match=r"^device_map: the model is on meta; load its"):
        load_quantized_model(tiny_model().to("meta"), KIVI)
