"""Triton kernels that expand packed blocks into a 16-bit workspace, for attention on tiles.

There are two launches (:class:`kvquant.kernels.triton_workspace.Workspace`). The first puts exact
outliers where they belong in the workspace, before RoPE, and marks them in a bitmap. The second
computes every element from its code, takes the marked ones from the workspace instead, rotates keys
and writes. No two programs share an element, so the result is the same in every run.

Sinks and the 16-bit tail are written by the same programs: a place of the workspace is a position
minus the first position of the range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels import arena_table
from kvquant.kernels.arena_table import ARENA_FIELDS, OUTLIER_FIELDS

# The encodings of `arena_table`, as constants that Triton's compiler reads.
PLACE_BITS = tl.constexpr(arena_table.PLACE_BITS)
PLACE_MASK = tl.constexpr(arena_table.MAX_PLACES - 1)
NUM_ARENA_FIELDS = tl.constexpr(len(ARENA_FIELDS))
NUM_OUTLIER_FIELDS = tl.constexpr(len(OUTLIER_FIELDS))
KEY_CODES, VALUE_CODES, VALUE_ZEROS, VALUE_SCALES, KEY_BEGIN = (
    tl.constexpr(ARENA_FIELDS.index(field))
    for field in ("key_codes", "value_codes", "value_zeros", "value_scales", "key_begin")
)
COUNT, POSITIONS, OUTLIERS = (
    tl.constexpr(OUTLIER_FIELDS.index(field)) for field in ("count", "positions", "outliers")
)


@triton.jit
def _arena_and_place(number):
    """Splits a block number into the arena and the place in it."""
    return number >> PLACE_BITS, number & PLACE_MASK


@triton.jit
def _place_outliers(
    arenas,
    table,
    lengths,
    workspace,
    bitmap,
    first,
    offset,
    places,
    table_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE_POSITIONS: tl.constexpr,
    WIDE_COUNTS: tl.constexpr,
    BF16: tl.constexpr,
    LANES: tl.constexpr,
):
    """Places the outliers of keys or values of one head and block, and marks them."""
    HALF: tl.constexpr = DIM // 2
    which, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    sequence = tl.program_id(2)
    ordinal = first + tl.program_id(0)
    if ordinal >= tl.load(lengths + sequence * 4 + 1):
        return
    entry = tl.load(table + sequence * table_stride + ordinal)
    arena, block = _arena_and_place(entry)
    fields = arenas + arena * NUM_ARENA_FIELDS + KEY_BEGIN + which * NUM_OUTLIER_FIELDS
    group = block * HEADS + head
    begin = tl.load(tl.load(fields).to(tl.pointer_type(tl.int32)) + group)
    counts = tl.load(fields + COUNT)
    if WIDE_COUNTS:
        count = tl.load(counts.to(tl.pointer_type(tl.int32)) + group)
    else:
        count = tl.load(counts.to(tl.pointer_type(tl.int16)) + group).to(tl.int32)
    positions, numbers = tl.load(fields + POSITIONS), tl.load(fields + OUTLIERS)
    row = (which * tl.num_programs(2) + sequence).to(tl.int64) * HEADS + head
    row = row * places + ordinal * SIZE + offset
    for at in range(0, count, LANES):
        lane = at + tl.arange(0, LANES)
        inside = lane < count
        if WIDE_POSITIONS:
            spots = positions.to(tl.pointer_type(tl.int32)) + begin + lane
            spot = tl.load(spots, mask=inside, other=0)
        else:
            short = positions.to(tl.pointer_type(tl.int16)) + begin + lane
            spot = tl.load(short, mask=inside, other=0).to(tl.int32) & 0xFFFF
        if BF16:
            source = numbers.to(tl.pointer_type(tl.bfloat16)) + begin + lane
            number = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        else:
            source16 = numbers.to(tl.pointer_type(tl.float16)) + begin + lane
            number = tl.load(source16, mask=inside, other=0.0).to(tl.float32)
        channel = spot % DIM
        place = row + spot // DIM
        out = workspace + place * DIM + channel
        tl.store(out, number.to(workspace.dtype.element_ty), mask=inside)
        # A word holds 16 channels and those that RoPE pairs them with.
        paired = channel % HALF
        bit = paired % 16 + 16 * (channel // HALF)
        one = tl.full((LANES,), 1, tl.int32) << bit
        tl.atomic_or(bitmap + place * WORDS + paired // 16, one, mask=inside, sem="relaxed")


@triton.jit
def _codes(rows, column, inside, BITS: tl.constexpr, DIM: tl.constexpr):
    """Unpacks the codes of the two halves of rows."""
    if BITS == 4:
        both = tl.load(rows + column, mask=inside, other=0).to(tl.int32)
        return both & 15, both >> 4
    QUARTER: tl.constexpr = DIM // 4
    EIGHTH: tl.constexpr = DIM // 8
    low = tl.load(rows + column % QUARTER, mask=inside, other=0).to(tl.int32)
    low = low >> (column // QUARTER * 2)
    first, second = low & 3, (low >> 4) & 3
    if BITS == 3:
        top = tl.load(rows + QUARTER + column % EIGHTH, mask=inside, other=0).to(tl.int32)
        top = top >> (column // EIGHTH)
        first |= (top & 1) << 2
        second |= ((top >> 4) & 1) << 2
    return first, second


@triton.jit
def _exact(out, words, column, inside, first, second, DIM: tl.constexpr):
    """Replaces the marked elements by the outliers that lie in the workspace already."""
    word = tl.load(words + column // 16, mask=inside, other=0) >> (column % 16)
    a, b = (word & 1) != 0, ((word >> 16) & 1) != 0
    first = tl.where(a, tl.load(out, mask=a, other=0.0).to(tl.float32), first)
    second = tl.where(b, tl.load(out + DIM // 2, mask=b, other=0.0).to(tl.float32), second)
    return first, second


@triton.jit
def _store(out, first, second, inside, DIM: tl.constexpr):
    tl.store(out, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + DIM // 2, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _copy(
    keys, values, room, token, column, inside, out_keys, out_values, cosine, sine, sequence, head,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Copies 16-bit tokens of one head, and rotates their keys."""
    at = (sequence.to(tl.int64) * HEADS + head) * room + token
    source = at[:, None] * DIM + column
    first = tl.load(keys + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(keys + source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    _store(
        out_keys, first * cosine - second * sine, second * cosine + first * sine, inside, DIM
    )  # fmt: skip
    first = tl.load(values + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(values + source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    _store(out_values, first, second, inside, DIM)


@triton.jit
def _expand(
    arenas,
    table,
    lengths,
    sink_keys,
    sink_values,
    tail_keys,
    tail_values,
    key_scale,
    key_zero,
    key_levels,
    value_levels,
    cos,
    sin,
    workspace,
    bitmap,
    low,
    base,
    places,
    tiles,
    sinks,
    sink_room,
    tail_room,
    table_stride,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BF16: tl.constexpr,
    T: tl.constexpr,
):
    """Expands some heads of a tile of tokens; block -1 is the sinks, the last one the tail."""
    HALF: tl.constexpr = DIM // 2
    ROW: tl.constexpr = DIM * BITS // 8
    ordinal = low + tl.program_id(0) // tiles
    begin = (tl.program_id(0) % tiles) * T
    sequence = tl.program_id(2)
    blocks = tl.load(lengths + sequence * 4 + 1)
    tail = tl.where(ordinal == blocks, tl.load(lengths + sequence * 4 + 2), 0)
    count = tl.where(ordinal < blocks, SIZE, tail)
    count = tl.where(ordinal < 0, tl.load(lengths + sequence * 4), count)
    if begin >= count:
        return
    token = begin + tl.arange(0, T)
    column = tl.arange(0, HALF)[None, :]
    inside = (token < count)[:, None] & (column < HALF)
    position = token + tl.where(ordinal < 0, 0, sinks + ordinal * SIZE)
    turn = position[:, None] * HALF + column
    cosine = tl.load(cos + turn, mask=inside, other=0.0)
    sine = tl.load(sin + turn, mask=inside, other=0.0)
    place = (position - base).to(tl.int64)
    apart = tl.num_programs(2).to(tl.int64) * HEADS * places  # from keys to values
    head = tl.program_id(1) * EACH
    if ordinal < 0:
        for _ in range(EACH):
            at = (sequence * HEADS + head) * places.to(tl.int64) + place
            out = workspace + at[:, None] * DIM + column
            _copy(
                sink_keys, sink_values, sink_room, token, column, inside, out,
                out + apart * DIM, cosine, sine, sequence, head, HEADS, DIM,
            )  # fmt: skip
            head += 1
        return
    if ordinal >= blocks:
        for _ in range(EACH):
            at = (sequence * HEADS + head) * places.to(tl.int64) + place
            out = workspace + at[:, None] * DIM + column
            _copy(
                tail_keys, tail_values, tail_room, token, column, inside, out,
                out + apart * DIM, cosine, sine, sequence, head, HEADS, DIM,
            )  # fmt: skip
            head += 1
        return
    entry = tl.load(table + sequence * table_stride + ordinal)
    arena, block = _arena_and_place(entry)
    fields = arenas + arena * NUM_ARENA_FIELDS
    block = block.to(tl.int64)
    keys = tl.multiple_of(tl.load(fields + KEY_CODES), 16).to(tl.pointer_type(tl.uint8))
    values = tl.multiple_of(tl.load(fields + VALUE_CODES), 16).to(tl.pointer_type(tl.uint8))
    if BF16:
        zeros = (
            tl.load(fields + VALUE_ZEROS).to(tl.pointer_type(tl.bfloat16)) + block * SIZE + token
        )
        scales = (
            tl.load(fields + VALUE_SCALES).to(tl.pointer_type(tl.bfloat16)) + block * SIZE + token
        )
        zero = tl.load(zeros, mask=token < count, other=0.0).to(tl.float32)[:, None]
        scale = tl.load(scales, mask=token < count, other=0.0).to(tl.float32)[:, None]
    else:
        zeros16 = (
            tl.load(fields + VALUE_ZEROS).to(tl.pointer_type(tl.float16)) + block * SIZE + token
        )
        scales16 = (
            tl.load(fields + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + block * SIZE + token
        )
        zero = tl.load(zeros16, mask=token < count, other=0.0).to(tl.float32)[:, None]
        scale = tl.load(scales16, mask=token < count, other=0.0).to(tl.float32)[:, None]
    for _ in range(EACH):
        at = (sequence * HEADS + head) * places.to(tl.int64) + place
        out = workspace + at[:, None] * DIM + column
        source = ((block * HEADS + head) * SIZE + token)[:, None] * ROW
        a, b = _codes(keys + source, column, inside, BITS, DIM)
        channel = head * DIM + column
        first = tl.load(key_levels + a) * tl.load(key_scale + channel)
        first += tl.load(key_zero + channel)
        second = tl.load(key_levels + b) * tl.load(key_scale + channel + HALF)
        second += tl.load(key_zero + channel + HALF)
        words = bitmap + at[:, None] * WORDS
        if OUTLIERS:
            first, second = _exact(out, words, column, inside, first, second, DIM)
        _store(
            out, first * cosine - second * sine, second * cosine + first * sine, inside, DIM
        )  # fmt: skip
        a, b = _codes(values + source, column, inside, BITS, DIM)
        first = tl.load(value_levels + a) * scale + zero
        second = tl.load(value_levels + b) * scale + zero
        out += apart * DIM
        if OUTLIERS:
            words += apart * WORDS
            first, second = _exact(out, words, column, inside, first, second, DIM)
        _store(out, first, second, inside, DIM)
        head += 1
