"""What users of transformers do, for every model family: what a cache gives beside DynamicCache.

`tests/models/test_families.py` feeds the families by hand; here are generation, and models that are
changed. docs/model-features.md shows which feature is tested with which family.
"""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvquant.errors import UserError
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.study.model_families import MODEL_FAMILIES
from tests.support.cache_uses import LENGTH, fed, sharpen
from tests.support.caches import CLOSE, EXACT, GREEDY, LOSSY, ids, quantized, step
from tests.support.hybrids import BASES, HYBRID, tiny_hybrid
from tests.support.model_features import FEATURES, Coded, adapted, replaced
from tests.support.models import save_tiny, tiny_model
from tests.support.pretend_gpus import pretend_gpus
from tests.support.several_devices import USES, OnItsDevice, on_one_and_two

FAMILIES = [*MODEL_FAMILIES, *(f"{name}+windows" for name in HYBRID)]
families = pytest.mark.parametrize("family", FAMILIES)
DYNAMIC: dict[str, Any] = {
    "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip


def tiny(family: str, **options: Any) -> Any:
    """A tiny model whose scores depend on positions, of a family or with windows."""
    name, _, windows = family.partition("+")
    if windows:
        return tiny_hybrid(name, **options)
    model = tiny_model(name, **options)
    sharpen(model)
    return model


@functools.lru_cache(maxsize=1)  # tests of a family follow each other
def unchanged(family: str) -> QuantizedModel:
    """A model that no test changes, with a cache of 16-bit numbers."""
    return quantized(tiny(family), EXACT)


def dynamic(model: Any) -> DynamicCache:
    """The unquantized cache of transformers."""
    return DynamicCache(config=model.config)


@pytest.mark.thinned(3)
@pytest.mark.feature("{use}")
@pytest.mark.parametrize("use", FEATURES)
@families
def test_what_users_do(family: str, use: str) -> None:
    qm = unchanged(family)
    expected = FEATURES[use](qm.model, dynamic(qm.model))
    torch.testing.assert_close(FEATURES[use](qm.model, qm.new_cache()), expected, **CLOSE)


@pytest.mark.thinned(3)
@pytest.mark.feature("layers on several GPUs")
@pytest.mark.filterwarnings("ignore:model. all layers have a sliding window")
@families
def test_layers_on_two_devices(family: str, tmp_path: Path) -> None:
    """They are pretended; `test_several_gpus.py` has what GPUs give."""
    model, found = tiny(family), []
    model.config._experts_implementation = "eager"  # others have a kernel of GPUs
    with pretend_gpus():
        for qm in on_one_and_two(model, "nuq", tmp_path):
            found.append(USES["left padding"](OnItsDevice(qm), qm.new_cache()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.feature("LoRA")
@families
def test_adapters_that_come_after_the_cache(family: str) -> None:
    """They replace the projections of queries, keys, values and outputs, as PEFT does."""
    model = tiny(family)
    qm = quantized(model, EXACT)
    before = fed(model, qm.new_cache())
    adapted(model)
    expected = fed(model, dynamic(model))
    assert float((expected - before).abs().max()) > 5 * CLOSE["atol"]
    torch.testing.assert_close(fed(model, qm.new_cache()), expected, **CLOSE)


@pytest.mark.thinned(3)
@pytest.mark.feature("{bits}-bit weights")
@pytest.mark.parametrize("bits", [8, 4])
@families
def test_projections_with_quantized_weights(family: str, bits: int) -> None:
    """Modules with coded weights take the projections' places, as in bitsandbytes and torchao."""
    model = tiny(family)
    replaced(model, lambda plain: Coded(plain, bits))
    expected = fed(model, dynamic(model))
    torch.testing.assert_close(fed(model, quantized(model, EXACT).new_cache()), expected, **CLOSE)


@pytest.mark.feature("RoPE that changes with the length")
@pytest.mark.parametrize("family", [*MODEL_FAMILIES, "gemma3+windows"])
def test_a_rope_scaling_passes_its_length(family: str) -> None:
    """Keys keep the rotation that they had when they came, as in the cache of transformers."""
    rope: dict[str, Any] = {**(LONGROPE if family == "phi3" else DYNAMIC)}  # it takes no other
    options: dict[str, Any] = {"max_position_embeddings": 64, "rope_parameters": rope}
    if family.startswith("gemma3"):
        options["rope_parameters"] = {**BASES, "full_attention": rope}
    if family == "phi3":
        options.update(max_position_embeddings=128, original_max_position_embeddings=64)
    if family == "ministral3":
        options["rope_parameters"] = {**rope, "llama_4_scaling_beta": 0.1}
    model = tiny(family, **options)
    expected = fed(model, dynamic(model))
    found = fed(model, quantized(model, EXACT).new_cache())
    torch.testing.assert_close(found, expected, **CLOSE)
    with torch.inference_mode():
        whole = model(input_ids=ids(2, LENGTH)).logits  # all keys rotated as for this length
    assert float((found - expected).abs().max()) < float((whole - expected).abs().max()) / 5


@pytest.mark.exhaustive
@pytest.mark.feature("`torch.compile`")
@pytest.mark.parametrize("family", ["gemma3+windows"])
def test_steps_of_a_compiled_model(family: str) -> None:
    """`tests/models/test_transformers_behaviour.py` has more with Llama."""
    torch._dynamo.reset()
    qm = quantized(tiny(family), EXACT)
    compiled = torch.compile(qm.model.forward, backend="eager")
    found = []
    for cache, call in ((dynamic(qm.model), qm.model), (qm.new_cache(), compiled)):
        step(qm.model, cache, ids(1, 62))
        found.append(torch.cat([step(call, cache, ids(1, 1, i)) for i in range(3)], 1))
    torch.testing.assert_close(*found, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.thinned(3)
@pytest.mark.feature("3 bits, `generate`")
@families
def test_generation_from_three_bits_reads_what_the_cache_holds(family: str) -> None:
    """The tokens are those of the same cache fed by hand."""
    model = unchanged(family).model
    qm = quantized(model, LOSSY)
    prompt = ids(2, 92)  # a block becomes full on the way
    found = model.generate(prompt, past_key_values=qm.new_cache(), max_new_tokens=10, **GREEDY)
    cache, tokens = qm.new_cache(), [prompt]
    for _ in range(10):
        tokens.append(step(model, cache, tokens[-1])[:, -1:].argmax(-1))
    assert torch.equal(found, torch.cat(tokens, 1))


GONE: dict[str, dict[str, Any]] = {
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "high"},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[5]]},
}


@pytest.mark.refused(
    "`generate` with {way}",
    "by transformers itself, which moved it into code that needs `trust_remote_code=True`",
)
@pytest.mark.parametrize("way", GONE)
def test_ways_of_generating_that_transformers_gave_up(way: str) -> None:
    qm = unchanged("llama")
    with pytest.raises(ValueError, match="trust_remote_code"):
        qm.model.generate(ids(1, 20), past_key_values=qm.new_cache(), **{**GREEDY, **GONE[way]})


def test_adapters_of_peft() -> None:
    """Before and after the cache, turned off, and merged."""
    peft = pytest.importorskip("peft")
    for loads_first in (True, False):
        model = tiny("llama")
        qm = quantized(model, EXACT) if loads_first else None
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        options = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
        wrapped = peft.get_peft_model(model, options).eval()
        qm = qm or load_quantized_model(wrapped.get_base_model())
        qm = quantized(qm.model, EXACT)
        expected = fed(wrapped, dynamic(model))
        torch.testing.assert_close(fed(wrapped, qm.new_cache()), expected, **CLOSE)
        given = {"input_ids": ids(1, 40), "max_new_tokens": 12, **GREEDY}
        found = wrapped.generate(**given, past_key_values=qm.new_cache())
        assert torch.equal(found, wrapped.generate(**given))
        with wrapped.disable_adapter():
            without = fed(wrapped, dynamic(model))
            torch.testing.assert_close(fed(wrapped, qm.new_cache()), without, **CLOSE)
        assert float((without - expected).abs().max()) > 5 * CLOSE["atol"]
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(fed(merged, qm.new_cache()), expected, **CLOSE)


PEFT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": (
        "LoraConfig",
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "init_lora_weights": False},
    ),
    "IA3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    ),
    "OFT": ("OFTConfig", {"target_modules": ["q_proj", "v_proj"], "oft_block_size": 8}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
}


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_other_methods_of_peft(method: str) -> None:
    peft = pytest.importorskip("peft")
    name, options = PEFT_METHODS[method]
    qm = quantized(tiny("llama"), EXACT)
    config = getattr(peft, name)(task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(qm.model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:  # most begin as no change at all
                parameter.normal_(0, 0.5)
    given = {"input_ids": ids(1, 40), "max_new_tokens": 12, **GREEDY}
    found = wrapped.generate(**given, past_key_values=qm.new_cache())
    assert torch.equal(found, wrapped.generate(**given))


def eight_bits(plain: Any) -> Any:
    """The 8-bit projection of bitsandbytes."""
    library = pytest.importorskip("bitsandbytes")
    new = library.nn.Linear8bitLt(
        plain.in_features, plain.out_features, bias=False, has_fp16_weights=False
    )
    new.weight = library.nn.Int8Params(
        plain.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return new.to("cpu")


def four_bits(plain: Any) -> Any:
    """The 4-bit projection of bitsandbytes."""
    library = pytest.importorskip("bitsandbytes")
    kind = torch.float32
    new = library.nn.Linear4bit(plain.in_features, plain.out_features, False, compute_dtype=kind)
    new.weight = library.nn.Params4bit(plain.weight.data, requires_grad=False)
    return new.to("cpu")


def of_torchao(plain: Any) -> Any:
    """A projection with the 8-bit weights of torchao."""
    library = pytest.importorskip("torchao.quantization")
    holder = torch.nn.Sequential(plain)
    library.quantize_(holder, library.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.refused(
    "a folder with weights of a library that is not installed (bitsandbytes)",
    "the folder, the library and how it is installed",
)
@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_weights_of_a_library_that_is_missing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model: cannot load .*pip install") as error:
        load_quantized_model(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("by", [eight_bits, four_bits, of_torchao], ids=lambda by: by.__name__)
def test_quantized_weights_of_libraries(by: Any) -> None:
    model = tiny("llama")
    before = fed(model, dynamic(model))
    replaced(model, by)
    expected = fed(model, dynamic(model))
    assert not torch.equal(before, expected)
    torch.testing.assert_close(fed(model, quantized(model, EXACT).new_cache()), expected, **CLOSE)
