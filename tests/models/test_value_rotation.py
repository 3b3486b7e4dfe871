"""The rotation of values in the weights: the same model, refusals, and the same cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.models.base_model import load_base_model
from kvquant.models.hooks import attention_layers
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.value_rotation import (
    fold_value_rotation,
    obstacle,
    refuse_rotated,
    values_rotated,
)
from kvquant.quantization.hadamard import rotate
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.schemes import AllocatedScheme, Fp16Scheme, KiviScheme, NuqScheme
from tests.support.caches import feed, ids, quantized, ragged, step
from tests.support.model_features import adapted
from tests.support.models import save_tiny, tiny_model
from tests.support.quantizers import (
    narrow_quantizers,
    narrow_tables,
    relative_error,
    save_made_quantizer,
)

MODELS: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in MODEL_FAMILIES},
    "llama with biases": {"family": "llama", "attention_bias": True},
    "qwen3 with biases": {"family": "qwen3", "attention_bias": True},
    "heads of 80": {"family": "llama", "head_dim": 80},
    "a kv head per query head": {"family": "mistral", "kv_heads": 4},
    "one kv head": {"family": "qwen2", "kv_heads": 1},
}
SPEC = AllocatedScheme(kind="allocated", bits=4.3, block_size=32)


def fold(model: Any) -> bool:
    return fold_value_rotation(model, attention_layers(model), model.config.head_dim)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: Any, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_the_same(name: str) -> None:
    model = tiny_model(**MODELS[name])
    before, tokens = state(model), ids(2, 50)
    expected = logits(model, tokens)
    assert not values_rotated(model)
    assert fold(model)
    assert values_rotated(model)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    values = MODEL_FAMILIES[MODELS[name]["family"]].fused or "v_proj"
    rotated = {
        f"model.layers.{layer}.self_attn.{part}"
        for layer in range(2)
        for part in (f"{values}.weight", f"{values}.bias", "o_proj.weight")
    }
    assert changed == rotated & set(before)
    assert ("model.layers.1.self_attn.v_proj.bias" in changed) == (
        "bias" in name or MODELS[name]["family"] in ("qwen2", "qwen2_moe", "gpt_oss")
    )


@pytest.mark.parametrize("name", MODELS)
def test_values_arrive_rotated_within_their_head(name: str) -> None:
    plain = tiny_model(**MODELS[name])
    folded = copy.deepcopy(plain)
    assert fold(folded)
    dim = plain.config.head_dim
    x = torch.randn(7, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for a, b in zip(attention_layers(plain), attention_layers(folded), strict=True):
        values, found = (
            part.read(part.module(x[None]), dim)[0].unflatten(-1, (-1, dim))
            for part in (adapter_of(module).part(module, "values") for module in (a, b))
        )
        assert values.shape[1] == plain.config.num_key_value_heads
        torch.testing.assert_close(found, rotate(values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bit_weights_change_logits_by_rounding_alone(name: str, kind: torch.dtype) -> None:
    model = tiny_model(**MODELS[name])
    tokens = ids(2, 50)
    exact = logits(model, tokens)
    model = model.to(kind)
    rounded = logits(model, tokens)
    assert fold(model)
    assert all(p.dtype is kind for p in model.parameters())
    found = logits(model, tokens)
    assert relative_error(found, exact) < 3 * relative_error(rounded, exact)


def test_twice_is_once() -> None:
    model = tiny_model("qwen2")
    assert fold(model)
    before = state(model)
    assert fold(model)
    assert same_state(model, before)
    copied = copy.deepcopy(model)
    assert values_rotated(copied) and fold(copied)
    assert same_state(copied, before)


class Adapted(nn.Linear):
    """A linear layer with something of its own, as libraries of adapters have."""


def shared_values(model: Any) -> None:
    first, second = attention_layers(model)
    second.v_proj.weight = first.v_proj.weight


def values_are_keys(model: Any) -> None:
    attention = attention_layers(model)[1]
    attention.v_proj.weight = attention.k_proj.weight


def part_of_keys(model: Any) -> None:
    """Both are views of one tensor, as of fused weights, and overlap."""
    attention = attention_layers(model)[0]
    both = torch.randn(48, attention.v_proj.in_features)
    attention.k_proj.weight = nn.Parameter(both[:32], requires_grad=False)
    attention.v_proj.weight = nn.Parameter(both[16:], requires_grad=False)


def output_is_elsewhere(model: Any) -> None:
    attention = attention_layers(model)[1]
    model.model.layers[0].extra = nn.Parameter(attention.o_proj.weight, requires_grad=False)


def shared_bias(model: Any) -> None:
    attention = attention_layers(model)[0]
    attention.k_proj.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    attention.v_proj.bias = attention.k_proj.bias


def subclass(model: Any) -> None:
    attention = attention_layers(model)[1]
    adapted = Adapted(64, 64, bias=False)
    adapted.weight = attention.o_proj.weight
    attention.o_proj = adapted


def integer(model: Any) -> None:
    projection = attention_layers(model)[1].o_proj
    projection.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)


def recomputed(model: Any) -> None:
    """The weight is computed before each call from parameters of other names."""
    torch.nn.utils.parametrizations.weight_norm(attention_layers(model)[1].v_proj)


OBSTACLES: list[tuple[Callable[[Any], None], str]] = [
    (shared_values, "layer 0: v_proj shares its weights"),
    (values_are_keys, "layer 1: v_proj shares its weights"),
    (part_of_keys, "layer 0: v_proj shares its weights"),
    (output_is_elsewhere, "layer 1: o_proj shares its weights"),
    (shared_bias, "layer 0: v_proj shares its weights"),
    (subclass, "layer 1: o_proj is no plain linear layer"),
    (integer, "layer 1: o_proj has torch.int8 weights"),
    (recomputed, "layer 1: v_proj is no plain linear layer"),
]


@pytest.mark.parametrize(("change", "reason"), OBSTACLES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_rotated_stays_as_it_is(change: Callable[[Any], None], reason: str) -> None:
    model = tiny_model()
    assert obstacle(model, attention_layers(model)) is None
    change(model)
    before = state(model)
    found = obstacle(model, attention_layers(model))
    assert found is not None and found.startswith(reason)
    assert not fold(model)
    assert not values_rotated(model)
    assert same_state(model, before)


def test_weights_that_only_lie_side_by_side_are_rotated() -> None:
    model = tiny_model()
    tokens = ids(2, 30)
    expected = logits(model, tokens)
    for attention in attention_layers(model):
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        fused = torch.cat([part.weight for part in parts])
        for part, rows in zip(parts, fused.split([64, 32, 32]), strict=True):
            part.weight = nn.Parameter(rows, requires_grad=False)
    assert fold(model)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


def refused(call: Callable[[], Any], what: str) -> None:
    with pytest.raises(UserError, match="model: its values are rotated for") as error:
        call()
    assert what in str(error.value) and "load the model again" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_folded_model_is_refused_where_plain_values_are_expected(tmp_path: Path) -> None:
    model = tiny_model()
    nuq, plain = NuqScheme(kind="nuq", bits=3), AllocatedScheme(kind="allocated", rotation=False)
    kivi = KiviScheme(kind="kivi", bits=2, group=16)
    files = {
        "nuq": save_made_quantizer(tmp_path / "n.json", nuq, "a" * 64, narrow_quantizers(3)),
        "allocated": save_made_quantizer(
            tmp_path / "a.json", plain, "a" * 64, narrow_tables(plain, 2, 16)
        ),
        "kivi": None,
    }
    for spec in (nuq, plain, kivi):
        load_quantized_model(tiny_model(), spec, quantizer=files[spec.kind])
    windows, calibration = [ids(1, 40)[0].tolist()], CalibrationSpec(windows=1, window=40)
    calibrate(model, windows, calibration)
    refuse_rotated(model, "nothing")
    assert fold(model)
    for spec in (nuq, plain, kivi):
        load = partial(load_quantized_model, model, spec, quantizer=files[spec.kind])
        refused(load, f"scheme kind '{spec.kind}'")
    refused(partial(calibrate, model, windows, calibration), "calibration")
    # an unquantized cache holds them as well as others
    load_quantized_model(model, Fp16Scheme(kind="fp16"))


def pair(spec: AllocatedScheme = SPEC) -> tuple[QuantizedModel, QuantizedModel]:
    """The same model with the rotation in the codec, and in the weights."""
    tables = narrow_tables(spec, 2, 16)
    explicit, model = quantized(tiny_model(), spec, tables), tiny_model()
    assert fold(model)
    folded = quantized(model, spec, tables)
    assert folded.codecs is not None
    for codec in folded.codecs:
        codec.expect_rotated_values()
    return explicit, folded


def near(explicit: torch.Tensor, folded: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounding moves single codes to the next level, which is far less than quantization does."""
    changes = relative_error(explicit, exact)
    assert changes > 1e-6
    assert relative_error(folded, explicit) < changes / 4


SPECS = [
    SPEC,
    AllocatedScheme(kind="allocated", bits=3.3, block_size=32, sinks=0, value_range="token-head"),
    AllocatedScheme(kind="allocated", bits=5.0, block_size=64, sinks=4, outliers=0.0),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.value_range}")
@pytest.mark.parametrize(
    ("protocol", "chunks"), [("B", [150]), ("A", [70, 80]), ("B", [37, 1, 1, 64, 47])]
)
def test_the_cache_reads_the_same_from_both(
    spec: AllocatedScheme, protocol: str, chunks: list[int]
) -> None:
    explicit, folded = pair(spec)
    tokens = ids(2, 150)
    exact = logits(explicit.model, tokens)
    found = [feed(qm, tokens, None, chunks, protocol)[0] for qm in (explicit, folded)]
    near(found[0], found[1], exact)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_padded_batches_read_the_same_from_both(side: str, protocol: str) -> None:
    explicit, folded = pair()
    rows, tokens, mask = ragged([130, 71, 1, 33], side)
    # A chunk after the first, so that protocol A reads the past, too.
    chunks = [130] if side == "right" or protocol == "B" else [80, 44, *[1] * 6]
    found = [feed(qm, tokens, mask, chunks, protocol)[0] for qm in (explicit, folded)]
    shown = mask.bool()
    exact = torch.cat([logits(explicit.model, row[None])[0] for row in rows])
    if protocol == "A" and side == "right":  # the first call attends in full precision
        torch.testing.assert_close(found[0][shown], found[1][shown], atol=1e-4, rtol=1e-4)
    else:
        near(found[0][shown], found[1][shown], exact)


def test_cropped_caches_go_on_the_same() -> None:
    explicit, folded = pair()
    tokens = ids(2, 120)
    exact = logits(explicit.model, tokens)
    found = []
    for qm in (explicit, folded):
        _, cache = feed(qm, tokens, None, [100])
        cache.crop(75)  # inside a block, whose tokens return to 16 bits
        first = step(qm.model, cache, tokens[:, 75:110])
        cache.crop(90)
        found.append(torch.cat([first[:, :15], step(qm.model, cache, tokens[:, 90:])], 1))
    near(found[0], found[1], exact[:, 75:])


def test_what_expects_rotated_values_must_get_them() -> None:
    """Rotated twice, logits differ as much as by quantization, which `near` tells from rounding."""
    tables, tokens = narrow_tables(SPEC, 2, 16), ids(2, 150)
    explicit, _ = pair()
    good, _ = feed(explicit, tokens, None, [150], "B")
    model = tiny_model()
    assert fold(model)
    # Rotating twice is no rotation, as the matrix of 16 is symmetric: codes of plain values.
    twice, _ = feed(quantized(model, SPEC, tables), tokens, None, [150], "B")
    error = relative_error(good, logits(explicit.model, tokens))
    assert relative_error(twice, good) > error / 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotated")
    model = save_tiny(folder / "model", positions=256)
    weights = FileHashes(model, "model").of("model.safetensors")
    save_made_quantizer(folder / "q.json", SPEC, weights, narrow_tables(SPEC, 2, 16))
    return folder


def test_a_folder_s_model_is_folded_and_a_given_one_is_not(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = load_quantized_model(saved / "model", quantizer=saved / "q.json", device="cpu")
    assert own.scheme == SPEC and own.codecs is not None
    assert values_rotated(own.model)
    assert not any(codec.rotates_values for codec in own.codecs)

    model = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    before = state(model)
    given = load_quantized_model(model, quantizer=saved / "q.json")
    assert given.codecs is not None and given.model is model
    assert not values_rotated(model) and same_state(model, before)
    assert all(codec.rotates_values for codec in given.codecs)
    assert not same_state(own.model, before)

    tokens = ids(2, 150)
    exact = logits(model, tokens)
    found = [feed(qm, tokens, None, [150], "B")[0] for qm in (given, own)]
    near(found[0], found[1], exact)

    # The folded model, given as an object, is used as it is.
    after = state(own.model)
    again = load_quantized_model(own.model, quantizer=saved / "q.json")
    assert again.codecs is not None and same_state(own.model, after)
    assert not any(codec.rotates_values for codec in again.codecs)
    assert torch.equal(feed(again, tokens, None, [150], "B")[0], found[1])


@pytest.mark.refused(
    "adapters of values or outputs, added to a model that was loaded from a folder for `allocated`",
    "the projection, whose weights are rotated; give `load_quantized_model` the loaded model",
)
def test_a_folded_model_gets_no_adapters(saved: Path) -> None:
    """An adapter is trained with plain values, and the folded ones are rotated."""
    own = load_quantized_model(saved / "model", quantizer=saved / "q.json", device="cpu")
    before, tokens = state(own.model), ids(1, 40)
    for name in ("v_proj", "o_proj"):
        with pytest.raises(UserError, match=f"model: {name} has the rotation of values .* object"):
            adapted(copy.deepcopy(own.model), (name,))
    assert same_state(own.model, before)
    adapted(own.model, ("q_proj", "k_proj"))
    given = load_quantized_model(load_base_model(saved / "model", device="cpu")[0], SPEC,
                                 quantizer=saved / "q.json")  # fmt: skip
    adapted(given.model, ("q_proj", "k_proj"))
    exact = logits(given.model, tokens)
    torch.testing.assert_close(logits(own.model, tokens), exact, atol=1e-4, rtol=1e-4)
    adapted(given.model, ("v_proj", "o_proj"))
    changed = logits(given.model, tokens)
    assert relative_error(changed, exact) > 0.1
    assert relative_error(feed(given, tokens, None, [40], "B")[0], changed) < 0.1


def test_without_rotation_a_folder_s_model_stays_plain(saved: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"rotation": False})
    weights = FileHashes(saved / "model", "model").of("model.safetensors")
    path = save_made_quantizer(tmp_path / "q.json", spec, weights, narrow_tables(spec, 2, 16))
    qm = load_quantized_model(saved / "model", quantizer=path, device="cpu")
    assert not values_rotated(qm.model)
    read = load_quantized_model(saved / "model", device="cpu").model
    assert same_state(qm.model, state(read))


def test_a_folder_whose_weights_cannot_be_rotated_is_rotated_by_the_codec(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvquant.models import loading

    plain = loading.load_base_model

    def with_adapter(*args: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = plain(*args, **options)
        subclass(model)
        return model, tokenizer

    monkeypatch.setattr(loading, "load_base_model", with_adapter)
    qm = load_quantized_model(saved / "model", quantizer=saved / "q.json", device="cpu")
    assert qm.codecs is not None and all(codec.rotates_values for codec in qm.codecs)
    assert not values_rotated(qm.model)
    monkeypatch.undo()
    own = load_quantized_model(saved / "model", quantizer=saved / "q.json", device="cpu")
    tokens = ids(2, 150)
    exact = logits(qm.model, tokens)
    found = [feed(one, tokens, None, [150], "B")[0] for one in (qm, own)]
    near(found[0], found[1], exact)
