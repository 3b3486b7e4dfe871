"""Expansion of packed blocks of allocated codes by the CUDA kernel `cuda/expand_allocated.cu`.

Attention of many new tokens over a packed past reads keys and values from a 16-bit workspace
(:mod:`kvquant.kernels.triton_workspace`), which this kernel fills.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.lane_layout import CHUNK
from kvquant.formats.mixed_packing import MAX_WIDTH
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.cuda_decode import DecodeShape, shared_memory
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.cuda_structs import DecodeParams
from kvquant.kernels.decode_tables import HeadTables

# As in the source file: a warp per tile of channels, at most so many; 4-byte numbers and 16-bit
# numbers by which rows in shared memory are longer than they need to be.
MAX_WARPS, TILE, PADDING = 8, 16, 8
# To tune: kv heads per thread block, which share the rotary table of a chunk, where there is work
# for all multiprocessors; warps of a multiprocessor that registers shall have room for.
MAX_HEADS_EACH, WARPS = 4, 32


class ExpandParams(ctypes.Structure):
    """Arguments of the kernel `expand` (`cuda/expand_params.cuh`)."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "arenas", "table", "lengths", "sink_keys", "sink_values", "tail_keys",
                "tail_values", "head_tables", "key_zero", "key_scale", "key_levels",
                "value_levels", "cos", "sin", "out",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "num_kv_heads", "table_stride", "sink_room", "tail_room", "low", "chunks", "base",
                "places", "sinks", "fp32_tail", "heads_each",
            )
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class ExpandTables:
    """The calibration of one layer as the kernel reads it.

    Attributes:
        heads: Where the codes of each head lie, see :class:`HeadTables`.
        layer: Ranges and codebooks on the GPU.
    """

    heads: HeadTables
    layer: AllocatedLayer

    @functools.cached_property
    def key_order(self) -> torch.Tensor:
        """Channels of expanded keys in the order of the workspace, int32 `[heads, head_dim]`.

        It follows the head's tiles: of each two RoPE pairs the first channels, then the second.
        """
        pairs = self.layer.key_pairs.int()
        both = torch.stack((pairs, pairs + pairs.shape[1]), 1)  # [heads, 2, pairs]
        return both.unflatten(2, (-1, 2)).transpose(1, 2).flatten(1).contiguous()


def threads(head_dim: int) -> int:
    """Returns the number of threads of a thread block."""
    return 32 * min(MAX_WARPS, head_dim // TILE)


def storage_bytes(head_dim: int) -> int:
    """Counts a thread block's shared memory, `struct ExpandStorage` of the source."""
    angles = head_dim // 2 * (2 * CHUNK + PADDING)
    levels, ranges, marks = 2 * MAX_WIDTH * 2**MAX_WIDTH, 2 * CHUNK, head_dim // TILE * 32
    values = 2 * CHUNK * (head_dim + PADDING)  # larger than the outliers that lie there, too
    return 4 * (angles + levels + ranges + marks) + values


def blocks_at_a_time(head_dim: int, shared_bytes: int) -> int:
    """Returns how many thread blocks a multiprocessor takes together, by its shared memory."""
    room = shared_bytes // (storage_bytes(head_dim) + 1024)
    return min(32 * WARPS // threads(head_dim), room)


def header(shape: DecodeShape, shared_bytes: int) -> str:
    """Returns the text of `generated.cuh` for a shape.

    Args:
        shape: Of the cache.
        shared_bytes: Shared memory of a multiprocessor.
    """
    constants = shape.constants(shared_bytes) | {
        "EXPAND_BYTES": storage_bytes(shape.head_dim),
        "EXPAND_BLOCKS": blocks_at_a_time(shape.head_dim, shared_bytes),
    }
    return cuda_header(constants, (DecodeParams, shape.table, ExpandParams))


@functools.cache
def function(shape: DecodeShape, device: int) -> Function:
    """Returns the kernel `expand`, compiled for a GPU."""
    module = load("expand_allocated.cu", header(shape, shared_memory(device)), device)
    return module.function("expand", storage_bytes(shape.head_dim))


def expand(
    shape: DecodeShape,
    out: torch.Tensor,
    ordinals: tuple[int, int],
    base: int,
    arenas: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tables: ExpandTables,
    rope: tuple[torch.Tensor, torch.Tensor],
    sinks: int,
) -> None:
    """Fills a workspace with rotated keys and values of a range of blocks of every sequence.

    Args:
        shape: Of the cache.
        out: 16-bit `[2, batch_size, num_kv_heads, places, head_dim]`, the dtype of the cache.
            The channels of keys are written in the order of :attr:`ExpandTables.key_order`.
        ordinals: The first block of the range and the one behind the last; the tail counts as a
            block, and the sinks belong to block 0.
        base: Position of the workspace's first place.
        arenas: int64 `[arenas, len(ARENA_FIELDS)]`, addresses.
        table: int32 `[batch_size, room]`, the number of each block.
        lengths: int32 `[batch_size, 4]`: sinks held, blocks, tokens in the tail, their sum.
        held: Keys before RoPE and values of the sinks, then of the tail, contiguous
            `[batch_size, num_kv_heads, room, head_dim]`. Those of the tail may be fp32.
        tables: The layer's calibration.
        rope: fp32 cosine and sine `[positions, head_dim / 2]`, contiguous.
        sinks: Sinks of a long sequence.
    """
    _, batch, heads, places, dim = out.shape
    assert out.dtype is shape.dtype and out.is_contiguous() and dim == shape.head_dim
    first, stop = ordinals
    with_sinks = first == 0 and sinks > 0
    longest = max(shape.block_size, sinks if with_sinks else 0)
    chunks, low = -(-longest // CHUNK), -1 if with_sinks else first
    layer, index, count = tables.layer, index_of(out), (stop - low) * chunks * batch
    each = MAX_HEADS_EACH
    together = multiprocessors(index) * blocks_at_a_time(dim, shared_memory(index))
    while each > 1 and count * heads < each * together:
        each //= 2
    params = ExpandParams(
        *(t.data_ptr() for t in (
            arenas, table, lengths, *held, tables.heads.heads, layer.key_zero, layer.key_scale,
            layer.key_levels, layer.value_levels, *rope, out,
        )),
        heads, table.stride(0), held[0].shape[2], held[2].shape[2], low, chunks, base, places,
        sinks, held[2].dtype is torch.float32, each,
    )  # fmt: skip
    kernel = function(shape, index)
    kernel(((stop - low) * chunks, -(-heads // each), batch), threads(dim), params)
