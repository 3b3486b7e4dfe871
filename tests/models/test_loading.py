"""Ways in which a model comes in: a folder, a device map, a loaded model, quantized weights.

Also covers: models.base_model.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.models import base_model
from kvquant.models.loading import default_dtype, load_quantized_model
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import KiviScheme
from tests.support.caches import ids, step
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer

KIVI = KiviScheme(kind="kivi", bits=4, group=16, residual=16)


def logits(qm: Any, tokens: torch.Tensor) -> torch.Tensor:
    cache = qm.new_cache()
    return torch.cat([step(qm.model, cache, part) for part in tokens.split(30, 1)], 1)


def test_a_loaded_model_gives_what_its_folder_gives(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path, positions=256)
    own = load_quantized_model(folder, KIVI, device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    given = load_quantized_model(loaded, KIVI, tokenizer=(mine := tiny_tokenizer()))
    mapped = load_quantized_model(folder, KIVI, device_map="cpu", dtype=torch.float32)
    assert given.model is loaded
    assert given.tokenizer is mine
    assert load_quantized_model(loaded, KIVI).tokenizer is None
    assert not loaded.training
    tokens = ids(2, 70)
    expected = logits(own, tokens)
    assert torch.equal(logits(given, tokens), expected)
    assert torch.equal(logits(mapped, tokens), expected)
    assert own.device == given.device == mapped.device == torch.device("cpu")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_weights_on_the_cpu_are_in_fp32_also_beside_a_gpu(
    device_map: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `device="cpu"` gives them; "auto" would mean the GPU."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        base_model, "resolve_device", lambda name: gpu if name == "auto" else torch.device(name)
    )
    qm = load_quantized_model(save_tiny(tmp_path), KIVI, device_map=device_map)
    assert (qm.device.type, qm.dtype) == ("cpu", torch.float32)


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


def test_the_type_of_weights_that_a_study_asks_for_is_one_for_gpus() -> None:
    config = SimpleNamespace(dtype=torch.float32)
    assert default_dtype(config, torch.device("cuda"), "bfloat16") is torch.bfloat16
    assert default_dtype(config, torch.device("cpu"), "bfloat16") is torch.float32


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Saves a GPT-OSS whose experts have MXFP4 weights; returns what these stand for, by name."""
    from safetensors.torch import load_file, save_file

    tiny_model("gpt_oss", vocab_size=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file, generator, meant = folder / "model.safetensors", torch.Generator().manual_seed(0), {}
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack((blocks % 16, blocks // 16), -1).long().flatten(-2)
        numbers = torch.cat((FP4, -FP4))[codes] * torch.exp2(scales.float() - 127)[..., None]
        meant[name] = numbers.flatten(2).mT
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_experts_in_mxfp4_are_dequantized(dtype: torch.dtype | None, tmp_path: Path) -> None:
    meant = save_mxfp4(tmp_path)
    qm = load_quantized_model(tmp_path, KIVI, device="cpu", dtype=dtype)
    found = dict(qm.model.named_parameters())
    assert len(meant) == 4
    for name, numbers in meant.items():
        assert found[name].dtype is (dtype or torch.float32)
        assert torch.equal(found[name].float(), numbers)
    assert qm.dtype is (dtype or torch.float32)
    assert logits(qm, ids(1, 40)).isfinite().all()
    assert default_dtype(AutoConfig.from_pretrained(tmp_path), torch.device("cuda")) is (
        torch.bfloat16
    )


@pytest.mark.parametrize("model", ["", "no where", "/no/where", "~/no", __file__, Path("a/b/c")])
def test_what_is_no_model_is_named(model: str | Path) -> None:
    with pytest.raises(UserError, match=r"model: '.*' is neither a folder nor a hub id"):
        load_quantized_model(model, KIVI)


def test_what_does_not_fit_a_loaded_model() -> None:
    for options in ({"device": "cpu"}, {"dtype": torch.float16}, {"device_map": "auto"}):
        with pytest.raises(UserError, match="model: is loaded"):
            load_quantized_model(tiny_model(), KIVI, **options)
    with pytest.raises(UserError, match="device_map: says where"):
        load_quantized_model("nowhere", KIVI, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="model: 'Linear' is not supported"):
        load_quantized_model(torch.nn.Linear(2, 2), KIVI)
    with pytest.raises(UserError, match=r"^tokenizer: must be a tokenizer, got str; .*AutoTok"):
        load_quantized_model(tiny_model(), KIVI, tokenizer="resources/models/mine")


@pytest.mark.parametrize("given", [3, torch.nn.Linear])
def test_what_is_no_model_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(UserError, match=r"^model: must be a folder, a hub id or .*, got \w+$"):
        load_quantized_model(given, KIVI)


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
