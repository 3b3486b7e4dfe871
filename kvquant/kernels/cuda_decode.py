"""Decode attention from packed blocks by the CUDA kernel `cuda/decode.cu`.

A launch reads the arena table of its layer, block numbers and lengths that all layers share, rotary
tables, and the tokens that the cache keeps in 16 bits. The past is cut into splits (split-KV), one
thread block each, and a second kernel adds them up.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.cuda_structs import DecodeParams, allocated_table_struct, head_table_struct
from kvquant.kernels.decode_tables import HeadTables, RopeTables

BLOCKS_PER_SM = 2  # thread blocks that share a multiprocessor's registers and shared memory
KEY_TILES = 1  # tiles of 16 tokens of keys that a warp takes together
OVERHEAD = 0.8  # a thread block's begin and end last as long as so many chunks of each warp
COMBINE_THREADS = 256  # threads per thread block of the second kernel, as in the source file


@dataclass(frozen=True)
class DecodeShape:
    """The shape of a cache that the kernel is compiled for.

    Attributes:
        bits: Bits per code: 2, 3 or 4; of allocated codes the widest that is looked up, 3.
        head_dim: 64, 128 or 256.
        group: Query heads per kv head.
        block_size: Tokens per block.
        dtype: fp16 or bf16.
        outliers: Whether the cache keeps exact outliers. Allocated codes have some of keys alone.
        fraction: About which share of the elements are outliers. It decides how many of a block
            are staged in shared memory.
        allocated: Whether the codes are of the scheme kind `allocated`; else of `nuq`.
        range_per_head: Whether each head of a token's values has a range of its own.
        soft_cap: Bound of the scores, by which the hyperbolic tangent squeezes them; None: there is
            none. Kernels are compiled for having one, not for its value.
    """

    bits: int
    head_dim: int
    group: int
    block_size: int
    dtype: torch.dtype
    outliers: bool
    fraction: float = 0.01
    allocated: bool = False
    range_per_head: bool = False
    soft_cap: float | None = None

    @property
    def chunk(self) -> int:
        """The number of tokens that a warp takes at a time."""
        return min(self.block_size, 64)

    @property
    def warps(self) -> int:
        """Warps per thread block, which share its tables; each has an output of its own."""
        return 8 if self.group * self.head_dim <= 1024 else 4

    def split(self, shared_bytes: int) -> int:
        """Returns the largest number of chunks that a thread block takes: a whole number of blocks.

        Args:
            shared_bytes: Shared memory of a multiprocessor, which two thread blocks shall share.
        """
        smallest = max(self.warps, self.block_size // self.chunk)
        chunks = 8 * smallest
        while chunks > smallest and self.smem_bytes(chunks) > shared_bytes // BLOCKS_PER_SM - 1024:
            chunks -= smallest
        return chunks

    @property
    def rounds(self) -> int:
        """Outliers per lane and block that are staged: half more than there are on average."""
        elements = self.block_size * self.head_dim
        return min(8, max(1, math.ceil(1.5 * self.fraction * elements / 32)))

    @property
    def source(self) -> str:
        """The source file of the kernel."""
        return "decode_allocated.cu" if self.allocated else "decode.cu"

    @property
    def table(self) -> type[ctypes.Structure]:
        """The struct that holds a head's calibration."""
        if self.allocated:
            return allocated_table_struct(self.head_dim)
        return head_table_struct(self.bits, self.head_dim)

    def smem_bytes(self, split: int) -> int:
        """Counts a thread block's shared memory, `struct SharedStorage` of the source.

        The source refuses a count that is too small or far too large.

        Args:
            split: Chunks that the thread block takes at most.
        """
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
        calibration = ctypes.sizeof(self.table)
        total = max(tables, outputs) + lists + scores + queries + calibration + numbers
        return total + 128  # members are aligned

    def constants(self, shared_bytes: int) -> dict[str, int | bool]:
        """Constants of the source (`cuda/decode_shape.cuh` says what they mean).

        Args:
            shared_bytes: Shared memory of a multiprocessor.
        """
        elements, split = self.block_size * self.head_dim, self.split(shared_bytes)
        return {
            "BITS": self.bits,
            "HEAD_DIM": self.head_dim,
            "GROUP_SIZE": self.group,
            "BLOCK_SIZE": self.block_size,
            "WIDE_POSITIONS": position_dtype(elements) is torch.int32,
            "WIDE_COUNTS": count_dtype(elements) is torch.int32,
            "BF16": self.dtype is torch.bfloat16,
            "HAS_OUTLIERS": self.outliers,
            "HAS_VALUE_OUTLIERS": self.outliers and not self.allocated,
            "VALUE_RANGE_PER_HEAD": self.range_per_head,
            "SOFT_CAP": self.soft_cap is not None,
            "NUM_WARPS": self.warps,
            "MIN_BLOCKS_PER_SM": BLOCKS_PER_SM,
            "KEY_TILES": KEY_TILES,
            "MAX_CHUNKS": split,
            "SMEM_BYTES": self.smem_bytes(split),
            "OUTLIER_ROUNDS": self.rounds,
        }

    def header(self, shared_bytes: int) -> str:
        """Returns the text of `generated.cuh` for this shape.

        Args:
            shared_bytes: Shared memory of a multiprocessor.
        """
        structs = (DecodeParams, self.table)
        return cuda_header(self.constants(shared_bytes), structs)


def shared_memory(device: int) -> int:
    """Returns the shared memory of a GPU's multiprocessor, in bytes."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def functions(shape: DecodeShape, device: int) -> tuple[Function, Function, Function]:
    """Returns the kernels `decode`, `combine` and `combine_with_sinks`, compiled for a GPU."""
    module = load(shape.source, shape.header(shared_memory(device)), device)
    decode = module.function("decode", module.number("smem_bytes"))
    return decode, module.function("combine"), module.function("combine_with_sinks")


def plan_splits(
    batch: int,
    heads: int,
    chunks: int,
    multiprocessors: int,
    most: int,
    warps: int,
    multiple: int = 1,
) -> tuple[int, int]:
    """Plans how the past is cut: `(chunks per split, splits)` without the split of 16-bit tokens.

    A thread block takes a multiple of its warps' number of chunks. Of the possible numbers the one
    is taken whose waves of thread blocks last the shortest, where the beginning and the end of a
    thread block are taken to last as long as OVERHEAD chunks of each warp.

    Args:
        batch: Sequences.
        heads: kv heads.
        chunks: Chunks of the longest sequence.
        multiprocessors: Of the GPU.
        most: The largest number of chunks that a thread block takes.
        warps: Warps per thread block.
        multiple: Chunks per block of the cache, which are not divided.
    """
    step = max(warps, multiple)
    if chunks == 0:
        return step, 0

    def lasts(each: int) -> float:
        blocks = batch * heads * math.ceil(chunks / each)
        return math.ceil(blocks / (BLOCKS_PER_SM * multiprocessors)) * (each / warps + OVERHEAD)

    each = min(range(most // step * step, 0, -step), key=lasts)
    return each, math.ceil(chunks / each)


@dataclass
class DecodeStep:
    """Arguments of the kernel that all layers of a decode step share.

    Attributes:
        table: int32 `[batch_size, room]`, the number of each block (`arena_table`).
        lengths: int32 `[batch_size, 3]`: sinks held, blocks, tokens in the tail with the new one.
        chunks: At least the number of chunks of the longest sequence.
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
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the attention of one query per sequence over all its tokens.

    Args:
        shape: Of the cache.
        query: Rotated, `[batch_size, num_heads, head_dim]`, of `shape.dtype`.
        sinks: Keys before RoPE and values, `[batch_size, num_kv_heads, sinks, head_dim]`.
        tail: The same, `[batch_size, num_kv_heads, room, head_dim]`.
        arenas: int64 `[arenas, len(ARENA_FIELDS)]`, addresses.
        step: Where the tokens are.
        tables: The layer's calibration.
        scaling: Factor of the scores.
        sink_logits: `[num_heads]`, a logit of each query head that takes its share of the softmax
            and has no value; None: there is none.

    Returns:
        `[batch_size, num_heads, head_dim]` in the dtype of the query.
    """
    batch, query_heads, dim = query.shape
    heads = tail[0].shape[1]
    device = query.device
    index = index_of(query)
    kernel, combine, combine_with_sinks = functions(shape, index)
    per_block = shape.block_size // shape.chunk
    most = shape.split(shared_memory(index))
    each, splits = plan_splits(
        batch, heads, step.chunks, multiprocessors(index), most, shape.warps, per_block
    )
    splits += 1
    query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    states = batch * query_heads * splits
    partial_out = torch.empty(states * dim, dtype=torch.float32, device=device)
    partial_state = torch.empty(states * 2, dtype=torch.float32, device=device)
    cap = shape.soft_cap or 1.0  # which a kernel without a cap does not read
    params = DecodeParams(
        query.data_ptr(), sinks[0].data_ptr(), sinks[1].data_ptr(), tail[0].data_ptr(),
        tail[1].data_ptr(), arenas.data_ptr(), step.table.data_ptr(), step.lengths.data_ptr(),
        tables.heads.data_ptr(), tables.value_levels.data_ptr(), step.rope.places.data_ptr(),
        step.rope.phases.data_ptr(), step.rope.thetas.data_ptr(),
        partial_out.data_ptr(), partial_state.data_ptr(), heads, step.table.stride(0),
        sinks[0].shape[2], tail[0].shape[2], each, scaling * math.log2(math.e),
        cap * math.log2(math.e), 2 / cap,
    )  # fmt: skip
    kernel((heads, batch, splits), shape.warps * 32, params)
    grid = (batch * query_heads, 1, 1)
    parts = (
        ctypes.c_void_p(partial_out.data_ptr()),
        ctypes.c_void_p(partial_state.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(splits),
    )
    if sink_logits is None:
        combine(grid, COMBINE_THREADS, *parts)
        return out
    logits = sink_logits.to(query.dtype).contiguous()
    sinks_of = ctypes.c_void_p(logits.data_ptr()), ctypes.c_int(query_heads)
    combine_with_sinks(grid, COMBINE_THREADS, *parts, *sinks_of)
    return out
