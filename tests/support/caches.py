"""Quantized caches of tiny models, and how tests feed and read them."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.cache.block_store import BlockStore
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.layout import Layout
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.loading import QuantizedModel, install_attention
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.schemes import KiviScheme, NuqScheme
from tests.support.quantizers import narrow_tables

SPECS = [
    NuqScheme(kind="nuq", bits=4, block_size=32),
    NuqScheme(kind="nuq", bits=3, block_size=32, sinks=0),
    NuqScheme(kind="nuq", bits=2, block_size=64, outliers=0.0, sinks=5),
    KiviScheme(kind="kivi", bits=4, group=16, residual=16),
    KiviScheme(kind="kivi", bits=2, group=8, residual=0),
    NuqScheme(kind="nuq", bits=3, block_size=32, keys="after-rope"),
]
EXACT = NuqScheme(kind="nuq", bits=2, outliers=1.0, block_size=32)  # all outliers: 16 bits
LOSSY = NuqScheme(kind="nuq", bits=3, outliers=0.01, block_size=32)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CLOSE: dict[str, Any] = {"atol": 5e-3, "rtol": 5e-3}


def quantized(model: Any, spec: Any, quantizers: Any = None) -> QuantizedModel:
    """A model with the caches of a scheme.

    Args:
        model: A tiny model.
        spec: The scheme.
        quantizers: One per layer that sees all tokens; by default as many outliers as a few percent
            of the keys.
    """
    config = model.config
    every, heads = config.num_hidden_layers, config.num_key_value_heads
    kinds = layer_kinds(model.model)
    layers = len(kinds.full)
    if quantizers is None and spec.registration.calibrated:
        quantizers = narrow_tables(spec, heads, config.head_dim, layers)
    if quantizers is not None:
        quantizers = [q.to(model.device) for q in quantizers]
    install_attention(model)
    shape = ModelShape(every, heads, config.head_dim, kinds.windows, kinds.soft_cap)
    caches = build_caches(spec, shape, quantizers)
    return QuantizedModel(model, None, spec, build_codecs(spec, layers, quantizers), caches)


@torch.inference_mode()
def feed(
    qm: QuantizedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunks: list[int],
    protocol: Any = "A",
) -> tuple[torch.Tensor, Any]:
    """Runs the columns in chunks; returns logits `[batch, columns, vocabulary]` and the cache."""
    cache = qm.new_cache(protocol)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits, at = [], 0
    for size in chunks:
        part = slice(at, at + size)
        out = qm.model(
            input_ids=ids[:, part],
            attention_mask=None if mask is None else mask[:, : at + size],
            position_ids=None if positions is None else positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        at += size
    return torch.cat(logits, 1), cache


def ragged(lengths: list[int], side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random rows, and them padded: ids and mask."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, 97, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        width, n = ids.shape[1], len(row)
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[b, place], mask[b, place] = row, 1
    return rows, ids, mask


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def step(model: Any, cache: Any, tokens: torch.Tensor, mask: Any = None) -> torch.Tensor:
    """Logits of more tokens over a cache."""
    out = model(input_ids=tokens, past_key_values=cache, attention_mask=mask, use_cache=True)
    return out.logits


def contents(store: BlockStore, layout: Layout, row: int) -> list[torch.Tensor]:
    """All keys and values of a sequence, in order, `[heads, tokens, dim]`."""
    view = layout.view()
    blocks = [store.unpack(arena, slice(at, at + 1)) for arena, at in layout.table[row]]
    tails = store.read_tail(view, fake=False)
    assert store.sinks is not None
    sinks = min(layout.sinks, view.lengths[row])
    out = []
    for i in range(2):
        parts = [store.sinks[i][row, :, :sinks].float(), *(b[i][0] for b in blocks)]
        out.append(torch.cat([*parts, tails[i][row, :, : view.tails[row]].float()], 1))
    return out


def stored(cache: KVQuantCache, row: int) -> list[torch.Tensor]:
    """Keys and values of every layer that one sequence has in the cache."""
    out = [x for layer in cache.layers for x in contents(layer.store, cache.layout, row)]
    assert all(x.shape[1] == cache.layout.view().lengths[row] for x in out)
    return out
