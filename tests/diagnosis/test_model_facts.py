"""A configuration alone says what a loaded model would: layers, shape, weights, obstacles.

Also covers: diagnosis.weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvquant.diagnosis.model_facts import judge_model, read_model
from kvquant.diagnosis.weights import weight_bytes, weight_dtype
from kvquant.errors import UserError
from kvquant.models.hooks import attention_layers
from kvquant.study.model_families import MODEL_FAMILIES
from tests.support.models import tiny_model


def test_a_configuration_says_layers_shape_and_weights(configs: Path) -> None:
    facts = read_model(configs / "7b")
    assert (facts.family, facts.refused, facts.parameters) == ("Llama", None, 6_738_415_616)
    assert facts.cache is not None
    assert facts.cache.windows == (None,) * 32 and facts.cache.full_layers == 32
    assert (facts.cache.heads, facts.cache.kv_heads, facts.cache.head_dim) == (32, 32, 128)
    assert (facts.cache.hidden, facts.cache.widest, facts.cache.positions) == (4096, 11008, 32768)
    assert weight_bytes(facts, weight_dtype(facts, "auto")) == 2 * facts.parameters
    assert weight_bytes(facts, "float32") == 4 * facts.parameters


def test_windows_and_caps_of_a_hybrid_are_told(configs: Path) -> None:
    facts = read_model(configs / "gemma2")
    assert [(g.kind, g.layers, g.window) for g in facts.groups] == [
        ("full", (1, 3), None), ("sliding", (0, 2), 100),
    ]  # fmt: skip
    assert facts.cache is not None and facts.cache.eager and facts.cache.soft_cap == 50.0
    assert facts.cache.own_windows == [100, 100]


@pytest.mark.parametrize(
    ("name", "groups", "told"),
    [
        ("qwen3-next", [(0, 2), (1, 3)], "layer 0 is 'linear_attn'"),
        ("starcoder2", [(0, 1, 2, 3)], "attention 'Starcoder2Attention' is not supported"),
        ("t5", [], "encoder-decoder"),
    ],
)
def test_obstacles_are_those_of_loading(
    name: str, groups: list[tuple[int, ...]], told: str, configs: Path
) -> None:
    facts = read_model(configs / name)
    assert facts.cache is None and told in str(facts.refused)
    assert [g.layers for g in facts.groups] == groups
    assert all(g.kind == "refused" for g in facts.groups)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_every_family_is_judged_as_loading_judges_it(family: str) -> None:
    model = tiny_model(family)
    facts = judge_model(model, family)
    assert len(attention_layers(model)) == sum(len(g.layers) for g in facts.groups)
    assert facts.family == MODEL_FAMILIES[family].label and facts.refused is None
    assert facts.parameters == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_read_or_made_takes_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder here, and cannot be loaded as a hub id"):
        read_model(tmp_path / "nowhere")
    odd = {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    try:
        facts = read_model(tmp_path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert facts.refused is not None and "\n" not in facts.refused


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"load_in_4bit": True}, "unknown"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "mxfp4"}, None),
        ({}, None),
    ],
)
def test_quantized_weights_need_not_name_their_method(
    given: dict[str, Any], stored: str | None, configs: Path, tmp_path: Path
) -> None:
    """Else they would count as 16-bit weights, several times their size."""
    raw = json.loads((configs / "small" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": given}))
    assert read_model(tmp_path).stored == stored


def test_quantized_weights_are_as_large_as_their_files(configs: Path, tmp_path: Path) -> None:
    raw = json.loads((configs / "small" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    facts = read_model(tmp_path)
    assert facts.stored == "awq"
    with pytest.raises(UserError, match="--weights 5GB"):
        weight_bytes(facts, "float16")
    for name in ("a", "b"):
        save_file({"w": torch.zeros(100, dtype=torch.int32)}, tmp_path / f"{name}.safetensors")
    assert weight_bytes(facts, "float16") == 800
