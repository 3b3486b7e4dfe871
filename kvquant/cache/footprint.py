"""Counts the bytes that any kind of cache has allocated and the elements of its tokens.

Where processes share a model's kv heads (`tp_plan`), both are those of this process.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kvquant.cache.block_layer import BlockLayer
from kvquant.cache.interface import CountedCache
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.cache.window_layer import WindowLayer


def cache_nbytes(cache: Cache) -> int:
    """Returns the bytes that a cache has allocated on its device."""
    if isinstance(cache, CountedCache):
        return cache.stored_nbytes()
    total = 0
    for layer in cache.layers:
        if isinstance(layer, BlockLayer):
            total += layer.store.nbytes
        elif isinstance(layer, WindowLayer):
            total += layer.nbytes
        elif layer.keys is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total + (cache.kept_nbytes if isinstance(cache, KVQuantCache) else 0)


def shared_nbytes(cache: Cache) -> int:
    """Returns the bytes that do not grow with the number of sequences, such as code tables."""
    if isinstance(cache, CountedCache):
        return cache.shared_nbytes()
    return sum(x.codec.shared_bytes for x in cache.layers if isinstance(x, BlockLayer))


def cache_elements(cache: Cache, mask: torch.Tensor | None = None) -> int:
    """Returns the number of key and value elements of the tokens in a cache.

    Of a layer with a sliding window, only the tokens count that a later query sees.

    Args:
        cache: The cache.
        mask: `[batch_size, columns]` for an unquantized cache of a padded batch, which does not
            know what is padding. Padding then counts as memory without elements.
    """
    if isinstance(cache, CountedCache):
        return cache.stored_elements(mask)
    total = 0
    for layer in cache.layers:
        if isinstance(layer, BlockLayer):
            tail = layer.store.tail
            if tail is not None and isinstance(cache, KVQuantCache):
                total += 2 * tail[0].shape[1] * tail[0].shape[3] * sum(cache.lengths)
        elif isinstance(layer, WindowLayer) and isinstance(cache, KVQuantCache):
            total += layer.elements(cache.lengths)
        elif layer.keys is not None:
            batch, heads, columns, dim = layer.keys.shape
            tokens = batch * columns if mask is None else _tokens(mask, columns)
            total += 2 * heads * dim * tokens
    return total


def _tokens(mask: torch.Tensor, columns: int) -> int:
    """Returns the number of tokens in the last columns of a batch, which a layer holds."""
    return int(mask[:, mask.shape[1] - columns :].sum())
