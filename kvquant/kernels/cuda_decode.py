"""Decode attention from packed blocks by the CUDA kernel `cuda/decode.cu`.

What a launch needs and where it comes from: pointers of the arenas (one table a layer), the
sequences' blocks and lengths (one table for all layers), rotary tables, and the 16-bit tokens.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.decode_tables import HeadTables, RopeTables, head_table_bytes

PROGRAMS = 2  # that a multiprocessor's registers and shared memory are shared by
KTILES = 1  # tiles of 16 tokens of keys that a warp takes together
OVERHEAD = 0.8  # chunks of each warp that begin and end of a program last as long as
COMBINE = 256  # threads of the second pass, as in the source file


class _Args(ctypes.Structure):
    """`struct Args` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "sink_keys", "sink_values", "tail_keys", "tail_values", "arenas", "table",
            "lengths", "head_tables", "value_levels", "rope", "phases", "thetas", "part_out",
            "part_sum",
        )),
        *((name, ctypes.c_int) for name in (
            "heads", "table_stride", "sink_room", "tail_room", "chunks_a_split",
        )),
        ("scaling", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class DecodeShape:
    """What the kernel is compiled for.

    Attributes:
        bits: 2, 3 or 4.
        head_dim: 64, 128 or 256.
        group: Query heads a kv head.
        block_size: Tokens a block.
        dtype: fp16 or bf16.
        outliers: Whether there are any.
        fraction: About how many, to choose how many a thread takes at a time.
    """

    bits: int
    head_dim: int
    group: int
    block_size: int
    dtype: torch.dtype
    outliers: bool
    fraction: float = 0.01

    @property
    def chunk(self) -> int:
        """Tokens a warp takes at a time."""
        return min(self.block_size, 64)

    @property
    def warps(self) -> int:
        """Warps a program; they share its tables, and each has an output of its own."""
        return 8 if self.group * self.head_dim <= 1024 else 4

    def split(self, shared_bytes: int) -> int:
        """Most chunks a program takes; a whole number of blocks.

        Args:
            shared_bytes: Shared memory of a multiprocessor, which two programs shall share.
        """
        least = max(self.warps, self.block_size // self.chunk)
        most = 8 * least
        while most > least and self.space_bytes(most) > shared_bytes // PROGRAMS - 1024:
            most -= least
        return most

    @property
    def rounds(self) -> int:
        """Outliers a lane and block that wait in shared memory: half more than on average."""
        elements = self.block_size * self.head_dim
        return min(8, max(1, math.ceil(1.5 * self.fraction * elements / 32)))

    def space_bytes(self, split: int) -> int:
        """Room for a program's shared memory, `struct Space` of the source, which checks it."""
        chunk, half, dim, group = self.chunk, self.head_dim // 2, self.head_dim, self.group
        words, blocks, warps = dim // 32, split * self.chunk // self.block_size, self.warps
        position = position_dtype(self.block_size * dim).itemsize
        tables = chunk * (half * 4 + 64) + warps * group * (words * 4 + 1) * 16 + split * half * 4
        outputs = warps * group * dim * 4
        room = self.rounds * 32
        lists = blocks * ((room + 16 // position) * position + (room + 8) * 2)
        scores = group * (split * chunk + 8) * 4
        queries = dim * (1 << (group - 1).bit_length()) * 4 + dim * 8 + group * dim * 8
        numbers = warps * (group * 12 + 4) + blocks * (self.block_size * 4 + 76) + 4
        calibration = head_table_bytes(self.bits, dim)
        total = max(tables, outputs) + lists + scores + queries + calibration + numbers
        return total + 128  # members are aligned

    def constants(self, shared_bytes: int) -> dict[str, int]:
        """Macros of the source file.

        Args:
            shared_bytes: Shared memory of a multiprocessor.
        """
        elements, split = self.block_size * self.head_dim, self.split(shared_bytes)
        return {
            "BITS": self.bits,
            "DIM": self.head_dim,
            "GROUP": self.group,
            "SIZE": self.block_size,
            "POS32": int(position_dtype(elements) is torch.int32),
            "COUNT32": int(count_dtype(elements) is torch.int32),
            "BF16": int(self.dtype is torch.bfloat16),
            "OUTLIERS": int(self.outliers),
            "WARPS": self.warps,
            "MIN_BLOCKS": PROGRAMS,
            "KTILES": KTILES,
            "SPLIT": split,
            "SPACE": self.space_bytes(split),
            "HEAD_BYTES": head_table_bytes(self.bits, self.head_dim),
            "ROUNDS": self.rounds,
        }


def shared_memory(device: int) -> int:
    """Bytes of shared memory of a GPU's multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def functions(shape: DecodeShape, device: int) -> tuple[Function, Function]:
    """The kernel and its second pass, compiled for a GPU."""
    constants = shape.constants(shared_memory(device))
    module = load("decode.cu", tuple(constants.items()), device)
    return module.function("decode", module.number("space_bytes")), module.function("combine")


def plan_splits(
    batch: int,
    heads: int,
    chunks: int,
    multiprocessors: int,
    most: int,
    warps: int,
    multiple: int = 1,
) -> tuple[int, int]:
    """How the past is cut: `(chunks a split, splits)`, without the split of 16-bit tokens.

    A program takes a multiple of its warps' number of chunks, `most` at most. Of the possible
    numbers the one is taken whose waves of programs last the shortest, where beginning and end of
    a program are taken to last as long as OVERHEAD chunks of each warp.
    """
    step = max(warps, multiple)
    if chunks == 0:
        return step, 0

    def lasts(each: int) -> float:
        programs = batch * heads * math.ceil(chunks / each)
        return math.ceil(programs / (PROGRAMS * multiprocessors)) * (each / warps + OVERHEAD)

    each = min(range(most // step * step, 0, -step), key=lasts)
    return each, math.ceil(chunks / each)


@dataclass
class DecodeStep:
    """What all layers of a decode step share.

    Attributes:
        table: int32 `[batch_size, room]`, the number of each block (`arena_table`).
        lengths: int32 `[batch_size, 3]`, sinks held, blocks, tokens in the tail with the new one.
        chunks: At least the chunks of the longest sequence.
        rope: Rotary tables for so many chunks.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    chunks: int
    rope: RopeTables


def decode_attention(
    shape: DecodeShape,
    query: torch.Tensor,
    sinks: tuple[torch.Tensor, torch.Tensor],
    tail: tuple[torch.Tensor, torch.Tensor],
    arenas: torch.Tensor,
    step: DecodeStep,
    tables: HeadTables,
    scaling: float,
) -> torch.Tensor:
    """Attention of one query a sequence over all its tokens.

    Args:
        shape: Of the cache.
        query: Rotated, `[batch_size, num_heads, head_dim]`, of `shape.dtype`.
        sinks: Keys before RoPE and values, `[batch_size, num_kv_heads, sinks, head_dim]`.
        tail: The same, `[batch_size, num_kv_heads, room, head_dim]`.
        arenas: int64 `[arenas, len(ARENA_FIELDS)]`, addresses.
        step: Where the tokens are.
        tables: The layer's calibration.
        scaling: Factor of the scores.

    Returns:
        `[batch_size, num_heads, head_dim]` in the type of the query.
    """
    batch, query_heads, dim = query.shape
    heads = tail[0].shape[1]
    device = query.device
    index = index_of(query)
    kernel, combine = functions(shape, index)
    per_block = shape.block_size // shape.chunk
    most = shape.split(shared_memory(index))
    each, splits = plan_splits(
        batch, heads, step.chunks, multiprocessors(index), most, shape.warps, per_block
    )
    splits += 1
    query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    part_out = torch.empty(batch * query_heads * splits * dim, dtype=torch.float32, device=device)
    part_sum = torch.empty(batch * query_heads * splits * 2, dtype=torch.float32, device=device)
    args = _Args(
        query.data_ptr(), sinks[0].data_ptr(), sinks[1].data_ptr(), tail[0].data_ptr(),
        tail[1].data_ptr(), arenas.data_ptr(), step.table.data_ptr(), step.lengths.data_ptr(),
        tables.heads.data_ptr(), tables.value_levels.data_ptr(), step.rope.places.data_ptr(),
        step.rope.phases.data_ptr(), step.rope.thetas.data_ptr(),
        part_out.data_ptr(), part_sum.data_ptr(), heads, step.table.stride(0), sinks[0].shape[2],
        tail[0].shape[2], each, scaling * math.log2(math.e),
    )  # fmt: skip
    kernel((heads, batch, splits), shape.warps * 32, args)
    combine(
        (batch * query_heads, 1, 1),
        COMBINE,
        ctypes.c_void_p(part_out.data_ptr()),
        ctypes.c_void_p(part_sum.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(splits),
    )
    return out
