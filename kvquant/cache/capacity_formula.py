"""Computes what a whole model's cache should allocate, and how many tokens fit in a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvquant.cache.memory_formula import (
    NOTHING,
    Footprint,
    PackedBlocks,
    allocated_footprint,
    fp16_bytes,
    layer_footprint,
    packed_footprint,
    planned_footprint,
    window_footprint,
)
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.layer_quantizer import LayerTables
from kvquant.study.schemes import AllocatedScheme, KiviScheme, KvarnScheme, NuqScheme, SchemeSpec


def model_footprint(
    scheme: SchemeSpec,
    shape: tuple[int, int, int],
    calls: Sequence[list[int]],
    *,
    tables: Sequence[LayerTables] | None = None,
    windows: Sequence[int] = (),
    packed: PackedBlocks | None = None,
    shared: int = 0,
    key_room: float = 1.0,
) -> Footprint | None:
    """Computes the bytes of a whole model's cache after some calls.

    Args:
        scheme: The scheme.
        shape: Numbers of layers that see all tokens, of kv heads and of channels per head.
        calls: Tokens that each sequence gets, call by call.
        tables: Calibrated tables per layer. Allocated codes without them take their nominal bits.
        windows: The sliding windows of the other layers.
        packed: Size of a layer's blocks, for kinds of schemes without a formula of their own.
        shared: Bytes of a layer's tables that all sequences share, for allocated codes.
        key_room: See :func:`layer_footprint`.

    Returns:
        The bytes by what they hold; None for a kind of scheme without a formula.
    """
    layers, heads, dim = shape
    held = sum((window_footprint(w, heads, dim, calls) for w in windows), NOTHING)
    if scheme.kind in ("fp16", "fp16-static"):
        lengths = [sum(counts) for counts in zip(*calls, strict=True)]
        whole = layers * fp16_bytes(heads, dim, sum(lengths))
        seen = sum(fp16_bytes(heads, dim, min(n, w - 1)) for w in windows for n in lengths)
        return replace(NOTHING, window=whole + seen)
    if isinstance(scheme, NuqScheme | KiviScheme | KvarnScheme):
        return held + layer_footprint(scheme, heads, dim, calls, key_room=key_room).times(layers)
    if isinstance(scheme, AllocatedScheme) and tables is None:
        planned = planned_footprint(scheme, heads, dim, calls, tables=shared, key_room=key_room)
        return held + planned.times(layers)
    if isinstance(scheme, AllocatedScheme) and tables is not None:
        own = (layer for layer in tables if isinstance(layer, AllocatedLayer))
        each = (
            allocated_footprint(scheme, layer, calls, tables=shared, key_room=key_room)
            for layer in own
        )
        return sum(each, held)
    if packed is not None:
        return held + packed_footprint(packed, heads, dim, calls).times(layers)
    return None


def tokens_that_fit(
    scheme: SchemeSpec,
    tables: Sequence[LayerTables] | None,
    shape: tuple[int, int, int],
    prompt: int,
    memory: int,
    windows: Sequence[int] = (),
) -> int | None:
    """Returns how many tokens of prompts of one length should fit in a memory.

    Args:
        scheme: The scheme.
        tables: See :func:`model_footprint`.
        shape: Numbers of layers that see all tokens, of kv heads and of channels per head.
        prompt: Tokens of each prompt, stored at once.
        memory: Bytes for the cache, activations not counted.
        windows: The sliding windows of the other layers.

    Returns:
        The number of tokens; None for a kind of scheme without a formula.
    """
    found = model_footprint(scheme, shape, [[prompt]], tables=tables, windows=windows)
    return None if found is None else memory * prompt // found.total
