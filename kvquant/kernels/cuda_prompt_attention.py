"""Attention of many queries with 8-bit products by the CUDA kernel `cuda/prompt_attention.cu`.

It runs on Hopper GPUs, whose instructions for products of warpgroups it uses.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from kvquant.kernels.cuda_build import Function, load
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.eight_bit_attention import NEAR_TILES, REST_BITS, TILE

CAPABILITY, HEAD_DIMS = (9, 0), (64, 128)
QUERIES = 64  # per tile of the operands
# To tune: warpgroups that multiply, and tiles of keys and of values that are copied ahead.
CONSUMERS, STAGES = 3, 4
# Heads whose keys and values shall lie in the L2 cache together, by their bytes.
MAX_CACHED_BYTES = 24 << 20


class PromptParams(ctypes.Structure):
    """Arguments of the kernel `attend_prompt` (`cuda/prompt_params.cuh`)."""

    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("queries", "keys", "values")),
        *((name, ctypes.c_void_p) for name in (
            "query_scales", "query_offsets", "key_scales",
            "value_scales", "counts", "columns", "out", "state_out", "state_top",
            "state_total",
        )),
        *((name, ctypes.c_int) for name in (
            "num_heads", "num_kv_heads", "query_tiles", "key_tiles", "num_columns",
            "columns_stride", "window", "heads_together", "first",
        )),
    ]  # fmt: skip


@dataclass(frozen=True)
class PromptShape:
    """What the kernel is compiled for.

    Attributes:
        head_dim: Channels per head.
        bf16: Whether it writes bfloat16; else float16.
    """

    head_dim: int
    bf16: bool

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a thread block, `struct SharedStorage` of the source and more."""
        tiles = STAGES * (2 * TILE * self.head_dim + 8 * TILE)  # with a row of ones and zeros
        return (
            2 * CONSUMERS * QUERIES * self.head_dim + tiles + 8 * (1 + 4 * STAGES) + 2 * 1024
        )  # alignment of operands and of the struct


def header(shape: PromptShape) -> str:
    """Returns the text of `generated.cuh` for a shape."""
    constants = {
        "HEAD_DIM": shape.head_dim,
        "BF16": shape.bf16,
        "CONSUMERS": CONSUMERS,
        "STAGES": STAGES,
        "NEAR_TILES": NEAR_TILES,
        "REST_BITS": REST_BITS,
        "SHARED_BYTES": shape.shared_bytes,
    }
    return cuda_header(constants, (PromptParams,))


@functools.cache
def function(shape: PromptShape, device: int) -> Function:
    """Returns the kernel, compiled for a GPU."""
    module = load("prompt_attention.cu", header(shape), device, own_instructions=True)
    return module.function("attend_prompt", shape.shared_bytes)


def heads_together(heads: int, kv_heads: int, keys: int, dim: int) -> int:
    """Returns how many query heads take turns: whole groups, whose keys fit the L2 cache.

    Args:
        heads: Query heads.
        kv_heads: Key heads.
        keys: Keys per sequence.
        dim: Channels per head.
    """
    together = 1
    while kv_heads % (2 * together) == 0 and 2 * together * keys * 2 * dim <= MAX_CACHED_BYTES:
        together *= 2
    return together * (heads // kv_heads)


def launch(shape: PromptShape, params: PromptParams, sequences: int, device: int) -> None:
    """Launches the kernel on torch's current stream."""
    rows = -(-params.query_tiles // CONSUMERS)
    grid = (rows * params.num_heads * sequences, 1, 1)
    function(shape, device)(grid, 128 * (CONSUMERS + 1), params)
