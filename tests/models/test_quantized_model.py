"""A model in memory gets its own attention back; `load` takes short names of schemes.

Also covers: models.logits_sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant.errors import UserError
from kvquant.models.logits_sample import check_sample, logits_sample
from kvquant.study.presets import PRESETS
from tests.support.caches import ids, step
from tests.support.hybrids import tiny_hybrid
from tests.support.models import save_tiny, tiny_model, tiny_tokenizer
from tests.support.text import CORPUS

KIVI = {"kind": "kivi", "bits": 4, "group": 16, "residual": 16}


def state(model: Any) -> list[Any]:
    """The classes and hooks of a model's modules, and where its weights lie."""
    found: list[Any] = [
        (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    return found + [x.data_ptr() for x in model.parameters()]


def calibrated(model: Any) -> Any:
    return kvquant.calibrate(model, tiny_tokenizer(), CORPUS, windows=1, window=64)


@pytest.mark.parametrize("scheme", ["allocated", "kivi"])
@pytest.mark.parametrize("way", ["function", "method", "context", "error"])
def test_a_model_is_as_before(scheme: str, way: str) -> None:
    model = tiny_model(vocab_size=512)
    given: dict[str, Any] = {"scheme": KIVI}
    if scheme == "allocated":
        given = {"quantizer": calibrated(model)}
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    tokens = ids(2, 40)
    plain = model(input_ids=tokens).logits
    qm = kvquant.load(model, **given)
    assert state(model) != before
    cache = qm.new_cache()
    step(model, cache, tokens)
    if way == "function":
        assert kvquant.unwrap(qm) is model
    elif way == "method":
        assert qm.unwrap() is qm.unwrap() is model
    else:
        with pytest.raises(KeyError) if way == "error" else qm, qm as again:
            assert again is qm
            if way == "error":
                raise KeyError
    assert state(model) == before
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert torch.equal(model(input_ids=tokens).logits, plain)
    with pytest.raises(RuntimeError, match="load_quantized_model"):  # not silently wrong
        model(input_ids=tokens[:, :1], past_key_values=cache)
    with kvquant.load(model, **given) as qm:  # and once more
        assert torch.isfinite(step(qm.model, qm.new_cache(), tokens)).all()
    assert state(model) == before


def test_answers_of_an_unwrapped_model_are_refused_in_one_line() -> None:
    model = tiny_model(vocab_size=512)
    qm = kvquant.load(model, KIVI, tokenizer=tiny_tokenizer())
    other = kvquant.load(model, "fp8", tokenizer=tiny_tokenizer())
    kvquant.unwrap(other)
    with pytest.raises(UserError, match=r"qm: its model was unwrapped; .* kvquant.load again"):
        kvquant.generate(qm, ["The sky"], 4)


def test_folded_weights_are_not_given_back(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, positions=256)
    quantizer = kvquant.calibrate(folder, texts=CORPUS, windows=1, window=64, device="cpu")
    with kvquant.load(folder, quantizer=quantizer, device="cpu") as qm:
        pass
    with pytest.raises(UserError, match="model: was read from files, and its values are rotated"):
        kvquant.unwrap(qm)
    assert kvquant.generate(qm, ["The sky"], 4)  # works on
    with kvquant.load(folder, KIVI, device="cpu") as other:
        pass
    assert "Quantized" not in type(other.model.model.layers[0].self_attn).__name__


def fits(name: str) -> bool:
    kind = PRESETS[name].scheme.registration
    return not kind.calibrated and not kind.extra and kind.name != "kivi"


@pytest.mark.parametrize("name", sorted(filter(fits, PRESETS)))
def test_schemes_without_calibration_work_by_name(name: str) -> None:
    model = tiny_model(vocab_size=512)
    with kvquant.load(model, name, tokenizer=tiny_tokenizer()) as qm:
        assert qm.scheme == PRESETS[name].scheme
        answers = kvquant.generate(qm, ["The sky is", "One. " * 20], 3)
    assert len(answers) == 2


def test_names_are_told(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="unknown scheme 'kivi-3': did you mean kivi-"):
        kvquant.load(model, scheme="kivi-3")
    with pytest.raises(UserError, match=r"'nuq' needs a quantizer.*kvquant.calibrate"):
        kvquant.load(model, scheme="nuq3-1pct")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sample_knows_its_model_in_any_dtype(dtype: torch.dtype) -> None:
    model = tiny_model(vocab_size=512)
    sample = logits_sample(model)
    assert sample is not None and len(sample) == 256
    check_sample("q", sample, tiny_model(vocab_size=512).to(dtype))
    check_sample("q", None, model)
    other = tiny_model(vocab_size=512)
    torch.manual_seed(3)
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    with pytest.raises(UserError, match="quantizer: q was built for a model with other weights"):
        check_sample("q", sample, other)
    with pytest.raises(UserError, match="other weights"):
        check_sample("q", sample[:9], model)


def test_a_sample_of_logits_that_overflow_decides_nothing() -> None:
    model = tiny_model(vocab_size=512)
    sample = logits_sample(model)
    model.lm_head.weight.data[:] = float("nan")
    assert logits_sample(model) is None
    check_sample("q", sample, model)


def test_a_sample_does_not_depend_on_the_attention_installed() -> None:
    model = tiny_hybrid("gemma3")
    sample = logits_sample(model)
    kvquant.load(model, KIVI)
    assert logits_sample(model) == sample
