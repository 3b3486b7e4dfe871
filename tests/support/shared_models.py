"""Tiny models that processes share: what their caches give, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvquant.cache.footprint import cache_elements, cache_nbytes
from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.models.base_model import load_base_model
from kvquant.models.generation import greedy
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.models.static_decoding import StaticDecoder
from kvquant.models.value_rotation import values_rotated
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import (
    AllocatedScheme,
    Fp8Scheme,
    Fp16StaticScheme,
    HfFp8Scheme,
    KvquantRefScheme,
)
from tests.support.cache_uses import USES, fed, sharpen
from tests.support.caches import EXACT, LOSSY, ids, step
from tests.support.head_codes import DIM, HEADS, KV_HEADS
from tests.support.hybrids import tiny_hybrid
from tests.support.model_features import FEATURES
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.quantizers import (
    narrow_tables,
    random_allocated,
    save_made_quantizer,
)

WITHOUT_PLAN = "stablelm"
ALLOCATED = AllocatedScheme(kind="allocated", bits=4.3, block_size=32)
FP8 = Fp8Scheme(kind="fp8", block_size=32)
PROMPTS = [[5, 9, 44], [7] * 60 + [3, 80], [12, 31] * 20]


def save(folder: Path, family: str, name: str | None = None, kv_heads: int = KV_HEADS) -> None:
    """Saves a tiny model with a tokenizer and the quantizers of its schemes.

    Args:
        folder: Where.
        family: Its family, with `+windows` for a hybrid one.
        name: The folder's name; None: that of the family.
        kv_heads: Its kv heads; each has two query heads.
    """
    name = name or family
    family, _, windows = family.partition("+")
    heads = HEADS // KV_HEADS * kv_heads
    if windows:
        model = tiny_hybrid(family, heads=heads, kv_heads=kv_heads, vocab_size=512)
    else:
        model = tiny_model(family, heads, kv_heads, vocab_size=512)
        sharpen(model)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    hashes = FileHashes(folder / name, "model")
    weights, _ = hashes.of_all(["model.safetensors"])
    layers = 1 if windows else 2
    for scheme, path in ((EXACT, "exact"), (LOSSY, "lossy"), (ALLOCATED, "allocated")):
        tables = narrow_tables(scheme, kv_heads, DIM, layers)
        if path == "allocated":
            tables = [random_allocated(kv_heads, DIM, seed=layer) for layer in range(layers)]
        file = folder / "quantizers" / f"{name}-{path}.json"
        file.parent.mkdir(exist_ok=True)
        save_made_quantizer(file, scheme, weights, tables, kv_heads)


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
    answers = greedy(qm, PROMPTS, 8, batch_size=2, eos_ids=[])
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
