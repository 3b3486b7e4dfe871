"""What a cache should allocate, from its scheme and lengths alone; tests hold torch against it.

Numbers of blocks come from the same plan that the cache follows (:mod:`kvquant.cache.layout`),
sizes from the definitions of the scheme. Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvquant.cache.layout import Layout
from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.study.schemes import KiviScheme, NuqScheme

HALF = 2  # bytes of a 16-bit number
GROWN_ROOM = 1.25  # room for outliers in an arena that is filled block by block


@dataclass(frozen=True)
class Blocks:
    """Blocks of one layer.

    Attributes:
        at_once: In arenas that one call filled to their end.
        grown: In arenas with room for later calls, unused places included.
        used: Blocks that hold tokens.
    """

    at_once: int
    grown: int
    used: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer.

    Attributes:
        codes: Packed codes of keys and values.
        scales: 16-bit zeros and scales.
        outliers: Values and positions of exact outliers.
        pointers: Where each (block, head) has its outliers, and how many.
        window: Sinks and tails in 16 bits, unused places included.
        tables: Shared by all sequences.
    """

    codes: int
    scales: int
    outliers: int
    pointers: int
    window: int
    tables: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.scales + self.outliers + self.pointers + self.window + self.tables


def plan_blocks(sinks: int, block_size: int, residual: int, calls: Sequence[list[int]]) -> Blocks:
    """Follows the cache's plan.

    Args:
        sinks: First tokens of each sequence kept in 16 bits.
        block_size: Tokens a block.
        residual: Most recent tokens that are not packed.
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
    scheme: NuqScheme | KiviScheme,
    heads: int,
    dim: int,
    calls: Sequence[list[int]],
    *,
    key_share: float | None = None,
    key_room: float = 1.0,
) -> Footprint:
    """Bytes of one layer after some calls.

    Args:
        scheme: NUQ or KIVI.
        heads: Key and value heads.
        dim: Elements of a head.
        calls: Tokens that each sequence gets, call by call.
        key_share: Share of key elements that are outliers; None: as calibrated.
        key_room: Slots over expected key outliers in arenas filled at once: 1 on a CPU, where their
            number is known; 1.5 on a GPU, where nobody waits for it.
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


def bits_per_element(footprint: Footprint, heads: int, dim: int, tokens: int) -> float:
    """Bits over key and value elements of `tokens` tokens (of all sequences)."""
    return 8 * footprint.total / (2 * heads * dim * tokens)


def fp16_bytes(heads: int, dim: int, tokens: int) -> int:
    """Bytes of one layer of an unquantized cache of `tokens` columns (of all sequences)."""
    return 2 * HALF * heads * dim * tokens


def prefill_excess(
    peak: int, cache_bytes: int, baseline_peak: int, baseline_cache_bytes: int
) -> int:
    """Peak of a prefill beyond weights, activations of the unquantized run and its own cache.

    What is left is what the quantization of a layer needs while it works; it must not exceed that
    of one layer. The baseline's peak, less its cache, stands for weights and activations.

    Args:
        peak: Peak bytes of the quantized run (`peak_bytes` of a throughput record).
        cache_bytes: Of the quantized cache.
        baseline_peak: Peak bytes of the unquantized run.
        baseline_cache_bytes: Of its cache.
    """
    return peak - cache_bytes - (baseline_peak - baseline_cache_bytes)
