"""Joins caches of single prompts to the cache of a batch.

A long prompt fills a GPU by itself, so that prompts are best prefilled one after the other, with
the activations of one in memory, and decoded together. Packed blocks are not copied or moved: the
joined cache takes over the arenas, and only 16-bit sinks and tails are put side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvquant.cache.fp16_layer import Fp16Layer
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.window_layer import WindowLayer
from kvquant.errors import UserError


def join_caches(caches: Iterable[Any]) -> Any:
    """Joins caches to one that holds all their sequences, in order.

    The given caches are used up: they are empty afterwards. Sequences of different lengths become
    left-padded columns, so that later calls need the mask and the positions of such a batch. Where
    memory runs out while unquantized caches are joined, all of them are empty.

    Args:
        caches: At least one filled cache, all of one scheme and model.

    Returns:
        The first cache, with the sequences of the others appended.

    Raises:
        UserError: A cache is empty, runs a call, cannot be joined, or differs from the first.
        OutlierOverflow: A cache has lost outliers for lack of room.
    """
    caches = list(caches)
    if not caches:
        raise UserError("caches: there is none to join")
    layers = [id(layer) for cache in caches for layer in getattr(cache, "layers", ())]
    if len({id(cache) for cache in caches}) < len(caches) or len(set(layers)) < len(layers):
        raise UserError("caches: one is given twice; join copies of it")
    first, rest = caches[0], caches[1:]
    for cache in rest:
        if type(cache) is not type(first):
            kinds = f"{type(first).__name__} and {type(cache).__name__}"
            raise UserError(f"caches: {kinds} cannot be joined; use caches of one scheme")
        if _prompt_attention(cache) != _prompt_attention(first):
            raise UserError(
                "caches: their prompts attend in different bits (prompt_attention); use caches of "
                "one scheme"
            )
    if isinstance(first, KVQuantCache):
        _check_quantized(first, rest)
        first.take_over(rest)
    elif isinstance(first, Cache) and all(isinstance(x, Fp16Layer) for x in first.layers):
        _join_unquantized(first, rest)
    else:
        raise UserError(
            f"caches: {type(first).__name__} cannot be joined; prefill all prompts in one call"
        )
    return first


def _prompt_attention(cache: Any) -> str:
    return str(getattr(cache, "prompt_attention", "16-bit"))


def _check_quantized(first: KVQuantCache, rest: list[KVQuantCache]) -> None:
    """Refuses caches whose sequences cannot be put side by side."""
    for cache in (first, *rest):
        cache.settle()
        if not cache.layout.table:
            raise UserError("caches: one is empty; call the model with its prompt first")
        if cache.kept_nbytes:
            raise UserError(
                "caches: positions that are not counted cannot be joined; prefill all prompts in "
                "one call"
            )
        kinds = [
            [getattr(layer, "codec", None) or getattr(layer, "window", None) for layer in x.layers]
            for x in (first, cache)
        ]
        # Without codecs, which are those of one model, the rotary embedding tells models apart.
        other = not first.packed and cache.rotary is not first.rotary
        if kinds[0] != kinds[1] or cache.protocol != first.protocol or other:
            raise UserError("caches: they are of different models, schemes or protocols")
        for mine, theirs in zip(first.layers, cache.layers, strict=True):
            _check_alike(*(_held(layer) for layer in (mine, theirs)))


def _held(layer: Any) -> torch.Tensor:
    """Returns some of a layer's 16-bit keys, `[batch_size, heads, n, dim]`."""
    held = layer.ring if isinstance(layer, WindowLayer) else layer.store.tail
    assert held is not None  # the cache is filled
    keys: torch.Tensor = held[0]
    return keys


def _check_alike(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuses keys `[batch_size, heads, n, dim]` of other heads, channels, dtype or device."""
    names = ("kv heads", "head_dim", "dtype", "device")
    pair = [(x.shape[1], x.shape[3], x.dtype, x.device) for x in (mine, theirs)]
    for name, held, found in zip(names, *pair, strict=True):
        if held != found:
            raise UserError(f"caches: one has {name} {found}, the first {held}; join caches alike")


def _join_unquantized(first: Cache, rest: list[Cache]) -> None:
    """Appends the sequences layer by layer, so that only one layer is in memory twice."""
    every = [first, *rest]
    if len({len(cache.layers) for cache in every}) > 1 or not first.layers:
        raise UserError("caches: one is empty; call the model with its prompt first")
    for cache in every:
        for mine, theirs in zip(first.layers, cache.layers, strict=True):
            if theirs.keys is None or not theirs.get_seq_length():
                raise UserError("caches: one is empty; call the model with its prompt first")
            _check_alike(mine.keys, theirs.keys)
    try:
        for layers in zip(*(cache.layers for cache in every), strict=True):
            _join_layers(list(layers))
    except BaseException:  # some layers are joined, others are not
        for cache in every:
            for layer in cache.layers:
                _empty(layer)
        raise


def _join_layers(layers: list[Any]) -> None:
    """Appends the sequences of the other layers to those of the first, and empties the others."""
    columns = max(layer.get_seq_length() for layer in layers)
    keys, values = (
        _side_by_side([getattr(layer, name) for layer in layers], columns)
        for name in ("keys", "values")
    )
    for other in layers[1:]:
        _empty(other)
    layers[0].keys, layers[0].values = keys, values
    _moved(layers[0])


def _empty(layer: Any) -> None:
    layer.keys = layer.values = None
    layer.is_initialized = False
    _moved(layer)


def _moved(layer: Any) -> None:
    """Tells a layer with an allocation of its own that its keys and values lie elsewhere now."""
    moved = getattr(layer, "_moved", None)
    if moved is not None:
        moved()


@torch.inference_mode()
def _side_by_side(parts: list[torch.Tensor], columns: int) -> torch.Tensor:
    """Returns `[batch_size, heads, columns, head_dim]` of all parts, padded on the left."""
    batch, (_, heads, _, dim) = sum(len(part) for part in parts), parts[0].shape
    out = parts[0].new_zeros((batch, heads, columns, dim))
    at = 0
    for part in parts:
        out[at : at + len(part), :, columns - part.shape[2] :] = part
        at += len(part)
    return out
