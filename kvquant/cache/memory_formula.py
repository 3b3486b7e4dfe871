"""Computes what a cache should allocate from its scheme and its lengths alone.

Numbers of blocks come from the plan that the cache follows (:mod:`kvquant.cache.layout`), sizes
from the definition of the scheme. Nothing is allocated here; tests compare the results with what
torch allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvquant.cache.layout import Layout
from kvquant.cache.window_plan import ring_capacity
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.layer_quantizer import LayerTables, outliers_per_side
from kvquant.study.schemes import AllocatedScheme, KiviScheme, KvarnScheme, NuqScheme, SchemeSpec

HALF = 2  # bytes of a 16-bit number
GROWN_ROOM = 1.25  # outlier slots over expected outliers in an arena that is filled block by block


@dataclass(frozen=True)
class Blocks:
    """The numbers of blocks of one layer.

    Attributes:
        at_once: Blocks in arenas that one call filled completely.
        grown: Blocks in arenas with room for later calls, unused places included.
        used: Blocks that hold tokens.
    """

    at_once: int
    grown: int
    used: int


@dataclass(frozen=True)
class Footprint:
    """The bytes of one layer, by what they hold.

    Attributes:
        codes: Packed codes of keys and values.
        scales: 16-bit zeros and scales.
        outliers: Values and positions of outliers.
        pointers: Offset and number of the outliers of each (block, head).
        window: Sinks and tails in 16 bits, unused places included.
        tables: Tables shared by all sequences.
    """

    codes: int
    scales: int
    outliers: int
    pointers: int
    window: int
    tables: int

    @property
    def total(self) -> int:
        """The bytes in total."""
        return self.codes + self.scales + self.outliers + self.pointers + self.window + self.tables


def plan_blocks(sinks: int, block_size: int, residual: int, calls: Sequence[list[int]]) -> Blocks:
    """Counts the blocks that the cache's plan makes for some calls.

    Args:
        sinks: Number of first tokens of each sequence kept in 16 bits.
        block_size: Tokens per block.
        residual: Number of most recent tokens that are not packed.
        calls: Tokens that each sequence gets, call by call.
    """
    layout, at_once = Layout(sinks, block_size, residual), 0
    for counts in calls:
        plan = layout.append([slice(0, n) for n in counts])
        new = sum(plan.new_blocks(b) for b in range(len(counts)))
        at_once += new if plan.capacity == new else 0
    capacity = sum(arena.capacity for arena in layout.arenas)
    return Blocks(at_once, capacity - at_once, sum(len(t) for t in layout.table))


def layer_footprint(
    scheme: NuqScheme | KiviScheme | KvarnScheme,
    heads: int,
    dim: int,
    calls: Sequence[list[int]],
    *,
    key_share: float | None = None,
    key_room: float = 1.0,
) -> Footprint:
    """Computes the bytes of one layer after some calls.

    Args:
        scheme: A NUQ, KIVI or KVarN scheme.
        heads: Number of key/value heads.
        dim: Channels per head.
        calls: Tokens that each sequence gets, call by call.
        key_share: Share of key elements that are outliers; None: the share of the scheme.
        key_room: Slots over expected key outliers in arenas filled at once: 1 on a CPU, where their
            number is known, and 1.5 on a GPU, where the host does not wait for it.
    """
    batch, channels = len(calls[0]), heads * dim
    if isinstance(scheme, KiviScheme):
        size = scheme.group
        blocks = plan_blocks(scheme.sinks, size, scheme.residual, calls)
        capacity = blocks.at_once + blocks.grown
        elements = capacity * size * channels
        return Footprint(
            codes=2 * elements * scheme.bits // 8,
            scales=2 * 2 * HALF * elements // scheme.group,
            outliers=0,
            pointers=0,
            window=2 * HALF * batch * channels * (scheme.sinks + size + scheme.residual),
            tables=0,
        )
    if isinstance(scheme, KvarnScheme):
        size = scheme.tile
        blocks = plan_blocks(scheme.sinks, size, scheme.residual, calls)
        capacity = blocks.at_once + blocks.grown
        both_bits = scheme.bits + (scheme.value_bits or scheme.bits)
        return Footprint(
            codes=capacity * size * channels * both_bits // 8,
            # two numbers per channel and one per token for keys, the other way round for values
            scales=3 * HALF * capacity * heads * (size + dim),
            outliers=0,
            pointers=0,
            window=2 * HALF * batch * channels * (scheme.sinks + size + scheme.residual),
            tables=0,
        )
    size = scheme.block_size
    blocks = plan_blocks(scheme.sinks, size, 0, calls)
    capacity = blocks.at_once + blocks.grown
    tokens = capacity * size
    share = scheme.outliers if key_share is None else key_share
    kept = min(2 * outliers_per_side(scheme.outliers, channels), channels)
    per_token = share * channels * key_room + kept
    grown = GROWN_ROOM * (share * channels + kept)
    entries = size * (blocks.at_once * per_token + blocks.grown * grown)
    entry = HALF + position_dtype(size * dim).itemsize
    pointer = 4 + count_dtype(size * dim).itemsize
    return Footprint(
        codes=2 * tokens * channels * scheme.bits // 8,
        scales=2 * HALF * tokens,
        outliers=round(entries * entry),
        pointers=2 * capacity * heads * pointer if scheme.outliers > 0 else 0,
        window=2 * HALF * batch * channels * (scheme.sinks + size),
        tables=4 * (2 * channels + 2 * 2**scheme.bits),
    )


def allocated_footprint(
    scheme: AllocatedScheme,
    layer: AllocatedLayer,
    calls: Sequence[list[int]],
    *,
    tables: int,
    key_share: float | None = None,
    key_room: float = 1.0,
) -> Footprint:
    """Computes the bytes of one layer of allocated codes after some calls.

    Args:
        scheme: The scheme.
        layer: The layer's widths.
        calls: Tokens that each sequence gets, call by call.
        tables: Bytes of the tables that all sequences share.
        key_share: See :func:`layer_footprint`.
        key_room: See :func:`layer_footprint`.
    """
    batch, (heads, dim), size = len(calls[0]), layer.key_zero.shape, scheme.block_size
    blocks = plan_blocks(scheme.sinks, size, 0, calls)
    capacity = blocks.at_once + blocks.grown
    share = scheme.outliers if key_share is None else key_share
    filled = blocks.at_once * key_room + blocks.grown * GROWN_ROOM
    entry = HALF + position_dtype(size * dim).itemsize
    pointer = 4 + count_dtype(size * dim).itemsize
    return Footprint(
        codes=capacity * size * (layer.key_rows().token_bytes + layer.value_rows().token_bytes),
        scales=2 * HALF * capacity * size * (heads if scheme.value_range == "token-head" else 1),
        outliers=round(size * heads * dim * share * filled * entry),
        pointers=capacity * heads * pointer if scheme.outliers > 0 else 0,
        window=2 * HALF * batch * heads * dim * (scheme.sinks + size),
        tables=tables,
    )


def window_footprint(window: int, heads: int, dim: int, calls: Sequence[list[int]]) -> Footprint:
    """Computes the bytes of a layer with a sliding window after some calls.

    Args:
        window: Number of tokens that a query sees, itself included.
        heads: Number of key/value heads.
        dim: Channels per head.
        calls: Tokens that each sequence gets, call by call.
    """
    lengths, capacity = [0] * len(calls[0]), 0
    for counts in calls:
        lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
        capacity = ring_capacity(window, capacity, max(lengths))
    held = 2 * HALF * len(lengths) * heads * dim * capacity
    return Footprint(codes=0, scales=0, outliers=0, pointers=0, window=held, tables=0)


def bits_per_element(footprint: Footprint, heads: int, dim: int, tokens: int) -> float:
    """Returns bits per key or value element for `tokens` tokens of all sequences together."""
    return 8 * footprint.total / (2 * heads * dim * tokens)


def fp16_bytes(heads: int, dim: int, tokens: int) -> int:
    """Returns the bytes of one unquantized layer for `tokens` columns of all sequences."""
    return 2 * HALF * heads * dim * tokens


def prefill_excess(
    peak: int, cache_bytes: int, baseline_peak: int, baseline_cache_bytes: int
) -> int:
    """Returns a prefill's peak less weights, the unquantized run's activations and its own cache.

    The rest is what quantization needs while it works, which must not exceed that of one layer. The
    baseline's peak, less its cache, stands for weights and activations.

    Args:
        peak: Peak bytes of the quantized run (`peak_bytes` of a throughput record).
        cache_bytes: Bytes of the quantized cache.
        baseline_peak: Peak bytes of the unquantized run.
        baseline_cache_bytes: Bytes of its cache.
    """
    return peak - cache_bytes - (baseline_peak - baseline_cache_bytes)


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
        tables: Calibrated tables per layer, for schemes that have them.
        shape: Numbers of layers that see all tokens, of kv heads and of channels per head.
        prompt: Tokens of each prompt, stored at once.
        memory: Bytes for the cache, activations not counted.
        windows: The sliding windows of the other layers.

    Returns:
        The number of tokens; None for a kind of scheme without a formula.
    """
    layers, heads, dim = shape
    held = sum(window_footprint(w, heads, dim, [[prompt]]).total for w in windows)
    if scheme.kind in ("fp16", "fp16-static"):
        baseline = sum(fp16_bytes(heads, dim, min(prompt, w - 1)) for w in windows)
        return memory * prompt // (layers * fp16_bytes(heads, dim, prompt) + baseline)
    if isinstance(scheme, NuqScheme | KiviScheme | KvarnScheme):
        bytes_each = layers * layer_footprint(scheme, heads, dim, [[prompt]]).total
    elif isinstance(scheme, AllocatedScheme) and tables is not None:
        bytes_each = sum(
            allocated_footprint(scheme, layer, [[prompt]], tables=0).total
            for layer in tables
            if isinstance(layer, AllocatedLayer)
        )
    else:
        return None
    return memory * prompt // (bytes_each + held)
