"""What one of several GPUs has of a model, and `kvquant capacity --gpus`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvquant.benchmarks.random_model import RandomModel
from kvquant.cli import main
from kvquant.diagnosis.model_facts import ModelFacts, judge_model
from kvquant.diagnosis.several_gpus import part_of_gpu
from kvquant.errors import UserError
from kvquant.models.placement import even_map
from kvquant.study.kernels import SHAPES


def shape_of(name: str, **other: Any) -> tuple[ModelFacts, Any]:
    """The facts of a shape of the benchmarks, and its model without weights."""
    config = AutoConfig.for_model("llama", **SHAPES[name] | other)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return judge_model(model, name), model


@pytest.mark.parametrize(("name", "gpus"), [("70b-gqa", 8), ("13b-mha", 2), ("8b-gqa", 3)])
def test_the_fullest_gpu_by_layers_is_that_of_the_placement(name: str, gpus: int) -> None:
    facts, model = shape_of(name)
    assert facts.cache is not None
    own, weights = part_of_gpu(facts, facts.cache, 2 * facts.parameters, gpus, "layers")
    devices = [torch.device("cuda", index) for index in range(gpus)]
    places = even_map(model, devices)
    layers = [sum(at == d for p, at in places.items() if "layers." in p) for d in devices]
    assert own.full_layers == max(layers)
    sizes = {
        device: sum(
            2 * parameter.numel()
            for part, at in places.items()
            if at == device
            for parameter in model.get_submodule(part).parameters()
        )
        for device in devices
    }
    fullest = devices[layers.index(max(layers))]
    assert weights == pytest.approx(sizes[fullest], rel=1e-6)
    assert (own.kv_heads, own.widest) == (facts.cache.kv_heads, facts.cache.widest)


def test_each_gpu_by_heads_has_an_eighth() -> None:
    facts, _ = shape_of("70b-gqa")
    assert facts.cache is not None
    own, weights = part_of_gpu(facts, facts.cache, 2 * facts.parameters, 8, "heads")
    assert (own.full_layers, own.kv_heads, own.heads, own.widest) == (80, 1, 8, 3584)
    assert 17.6e9 < weights < 17.7e9
    assert part_of_gpu(facts, facts.cache, 7, 1, "heads") == (facts.cache, 7)


def test_a_head_that_is_the_embedding_is_counted_once() -> None:
    facts, _ = shape_of("tiny", tie_word_embeddings=True)
    assert facts.cache is not None
    _, weights = part_of_gpu(facts, facts.cache, 4 * facts.parameters, 2, "layers")
    assert weights < 4 * facts.parameters


@pytest.mark.parametrize(
    ("gpus", "split", "words"),
    [
        (3, "heads", "--gpus: 3 cannot share 8 kv heads evenly"),
        (16, "heads", "--gpus: 16 cannot share 8 kv heads evenly"),
        (33, "layers", "--gpus: 33 GPUs for 32 layers"),
    ],
)
def test_what_cannot_be_shared(gpus: int, split: Any, words: str) -> None:
    facts, _ = shape_of("8b-gqa")
    assert facts.cache is not None
    with pytest.raises(UserError, match=words):
        part_of_gpu(facts, facts.cache, 1, gpus, split)


def capacity_of(
    model_type: str, folder: Path, capsys: pytest.CaptureFixture[str], **other: Any
) -> dict[str, Any]:
    """Bytes per token by scheme of a model whose kv heads two processes share."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}
    AutoConfig.for_model(model_type, **sizes | heads | other).save_pretrained(folder)
    words = ["capacity", "--model", str(folder), "--memory", "8GB", "--scheme", "fp16", "fp8"]
    words += ["--gpus", "2", "--split", "heads", "--dtype", "bfloat16", "--json"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)["schemes"]
    return {one["scheme"]: one["bytes_per_token"] for one in found}


def test_where_the_plan_gathers_a_16_bit_cache_holds_all_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fused projection is computed in every process; a quantized cache takes its part of it."""
    split = capacity_of("llama", tmp_path / "llama", capsys)
    gathered = capacity_of("phi3", tmp_path / "phi3", capsys, pad_token_id=0)
    assert gathered["fp16"] == 2 * split["fp16"] == 2 * 2 * 2 * 4 * 32
    assert gathered["fp8"] == pytest.approx(split["fp8"], rel=0.05)


def test_a_model_without_a_plan_is_not_shared_by_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match=r"has no plan .* StableLM model; use --split layers"):
        capacity_of("stablelm", tmp_path / "stablelm", capsys)


def test_norms_for_each_head_are_not_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As loading such a model with `tp_plan` refuses it."""
    assert capacity_of("cohere", tmp_path / "plain", capsys, use_qk_norm=False)
    with pytest.raises(AssertionError, match=r"has no plan .* Cohere model; use --split layers"):
        capacity_of("cohere", tmp_path / "norms", capsys, use_qk_norm=True)


def test_capacity_of_several_gpus(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["capacity", "--model", str(configs / "7b"), "--memory", "12GB", "--scheme", "fp16"]
    assert main(words) == 2  # one such GPU does not hold the weights
    assert "do not hold the weights" in capsys.readouterr().err
    found = {}
    for split in ("layers", "heads"):
        assert main([*words, "--gpus", "2", "--split", split, "--json"]) == 0
        found[split] = json.loads(capsys.readouterr().out)
        assert (found[split]["gpus"], found[split]["split"]) == (2, split)
        assert found[split]["model"]["kv_heads"] == 32  # of the whole model
        (fp16,) = found[split]["schemes"]
        assert fp16["bytes_per_token"] == 2 * 2 * 32 * 32 * 128 / 2
    assert found["heads"]["activation_bytes"] < found["layers"]["activation_bytes"]
    assert main([*words, "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "the fullest of 2, which have layers" in shown
    assert "Bytes are those on one GPU; tokens are those of the whole model." in shown
    assert main([*words, "--gpus", "0"]) == 2
    assert "--gpus: 0 is not between 1 and 64" in capsys.readouterr().err


def test_formula_of_a_shape_agrees_with_a_model_of_it() -> None:
    model = RandomModel("tiny-gqa", torch.device("cpu"))
    facts, _ = shape_of("tiny-gqa")
    assert 4 * facts.parameters == model.weight_bytes
