"""Quantize and pack by the CUDA kernels of `cuda/pack.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.kernels import cuda_structs
from kvquant.kernels.block_places import block_count
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.pack_target import PackTarget

ROWS_PER_THREAD = 4  # of keys, as in the source file
WARP = 32
PAIRS_PER_THREAD = 8  # pairs of neighbouring channels, one from each of eight lanes
KEY_THREADS_PER_SM = 768  # threads of keys for which a multiprocessor's registers suffice
VALUE_THREADS_PER_SM = 896  # the same of values
ONE_WARP_THREADS_PER_SM = 1024  # of values, where a thread block has one warp
WAVES = 4  # waves of thread blocks of values before one takes several tokens
MIN_ELEMENTS_AT_ONCE = 1 << 23  # elements from which keys and values are packed side by side
MAX_TOKENS = 4  # tokens that a thread block of values takes at most
GROUP_THREADS = 256  # threads that sort the outliers of a block, as in the source file

Launch = Callable[[], None]


@dataclass(frozen=True)
class PackShape:
    """The shape of a cache that the kernels are compiled for.

    Attributes:
        bits: Bits per code: 2, 3 or 4.
        head_dim: 64, 128 or 256.
        heads: kv heads.
        block_size: Tokens per block.
        dtype: fp16 or bf16.
        outliers: Whether keys have any.
        per_side: Outliers at each end of a token's values.
    """

    bits: int
    head_dim: int
    heads: int
    block_size: int
    dtype: torch.dtype
    outliers: bool
    per_side: int

    @property
    def units(self) -> int:
        """Threads that a token of all heads would occupy, one row of 16 channels each."""
        return self.heads * self.head_dim // (2 * PAIRS_PER_THREAD)

    @property
    def workers(self) -> int:
        """Threads per token of values; each takes four units, or more where there are many."""
        selecting = -(-(self.per_side + 1) // WARP)  # each thread offers its largest elements
        return min(512, max(selecting, -(-self.units // (4 * WARP))) * WARP)

    @property
    def key_threads(self) -> int:
        """Threads per block and kv head of keys."""
        return self.block_size * self.head_dim // (2 * PAIRS_PER_THREAD * ROWS_PER_THREAD)

    def constants(self) -> dict[str, int | bool]:
        """Constants of the source (`cuda/pack_shape.cuh` says what they mean)."""
        elements = self.block_size * self.head_dim
        return {
            "BITS": self.bits,
            "HEAD_DIM": self.head_dim,
            "NUM_KV_HEADS": self.heads,
            "BLOCK_SIZE": self.block_size,
            "HAS_KEY_OUTLIERS": self.outliers,
            "OUTLIERS_PER_SIDE": self.per_side,
            "VALUE_THREADS": self.workers,
            "MIN_KEY_BLOCKS_PER_SM": max(1, KEY_THREADS_PER_SM // self.key_threads),
            "MIN_VALUE_BLOCKS_PER_SM": value_blocks_per_sm(self.workers),
            "WIDE_POSITIONS": position_dtype(elements) is torch.int32,
            "WIDE_COUNTS": count_dtype(elements) is torch.int32,
            "BF16": self.dtype is torch.bfloat16,
        }

    def header(self) -> str:
        """Returns the text of `generated.cuh` for this shape."""
        structs = (cuda_structs.PackSource, cuda_structs.PackTarget)
        return cuda_header(self.constants(), structs)


@functools.cache
def functions(shape: PackShape, device: int) -> tuple[Function, Function, Function | None]:
    """Returns the kernels `pack_keys`, `pack_values` and `group_values`, compiled for a GPU."""
    module = load("pack.cu", shape.header(), device)
    group = module.function("group_values") if shape.per_side else None
    return module.function("pack_keys"), module.function("pack_values"), group


def source_of(x: torch.Tensor, places: torch.Tensor | None) -> cuda_structs.PackSource:
    """Returns the argument for the blocks that lie in `[sequences, num_heads, tokens, head_dim]`.

    Args:
        x: The tokens.
        places: As of :func:`kvquant.kernels.block_places.block_count`, contiguous.
    """
    at = 0 if places is None else places.data_ptr()
    return cuda_structs.PackSource(x.data_ptr(), at, *x.stride()[:3])


def target_of(target: PackTarget) -> cuda_structs.PackTarget:
    """Returns the argument for the tensors that packed blocks go to."""
    lists = (target.begin, target.count, target.positions, target.values, target.cursor)
    tensors = (target.codes, target.status, *lists)
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    slots = 0 if target.values is None else target.values.numel()
    return cuda_structs.PackTarget(*pointers, slots)


def pack_keys(
    shape: PackShape,
    x: torch.Tensor,
    table: torch.Tensor,
    target: PackTarget,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes key blocks and writes their codes and outliers.

    Args:
        shape: Of the cache.
        x: `[sequences, num_heads, tokens, head_dim]`, any even strides but the last.
        table: From :func:`kvquant.kernels.thresholds.key_table`.
        target: Where to.
        places: Where the blocks lie; see :func:`kvquant.kernels.block_places.block_count`.
    """
    blocks = block_count(x, places)
    target.check((blocks, shape.heads, shape.block_size, shape.head_dim), x.dtype, shape.bits)
    assert target.codes.data_ptr() % 16 == 0
    if not blocks:
        return
    kernel, _, _ = functions(shape, index_of(x))
    kernel(
        (blocks * shape.heads, 1, 1), shape.key_threads,
        source_of(x, places), target_of(target), ctypes.c_void_p(table.data_ptr()),
    )  # fmt: skip


def value_blocks_per_sm(workers: int) -> int:
    """Returns how many thread blocks of values a multiprocessor takes at once.

    Args:
        workers: Threads per thread block.
    """
    threads = VALUE_THREADS_PER_SM if workers > WARP else ONE_WARP_THREADS_PER_SM
    return max(1, threads // workers)


def tokens_per_block(tokens: int, multiprocessors: int, workers: int) -> int:
    """Tokens that a thread block of values takes: one while there is room for all, a few at most.

    Args:
        tokens: All tokens of the call.
        multiprocessors: Of the GPU.
        workers: Threads per thread block.
    """
    at_once = multiprocessors * value_blocks_per_sm(workers)
    waves = WAVES if workers > WARP else 1  # small thread blocks are mostly beginning and end
    return max(1, min(MAX_TOKENS, tokens // (waves * at_once)))


def pack_values(
    shape: PackShape,
    x: torch.Tensor,
    midpoints: torch.Tensor,
    target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes value blocks and writes their codes, zeros, scales and outliers.

    Args:
        shape: Of the cache.
        x: `[sequences, num_heads, tokens, head_dim]`, any even strides but the last.
        midpoints: fp32 `[2**bits - 1]`.
        target: Where to.
        zero_out: 16-bit `[blocks, block_size]`, contiguous.
        scale_out: The same.
        places: As of :func:`pack_keys`.
    """
    blocks = block_count(x, places)
    target.check((blocks, shape.heads, shape.block_size, shape.head_dim), x.dtype, shape.bits)
    assert zero_out.is_contiguous() and scale_out.is_contiguous()
    if not blocks:
        return
    index = index_of(x)
    _, kernel, group = functions(shape, index)
    tokens, outliers = blocks * shape.block_size, 2 * shape.per_side
    found = torch.empty(tokens * outliers, dtype=torch.int32, device=x.device)
    each = tokens_per_block(tokens, multiprocessors(index), shape.workers)
    kernel(
        (-(-tokens // each), 1, 1), shape.workers,
        source_of(x, places), *(ctypes.c_void_p(t.data_ptr()) for t in (
            target.codes, target.status, zero_out, scale_out, midpoints, found,
        )),
        ctypes.c_int(tokens), ctypes.c_int(each),
    )  # fmt: skip
    if group is not None:
        group((blocks, 1, 1), GROUP_THREADS, target_of(target), ctypes.c_void_p(found.data_ptr()))


@functools.cache
def _beside(index: int) -> torch.cuda.Stream:
    """Returns a second stream of a GPU, for what may run beside the current one."""
    return torch.cuda.Stream(torch.device("cuda", index))


def side_by_side(keys: torch.Tensor, of_keys: Launch, of_values: Launch) -> None:
    """Launches the kernels of keys and of values, on two streams where both are long.

    Keys then use the multiprocessors that the last thread blocks of values leave idle.

    Args:
        keys: The blocks of keys.
        of_keys: Launches the kernels of keys on the current stream.
        of_values: The same for values.
    """
    if keys.device.type != "cuda" or keys.numel() < MIN_ELEMENTS_AT_ONCE:
        of_keys()
        of_values()
        return
    main, beside = torch.cuda.current_stream(keys.device), _beside(index_of(keys))
    beside.wait_stream(main)
    of_values()
    with torch.cuda.stream(beside):
        of_keys()
    main.wait_stream(beside)


def pack(
    shape: PackShape,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    midpoints: torch.Tensor,
    key_target: PackTarget,
    value_target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes and packs key and value blocks.

    Args:
        shape: Of the cache.
        keys: As in :func:`pack_keys`.
        values: As in :func:`pack_values`.
        table: Of :func:`pack_keys`.
        midpoints: Of :func:`pack_values`.
        key_target: Where keys go.
        value_target: Where values go.
        zero_out: Of :func:`pack_values`.
        scale_out: Of :func:`pack_values`.
        places: As of :func:`pack_keys`.
    """
    side_by_side(
        keys,
        lambda: pack_keys(shape, keys, table, key_target, places),
        lambda: pack_values(shape, values, midpoints, value_target, zero_out, scale_out, places),
    )
