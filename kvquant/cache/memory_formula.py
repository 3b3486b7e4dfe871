"""Computes what a cache should allocate from its scheme and its lengths alone.

Numbers of blocks come from the plan that the cache follows (:mod:`kvquant.cache.layout`), sizes
from the definition of the scheme. Nothing is allocated here; tests compare the results with what
torch allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from kvquant.cache.layout import Layout
from kvquant.cache.window_plan import ring_capacity
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.quantization.block_input import SPARE_SLOTS
from kvquant.study.schemes import AllocatedScheme, KiviScheme, KvarnScheme, NuqScheme

HALF = 2  # bytes of a 16-bit number
GROWN_ROOM = 1.25  # outlier slots over expected outliers in an arena that is filled block by block


@dataclass(frozen=True)
class Blocks:
    """The numbers of blocks of one layer.

    Attributes:
        at_once: Blocks in arenas that one call filled completely.
        grown: Blocks in arenas with room for later calls, unused places included.
        used: Blocks that hold tokens.
        arenas: Blocks of each arena, unused places included.
    """

    at_once: int
    grown: int
    used: int
    arenas: tuple[int, ...]

    def key_slots(self, share: float, elements: int, key_room: float) -> float:
        """Computes the slots for key outliers.

        Args:
            share: Share of key elements that are outliers.
            elements: Key elements of a block.
            key_room: See :func:`layer_footprint`.
        """
        if key_room == 1 or share == 0:
            return share * elements * (self.at_once * key_room + self.grown * GROWN_ROOM)
        whole = [count * elements for count in self.arenas]
        return sum(min(key_room * share * each + SPARE_SLOTS, each) for each in whole)


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

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, layers: int) -> Footprint:
        """Returns the bytes of several layers of this kind."""
        return Footprint(*(layers * n for n in astuple(self)))


NOTHING = Footprint(codes=0, scales=0, outliers=0, pointers=0, window=0, tables=0)


@dataclass(frozen=True)
class PackedBlocks:
    """The size of a layer's packed blocks, for schemes whose blocks all take the same bytes.

    Attributes:
        sinks: First tokens of each sequence in 16 bits.
        block_size: Tokens per block.
        residual: Most recent tokens in 16 bits.
        nbytes: Bytes of one packed block of all heads.
        shared: Bytes of tables that all sequences share.
    """

    sinks: int
    block_size: int
    residual: int
    nbytes: int
    shared: int


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
    arenas = tuple(arena.capacity for arena in layout.arenas)
    return Blocks(at_once, sum(arenas) - at_once, sum(len(t) for t in layout.table), arenas)


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
            number is known, and 1.5 on a GPU, where the host does not wait for it, so that each
            arena has `SPARE_SLOTS` more.
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
    entries = blocks.key_slots(share, size * channels, key_room)
    entries += size * kept * (blocks.at_once + blocks.grown * GROWN_ROOM)
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
    entry = HALF + position_dtype(size * dim).itemsize
    pointer = 4 + count_dtype(size * dim).itemsize
    return Footprint(
        codes=capacity * size * (layer.key_rows().token_bytes + layer.value_rows().token_bytes),
        scales=2 * HALF * capacity * size * (heads if scheme.value_range == "token-head" else 1),
        outliers=round(blocks.key_slots(share, size * heads * dim, key_room) * entry),
        pointers=capacity * heads * pointer if scheme.outliers > 0 else 0,
        window=2 * HALF * batch * heads * dim * (scheme.sinks + size),
        tables=tables,
    )


def planned_footprint(
    scheme: AllocatedScheme,
    heads: int,
    dim: int,
    calls: Sequence[list[int]],
    *,
    tables: int = 0,
    key_room: float = 1.0,
) -> Footprint:
    """Computes the mean bytes of a layer of allocated codes whose widths are not calibrated yet.

    Calibration spends `bits` of the scheme per element of full blocks, outliers, pointers and
    scales included. All of these count as codes here; slots for outliers that are not expected are
    added.

    Args:
        scheme: The scheme.
        heads: Number of key/value heads.
        dim: Channels per head.
        calls: Tokens that each sequence gets, call by call.
        tables: Bytes of the tables that all sequences share.
        key_room: See :func:`layer_footprint`.
    """
    size, channels = scheme.block_size, heads * dim
    blocks = plan_blocks(scheme.sinks, size, 0, calls)
    elements = 2 * (blocks.at_once + blocks.grown) * size * channels
    slots = blocks.key_slots(scheme.outliers, size * channels, key_room)
    entry = HALF + position_dtype(size * dim).itemsize
    return replace(
        NOTHING,
        codes=round(elements * scheme.bits / 8),
        outliers=round(entry * (slots - scheme.outliers * elements / 2)),
        tables=tables,
        window=2 * HALF * len(calls[0]) * channels * (scheme.sinks + size),
    )


def packed_footprint(
    blocks: PackedBlocks, heads: int, dim: int, calls: Sequence[list[int]]
) -> Footprint:
    """Computes the bytes of one layer after some calls from those of one block.

    Args:
        blocks: Size of the blocks.
        heads: Number of key/value heads.
        dim: Channels per head.
        calls: Tokens that each sequence gets, call by call.
    """
    plan = plan_blocks(blocks.sinks, blocks.block_size, blocks.residual, calls)
    kept = blocks.sinks + blocks.block_size + blocks.residual
    return replace(
        NOTHING,
        codes=(plan.at_once + plan.grown) * blocks.nbytes,
        window=2 * HALF * len(calls[0]) * heads * dim * kept,
        tables=blocks.shared,
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
