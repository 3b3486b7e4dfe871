"""Tensor parallelism: processes with some of the kv heads each give what one process gives.

They are started once for many checks; each returns what it found, and the tests compare it.
Also covers: formats.head_share, kernels.shared_outliers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvquant.cache.arena import Arena
from kvquant.cache.codec import Codec
from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.calibration.collect import calibrate
from kvquant.errors import OutlierOverflow, UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.formats.head_share import HeadShare
from kvquant.kernels.pytorch_fused import split_outliers
from kvquant.kernels.shared_outliers import split_shared_outliers
from kvquant.models.base_model import load_base_model
from kvquant.models.generation import greedy
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.static_decoding import StaticDecoder
from kvquant.models.tensor_parallel import plan_options
from kvquant.models.value_rotation import values_rotated
from kvquant.schemes.registry import build_codecs
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.scheme_kinds import SCHEME_KINDS
from kvquant.study.schemes import (
    AllocatedScheme,
    BlockGtqScheme,
    CqScheme,
    Fp8Scheme,
    Fp16StaticScheme,
    HfFp8Scheme,
    Int4HadamardScheme,
    KiviScheme,
    KvarnScheme,
    KvquantRefScheme,
    NuqScheme,
    TurboQuantScheme,
    WushKvScheme,
)
from tests.support.cache_uses import USES, fed, sharpen
from tests.support.caches import CLOSE, EXACT, LOSSY, ids, step
from tests.support.model_features import FEATURES
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.processes import in_processes
from tests.support.quantizers import (
    blocks,
    narrow_quantizers,
    narrow_tables,
    random_allocated,
    random_quantizer,
    relative_error,
    save_made_quantizer,
)

HEADS, KV_HEADS, DIM = 8, 4, 16
WITHOUT_PLAN = "stablelm"
FAMILIES = [name for name in MODEL_FAMILIES if name != WITHOUT_PLAN]
CHOSEN = ["llama", "qwen3", "phi3", "mixtral"]  # by norms, fused projections, experts
WINDOWS = "gemma3_text+windows"  # a hybrid cache, a tied head
ALLOCATED = AllocatedScheme(kind="allocated", bits=4.3, block_size=32)
FP8 = Fp8Scheme(kind="fp8", block_size=32)
PACKING: list[Any] = [
    NuqScheme(kind="nuq", bits=3, block_size=32, outliers=0.03),
    NuqScheme(kind="nuq", bits=2, block_size=32, outliers=0.0),
    NuqScheme(kind="nuq", bits=4, block_size=32, outliers=1.0),
    AllocatedScheme(kind="allocated", block_size=32),
    AllocatedScheme(kind="allocated", block_size=32, value_range="token-head"),
    AllocatedScheme(kind="allocated", block_size=32, value_range="token-unscaled", rotation=False),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    FP8,
    TurboQuantScheme(kind="turboquant", bits=3, block_size=32),
    Int4HadamardScheme(kind="int4-hadamard", block_size=32),
    KvarnScheme(kind="kvarn", bits=4, tile=32, sinks=1),
    BlockGtqScheme(kind="block-gtq", bits=2.5, value_bits=3, block_size=32),
    WushKvScheme(kind="wush-kv", bits=3, block_size=32),
    CqScheme(kind="cq", bits=2.0, channels=2, block_size=32),
]
ON_GPUS: list[Any] = [
    NuqScheme(kind="nuq", bits=3),
    AllocatedScheme(kind="allocated"),
    AllocatedScheme(kind="allocated", value_range="token-head"),
]
SHAPE = (3, KV_HEADS, 32, DIM)
PROMPTS = [[5, 9, 44], [7] * 60 + [3, 80], [12, 31] * 20]
TOLERANCE: dict[str, Any] = {"atol": 5e-4, "rtol": 5e-4}


def save(folder: Path, name: str) -> None:
    """Saves a tiny model of 4 kv heads with a tokenizer and the quantizers of its schemes."""
    family, _, windows = name.partition("+")
    extra: dict[str, Any] = {"tie_word_embeddings": True} if windows else {}
    if windows:
        extra |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model(family, HEADS, KV_HEADS, vocab_size=512, **extra)
    sharpen(model)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    hashes = FileHashes(folder / name, "model")
    weights, _ = hashes.of_all(["model.safetensors"])
    layers = 1 if windows else 2
    for scheme, path in ((EXACT, "exact"), (LOSSY, "lossy"), (ALLOCATED, "allocated")):
        tables = narrow_tables(scheme, KV_HEADS, DIM, layers)
        if path == "allocated":
            tables = [random_allocated(KV_HEADS, DIM, seed=layer) for layer in range(layers)]
        file = folder / "quantizers" / f"{name}-{path}.json"
        file.parent.mkdir(exist_ok=True)
        save_made_quantizer(file, scheme, weights, tables, KV_HEADS)


def load(folder: Path, name: str, path: str, tp_plan: str | None) -> QuantizedModel:
    """A saved model with the cache of one of its quantizers."""
    quantizer = folder / "quantizers" / f"{name}-{path}.json"
    return load_quantized_model(folder / name, quantizer=quantizer, tp_plan=tp_plan)


def short(folder: Path, name: str, tp_plan: str | None) -> torch.Tensor:
    """Logits of a prompt, of a chunk over packed blocks, and of steps."""
    qm = load(folder, name, "exact", tp_plan)
    cache = qm.new_cache()
    parts = ids(2, 54).split([35, 17, 1, 1], 1)
    return torch.cat([step(qm.model, cache, part) for part in parts], 1)


def of_family(folder: Path, name: str, tp_plan: str | None) -> dict[str, Any]:
    """What a family's caches give, by the name of a use."""
    qm = load(folder, name, "exact", tp_plan)
    found: dict[str, Any] = {use: USES[use](qm.model, qm.new_cache()) for use in USES}
    lossy = load(folder, name, "lossy", tp_plan)
    cache = lossy.new_cache()
    found["3 bits"] = fed(lossy.model, cache)
    found["bytes"], found["elements"] = cache_nbytes(cache), cache_elements(cache)
    found["plain"] = fed(qm.model, DynamicCache(config=qm.model.config))
    return found


def generated(folder: Path, tp_plan: str | None) -> dict[str, Any]:
    """Tokens that ways of generating give, and the caches of other schemes."""
    qm = load(folder, "llama", "exact", tp_plan)
    found: dict[str, Any] = {
        name: FEATURES[name](qm.model, qm.new_cache())
        for name in ("beam search", "prompt lookup", "sampling, several sequences")
    }
    answers = greedy(qm, PROMPTS, 24, batch_size=2, eos_ids=[])
    found["greedy"], found["row_elements"] = answers.tokens, answers.row_elements
    allocated = load(folder, "llama", "allocated", tp_plan)
    found["folded"] = values_rotated(allocated.model)
    for name, use in USES.items():
        found[f"allocated, {name}"] = use(allocated.model, allocated.new_cache())
    found["protocol B"] = fed(allocated.model, allocated.new_cache("B"))
    fused = load(folder, "phi3", "allocated", tp_plan)
    found["fused, folded"] = values_rotated(fused.model)
    if tp_plan is None:  # a model that is given keeps its weights, and rotates what it packs
        model, _ = load_base_model(folder / "phi3", device="cpu")
        fused = load_quantized_model(model, quantizer=folder / "quantizers/phi3-allocated.json")
    found["fused, allocated"] = fed(fused.model, fused.new_cache())
    for scheme in (Fp16StaticScheme(kind="fp16-static"), FP8):
        other = load_quantized_model(folder / "llama", scheme, tp_plan=tp_plan)
        cache = other.new_cache()
        found[scheme.kind] = fed(other.model, cache)
        found[f"bytes of {scheme.kind}"] = cache_nbytes(cache)
    return found


def tables_of(scheme: Any, dim: int = DIM, device: str = "cpu") -> list[Any] | None:
    """Tables of one layer whose heads differ."""
    if not scheme.registration.calibrated:
        return None
    if scheme.kind == "allocated":
        return [random_allocated(KV_HEADS, dim).to(device)]
    return [table.to(device) for table in narrow_tables(scheme, KV_HEADS, dim, 1)]


def coded(codec: Codec, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What a codec stores: what it reads back, and what it reads of unfinished blocks."""
    shape: Any = tuple(keys.shape)
    packed = codec.pack(keys, values)
    ranges = [packed.dense[name] for name in ("zero", "scale") if name in packed.dense]
    ranges = ranges if ranges and ranges[0].dim() == 2 else []
    return [*codec.unpack(packed, shape), *codec.fake(keys[:, :, :5], values[:, :, :5]), *ranges]


def codes(share: HeadShare | None) -> list[list[torch.Tensor]]:
    """What the codecs of all schemes store of a process's heads, or of all."""
    keys, values = blocks(1, SHAPE), blocks(2, SHAPE) * 3
    values[0, :, 3] = values[0, :, 4, :1]  # ties
    found = []
    for scheme in PACKING:
        codec = build_codecs(scheme, 1, tables_of(scheme), share)
        assert codec is not None
        own = [x if share is None else share.part(x, 1) for x in (keys, values)]
        found.append(coded(codec[0], *own))
    return found


def kernel_codes(share: HeadShare | None) -> list[list[torch.Tensor]]:
    """The same from the kernels of a GPU, which pack two calls of blocks into one arena."""
    found = []
    for scheme in ON_GPUS:
        codec = (build_codecs(scheme, 1, tables_of(scheme, 64, "cuda"), share) or [])[0]
        keys, values = (blocks(seed, (5, KV_HEADS, 64, 64)).cuda() for seed in (1, 2))
        both = [x if share is None else share.part(x, 1).contiguous() for x in (keys, values)]
        room = codec.reserve(5, both[0])
        assert room is not None  # kernels pack
        arena, status = Arena(5, room), torch.zeros(2, dtype=torch.int32, device="cuda")
        for part in (slice(0, 3), slice(3, 5)):
            codec.pack_into(arena.view(part), both[0][part], both[1][part], status)
        shape: Any = tuple(both[0].shape)
        read = codec.unpack(arena.view(slice(0, 5)), shape)
        found.append([x.cpu() for x in (*read, status)])
    return found


def on_gpus(folder: Path, tp_plan: str | None) -> dict[str, Any]:
    """What caches give on GPUs, where kernels pack and attend."""
    found: dict[str, Any] = {}
    for path in ("wide-lossy", "wide-allocated"):
        quantizer = folder / f"quantizers/{path}.json"
        qm = load_quantized_model(folder / "wide", quantizer=quantizer, tp_plan=tp_plan)
        cache = qm.new_cache()
        tokens = ids(2, 150).to(qm.device)
        parts = tokens.split([130, 12, *[1] * 8], 1)
        logits = torch.cat([step(qm.model, cache, part) for part in parts], 1)
        assert all(layer.store.packed_by_kernels for layer in cache.packed)
        cache.settle()
        found[f"{path}, refused"] = cache.step_refusals(qm.device)
        answers = greedy(qm, PROMPTS, 80, batch_size=3, eos_ids=[])  # long enough for a graph
        found[path] = (logits.float().cpu(), answers.tokens, qm.device.index)
        steps: Any = greedy(qm, PROMPTS, 80, batch_size=3, eos_ids=[], graph=False)
        assert steps.tokens == answers.tokens
    return found


def overflowing(folder: Path) -> dict[str, Any]:
    """What happens where the keys of one process's heads alone are unlike the calibration's."""
    quantizer = folder / "quantizers/wide-crowded.json"
    qm = load_quantized_model(folder / "wide", quantizer=quantizer, tp_plan="auto")
    cache = qm.new_cache()
    try:
        for part in ids(4, 400).to(qm.device).split([390, *[1] * 10], 1):
            step(qm.model, cache, part)
        cache.settle()
        told = ""
    except OutlierOverflow as error:
        told = str(error)
    answers = greedy(qm, [ids(1, 400)[0].tolist()], 8, batch_size=1, eos_ids=[])
    return {"told": told, "answers": answers.tokens}


def all_on_gpus(folder: Path) -> dict[str, Any]:
    """Everything that one of two processes with a GPU each finds."""
    found = on_gpus(folder, "auto")
    qm = load_quantized_model(folder / "wide", FP8, tp_plan="auto")
    found["codes"] = kernel_codes(qm.share)
    found["overflow"] = overflowing(folder)
    return found


def outlier_rows() -> torch.Tensor:
    """Rows with ties, zeros of both signs, and nothing but one number."""
    rows = (blocks(3, (1, 1, 40, 32))[0, 0] * 3).round()
    rows[1], rows[2, ::2], rows[2, 1::2] = 2.0, 0.0, -0.0
    return rows


def refusals(folder: Path, qm: QuantizedModel) -> dict[str, str]:
    """The errors for what processes that share a model cannot do."""
    cache = load_quantized_model(qm.model, Fp16StaticScheme(kind="fp16-static")).new_cache()
    uses: dict[str, Any] = {
        "calibrate": lambda: calibrate(qm.model, [list(range(40))], CalibrationSpec(windows=1)),
        "procedure": lambda: load_quantized_model(
            folder / "llama", KvquantRefScheme(kind="kvquant-ref", bits=3),
            quantizer=folder / "quantizers/procedure.json", tp_plan="auto",
        ),
        "quanto": lambda: load_quantized_model(
            folder / "llama", HfFp8Scheme(kind="hf-fp8"), tp_plan="auto"
        ),
        "device_map": lambda: load_quantized_model(
            folder / "llama", FP8, tp_plan="auto", device_map="auto"
        ),
        "device": lambda: load_quantized_model(folder / "llama", FP8, tp_plan="auto", device="cpu"),
        "plan": lambda: load_quantized_model(folder / "llama", FP8, tp_plan="mine"),
        "no plan": lambda: load_quantized_model(folder / WITHOUT_PLAN, FP8, tp_plan="auto"),
        "heads": lambda: load_quantized_model(folder / "three", FP8, tp_plan="auto"),
        "norms": lambda: load_quantized_model(folder / "norms", FP8, tp_plan="auto"),
        "loaded": lambda: load_quantized_model(qm.model, FP8, tp_plan="auto"),
        "graph": lambda: StaticDecoder(qm.model, cache, torch.ones(1, 1), 2),
    }  # fmt: skip
    found = {}
    for name, use in uses.items():
        try:
            use()
        except (UserError, ValueError) as error:
            found[name] = str(error)
    return found


def all_of(folder: Path, families: list[str]) -> dict[str, Any]:
    """Everything that one of two processes finds."""
    found: dict[str, Any] = {name: short(folder, name, "auto") for name in families}
    found |= {f"all of {name}": of_family(folder, name, "auto") for name in CHOSEN}
    found["generated"] = generated(folder, "auto")
    qm = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    given = AutoModelForCausalLM.from_pretrained(
        folder / "llama", dtype=torch.float32, tp_plan="auto"
    )
    of_loaded = load_quantized_model(given, FP8)
    assert of_loaded.share == qm.share
    found["loaded"] = fed(of_loaded.model, of_loaded.new_cache())
    assert qm.share is not None
    found["share"] = (qm.share.rank, qm.share.count, qm.share.own)
    found["codes"] = codes(qm.share)
    rows = outlier_rows()
    found["outliers"] = [
        split_shared_outliers(qm.share.part(rows, 1), side, qm.share) for side in (0, 1, 5, 15, 16)
    ]
    found["refused"] = refusals(folder, qm)
    return found


def some_of(folder: Path) -> dict[str, Any]:
    """What one of four processes, with one head each, finds."""
    found: dict[str, Any] = {
        name: short(folder, name, "auto") for name in ("llama", "phi3", "mixtral")
    }
    qm = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    assert qm.share is not None
    found["codes"] = codes(qm.share)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("models")
    for name in [*FAMILIES, WINDOWS, WITHOUT_PLAN]:
        save(made, name)
    for name, model in (
        ("three", tiny_model("llama", 6, 3, vocab_size=512)),
        ("norms", tiny_model("cohere", HEADS, KV_HEADS, vocab_size=512, use_qk_norm=True)),
    ):
        model.save_pretrained(made / name)
        tiny_tokenizer().save_pretrained(made / name)
    scheme = KvquantRefScheme(kind="kvquant-ref", bits=3)
    weights, _ = FileHashes(made / "llama", "model").of_all(["model.safetensors"])
    tables = narrow_tables(scheme, KV_HEADS, DIM)
    save_made_quantizer(made / "quantizers/procedure.json", scheme, weights, tables, KV_HEADS)
    return made


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return in_processes(2, folder / "two", all_of, folder, [*FAMILIES, WINDOWS])


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    """What each of four processes found."""
    return in_processes(4, folder / "four", some_of, folder)


def same_as_one(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Each process's logits are those of one process; it holds its part of what that holds."""
    for part in found:
        for use in USES:
            torch.testing.assert_close(part[use], one[use], **CLOSE)
            torch.testing.assert_close(part[use], found[0][use], atol=0, rtol=0)
        torch.testing.assert_close(part["chunks and steps"], one["plain"], **CLOSE)
        # Rounding may move single numbers to the next code.
        assert float((part["3 bits"] - one["3 bits"]).abs().mean()) < 1e-3
        assert part["elements"] * len(found) == one["elements"]
    total = sum(part["bytes"] for part in found)
    assert one["bytes"] <= total < 1.15 * one["bytes"]


@pytest.mark.feature("tensor parallel, 2 processes")
@pytest.mark.parametrize("family", [*FAMILIES, WINDOWS])
def test_two_processes(family: str, folder: Path, two: list[dict[str, Any]]) -> None:
    one = short(folder, family, None)
    for part in two:
        torch.testing.assert_close(part[family], one, **CLOSE)
        assert torch.equal(part[family], two[0][family])


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_four_processes_with_a_head_each(
    family: str, folder: Path, four: list[dict[str, Any]]
) -> None:
    one = short(folder, family, None)
    for part in four:
        torch.testing.assert_close(part[family], one, **CLOSE)


@pytest.mark.parametrize("family", CHOSEN)
def test_all_uses_of_a_cache(family: str, folder: Path, two: list[dict[str, Any]]) -> None:
    same_as_one([part[f"all of {family}"] for part in two], of_family(folder, family, None))


def test_generation_and_other_caches(folder: Path, two: list[dict[str, Any]]) -> None:
    one = generated(folder, None)
    for part in (part["generated"] for part in two):
        assert part["folded"] and one["folded"]
        assert one["fused, folded"] and not part["fused, folded"]  # rotated as they are packed
        assert part["greedy"] == one["greedy"]
        assert [2 * n for n in part["row_elements"]] == one["row_elements"]
        for name in ("beam search", "prompt lookup", "sampling, several sequences"):
            assert torch.equal(part[name], one[name])
        for name in [n for n in one if n.startswith(("allocated", "fused, a", "protocol"))]:
            assert float((part[name] - one[name]).abs().mean()) < 1e-3, name
        torch.testing.assert_close(part["fp16-static"], one["fp16-static"], **TOLERANCE)
        torch.testing.assert_close(part["fp8"], one["fp8"], **TOLERANCE)
        assert torch.equal(part["fp8"], two[0]["loaded"])
        for scheme in ("fp16-static", "fp8"):
            assert 2 * part[f"bytes of {scheme}"] == one[f"bytes of {scheme}"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_head_has_the_codes_that_one_process_gives_it(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    """Bit for bit, and ranges that all heads of a token share are those of all."""
    whole = codes(None)
    for rank, found in enumerate(request.getfixturevalue({2: "two", 4: "four"}[ranks])):
        share = HeadShare(rank, ranks, KV_HEADS)
        for scheme, parts, one in zip(PACKING, found["codes"], whole, strict=True):
            for part, every in zip(parts, one, strict=True):
                own = share.part(every, 1) if every.dim() == 4 else every
                assert torch.equal(part, own), scheme


def test_every_kind_that_splits_heads_is_compared() -> None:
    kinds = {kind.name for kind in SCHEME_KINDS.values() if kind.splits_heads}
    assert kinds == {scheme.kind for scheme in PACKING} | {"fp16", "fp16-static"}


def test_outliers_of_a_token_are_those_of_all_heads(two: list[dict[str, Any]]) -> None:
    rows = outlier_rows()
    for at, side in enumerate((0, 1, 5, 15, 16)):
        mask, low, high = split_outliers(rows, side)
        parts = [part["outliers"][at] for part in two]
        assert torch.equal(torch.cat([part[0] for part in parts], 1), mask)
        for part in parts:
            assert torch.equal(part[1], low)
            assert torch.equal(part[2], high)


def test_a_process_has_heads_by_its_rank(two: list[dict[str, Any]]) -> None:
    assert [part["share"] for part in two] == [(0, 2, slice(0, 2)), (1, 2, slice(2, 4))]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(
            "calibrate", "tp_plan: calibration sees all heads at once; load the model without",
            marks=pytest.mark.refused(
                "calibration of a model that processes share", "`tp_plan`; load it without"
            ),
        ),
        pytest.param(
            "procedure", "tp_plan: scheme kind 'kvquant-ref' codes the kv heads of a token together"
        ),
        pytest.param("quanto", "tp_plan: scheme kind 'hf-fp8' codes the kv heads of a token"),
        pytest.param("device_map", "device_map: cannot be given beside tp_plan"),
        pytest.param("device", "device: tp_plan gives each process its own; leave device out"),
        pytest.param("plan", "tp_plan: 'mine' is not 'auto'"),
        pytest.param("no plan", "tp_plan: transformers has no plan for StableLM; load the model"),
        pytest.param(
            "heads",
            "tp_plan: 2 processes cannot share 3 kv heads (num_key_value_heads) evenly; start 1 or "
            "3 (torchrun --nproc-per-node)",
        ),
        pytest.param("norms", "tp_plan: layer 0 has a norm for each head (q_norm)"),
        pytest.param("loaded", "model: is loaded; move or convert it before it is given"),
        pytest.param("graph", "model: processes share its heads (tp_plan); call the model"),
    ],
)  # fmt: skip
def test_refused_by_name(name: str, words: str, two: list[dict[str, Any]]) -> None:
    for part in two:
        assert part["refused"][name].startswith(words)


def test_without_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^tp_plan: there are no processes .* `torchrun"):
        load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    alone = load_quantized_model(folder / "llama", FP8, tp_plan="auto")
    assert alone.share is None


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("llama", HEADS, KV_HEADS).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=r"^tp_plan: 4 processes .* sees 2 GPU\(s\); start 2"):
        plan_options(config, "auto", "auto", None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of two machines
    assert plan_options(config, "auto", "auto", None)["distributed_config"].tp_size == 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    """Kernels pack and attend per process; their codes are those of one GPU bit for bit."""
    model = tiny_model(
        "llama", HEADS, KV_HEADS, vocab_size=512, head_dim=64, hidden_size=256,
        initializer_range=0.3, max_position_embeddings=1024,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    weights, _ = FileHashes(tmp_path / "wide", "model").of_all(["model.safetensors"])
    lossy = NuqScheme(kind="nuq", bits=3)
    crowded = [
        replace(t, key_scale=t.key_scale * torch.tensor([40.0, 40.0, 40.0, 0.0])[:, None])
        for t in narrow_quantizers(3, KV_HEADS, 64)
    ]
    tables = {
        "lossy": (lossy, [random_quantizer(KV_HEADS, 64, 3, scale=(10, 20)) for _ in range(2)]),
        "allocated": (
            AllocatedScheme(kind="allocated"),
            [random_allocated(KV_HEADS, 64, scale=(10, 20), seed=layer) for layer in range(2)],
        ),
        "crowded": (lossy, crowded),
    }
    (tmp_path / "quantizers").mkdir()
    for name, (scheme, layers) in tables.items():
        file = tmp_path / f"quantizers/wide-{name}.json"
        save_made_quantizer(file, scheme, weights, layers, KV_HEADS, 64)
    found = in_processes(2, tmp_path / "two", all_on_gpus, tmp_path, gpus=True)
    one, whole = on_gpus(tmp_path, None), kernel_codes(None)
    for rank, part in enumerate(found):
        share = HeadShare(rank, 2, KV_HEADS)
        for mine, every in zip(part["codes"], whole, strict=True):
            for x, all_heads in zip(mine[:2], every[:2], strict=True):
                assert torch.equal(x, share.part(all_heads, 1))
        for name in ("wide-lossy", "wide-allocated"):
            logits, tokens, _ = one[name]
            assert part[f"{name}, refused"] == one[f"{name}, refused"]
            assert relative_error(part[name][0], logits) < 0.05
            assert torch.equal(part[name][0], found[0][name][0])
            assert part[name][1] == found[0][name][1]
            assert part[name][2] == rank
            assert [len(x) for x in part[name][1]] == [len(x) for x in tokens]
    told = [part["overflow"] for part in found]
    assert told[0]["told"].startswith("outliers: ") and told[0]["told"] == told[1]["told"]
    assert told[0]["answers"] == told[1]["answers"]


PROGRAM = """
import sys
import torch.distributed
from kvquant import load_quantized_model
qm = load_quantized_model(sys.argv[1], quantizer=sys.argv[2], tp_plan="auto")
cache = qm.new_cache()
ids = qm.tokenizer("The cache", return_tensors="pt").input_ids.to(qm.device)
out = qm.model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
if qm.share.rank == 0:
    print(qm.share.ranks, out.shape[1] - ids.shape[1], cache.layers[0].store.kv_heads)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_program_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """As docs/multiple-gpus.md starts it."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    model = folder / "llama"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file, model]
    done = subprocess.run(
        [sys.executable, *map(str, command), folder / "quantizers/llama-allocated.json"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "40", "2"]
