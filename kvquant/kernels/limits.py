"""The limits of each backend, as sentences that name the field and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kvquant.formats.lane_layout import CHUNK
from kvquant.kernels.arena_table import MAX_ARENAS, MAX_PLACES
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.cuda_pack import WARP

HALF = (torch.float16, torch.bfloat16)
MAX_CHANNELS = 1 << 14  # of a token whose value outliers a kernel finds
MAX_GROUP = 8  # query heads per kv head that the decode kernel's tiles hold
MAX_THREADS = 1024  # per thread block
CUDA_HEAD_DIMS = (64, 128, 256)
TRITON_HEAD_DIMS = (32, 64, 128, 256)

Limits = Callable[[CacheShape], Iterator[str]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _codes(shape: CacheShape, *known: str) -> Iterator[str]:
    """Yields why no GPU kernel reads these codes: each reads those of some scheme kinds alone."""
    if shape.codebook not in known:
        named = " and ".join(f"'{kind}'" for kind in known)
        yield (
            f"codebook: this kernel knows the packed codes of scheme kind {named}, and this cache "
            f"holds '{shape.codebook}'; choose a scheme of kind {' or '.join(known)}"
        )
        return
    if shape.bits not in (2, 3, 4):
        yield f"bits: {shape.bits} is none of 2, 3, 4; choose one of them"
    if shape.outliers >= 1:
        yield (
            "outliers: 1 keeps every element in 16 bits, which leaves kernels no codes to read; "
            "choose a fraction below 1"
        )
    if shape.dtype not in HALF:
        yield (
            f"dtype: the cache holds {_name(shape.dtype)}, and kernels read float16 and bfloat16; "
            "load the model in one of them"
        )


def _head_dim(shape: CacheShape, known: tuple[int, ...]) -> Iterator[str]:
    if shape.head_dim not in known:
        yield (
            f"head_dim: {shape.head_dim} is none of {_list(known)}; use a model with one of these, "
            "or accept another backend"
        )


def _no_chunks(shape: CacheShape) -> str:
    """Returns the reason against blocks of allocated codes that do not consist of whole chunks."""
    return (
        f"block_size: {shape.block_size} is not a multiple of the {CHUNK} tokens that a warp takes "
        f"at a time; choose {CHUNK}"
    )


def _channels(shape: CacheShape) -> Iterator[str]:
    if shape.channels > MAX_CHANNELS:
        yield (
            f"kv_heads: {shape.kv_heads} of head_dim {shape.head_dim} are more than {MAX_CHANNELS} "
            "channels; use a model with fewer, or accept PyTorch"
        )


def _readable_blocks(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons against every kernel that reads packed blocks where they lie."""
    if shape.kept_rope:
        yield (
            "kept_rope: the cache keeps a rotation per token, and kernels compute it from the "
            "position; use a model whose rope scaling does not change with the length"
        )
    if shape.rotated_keys:
        yield (
            "rotated_keys: keys are stored after RoPE, and kernels rotate the keys that they read; "
            "choose a scheme with `keys: before-rope`, or accept PyTorch"
        )
    if not shape.narrow_tables:
        yield (
            "calibration: zero and scale of a key channel exceed float16 (65504), in which kernels "
            "read them; calibrate on other texts, or accept PyTorch"
        )
    if shape.rotates_values:
        yield (
            "rotates_values: values are rotated while they are packed, and kernels read them as "
            "they lie; load the model from its files, whose weights then give rotated values, or "
            "choose a scheme with `rotation: false`"
        )
    if not shape.packed_by_kernels:
        yield (
            "blocks: PyTorch packed some of them, whose memory kernels cannot address; see why "
            "packing refused the kernels, or keep KVQUANT_KERNELS as it was in the first call"
        )
    if shape.arenas > MAX_ARENAS:
        yield (
            f"arenas: {shape.arenas} are more than the {MAX_ARENAS} that block numbers can tell "
            "apart; prefill in longer chunks"
        )
    if shape.arena_blocks > MAX_PLACES:
        yield (
            f"arena_blocks: {shape.arena_blocks} are more than the {MAX_PLACES} that block numbers "
            "can tell apart; prefill in shorter chunks or smaller batches"
        )


def cuda_pack(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why the CUDA kernels do not pack blocks of this shape."""
    if shape.codebook == "allocated":
        yield from _cuda_pack_allocated(shape)
        return
    kernel = shape.pack_shape
    yield from _codes(shape, "nuq", "allocated")
    yield from _head_dim(shape, CUDA_HEAD_DIMS)
    yield from _channels(shape)
    threads = kernel.key_threads
    whole_warps = shape.block_size % 16 == 0 and threads % WARP == 0 and threads <= MAX_THREADS
    # With a head_dim that is refused, no block size would do.
    if shape.head_dim in CUDA_HEAD_DIMS and not whole_warps:
        yield (
            f"block_size: {shape.block_size} with head_dim {shape.head_dim} does not fill whole "
            f"warps of at most {MAX_THREADS} threads; choose 64"
        )
    if kernel.per_side and kernel.per_side >= min(kernel.workers, kernel.units):
        yield (
            f"outliers: {kernel.per_side} values at each end of a token are more than the kernel's "
            "threads can offer; choose a smaller fraction"
        )
    if shape.input_layout != "pairs":
        yield (
            "input: two neighbouring channels of keys or values are not one aligned word; pass "
            "contiguous tensors"
        )


def _cuda_pack_allocated(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why the CUDA kernels do not pack blocks of allocated codes."""
    yield from _codes(shape, "allocated")
    yield from _head_dim(shape, CUDA_HEAD_DIMS)
    if shape.block_size % CHUNK or shape.block_size < 1:
        yield _no_chunks(shape)


def triton_pack(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why the Triton kernels do not pack blocks of this shape."""
    yield from _codes(shape, "nuq")
    if shape.head_dim % 8 or shape.head_dim < 32:
        yield (
            f"head_dim: {shape.head_dim} is not a multiple of 8 from 32 on; use a model with one, "
            "or accept PyTorch"
        )
    yield from _channels(shape)
    if shape.block_size & (shape.block_size - 1) or shape.block_size < 1:
        yield f"block_size: {shape.block_size} is not a power of two; choose 64"
    if shape.outliers < 1 and 2 * shape.outliers_per_side >= shape.channels:
        yield (
            f"outliers: twice {shape.outliers_per_side} leave no value of a token's "
            f"{shape.channels} to code; choose a smaller fraction"
        )
    if shape.input_layout == "strided":
        yield (
            "input: the channels of keys or values are not contiguous; pass tensors whose last "
            "stride is 1"
        )


def pytorch_pack(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why PyTorch does not pack blocks of this shape."""
    if shape.dtype not in HALF:
        yield (
            f"dtype: blocks of {_name(shape.dtype)} are not 16-bit; convert them to float16 or "
            "bfloat16"
        )
    if shape.codebook == "nuq" and shape.head_dim % 8:
        yield (
            f"head_dim: {shape.head_dim} is not a multiple of 8, as packed codes need; use a model "
            "with one"
        )


def cuda_decode(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why the CUDA kernel does not take decode steps of this shape."""
    yield from _codes(shape, "nuq", "allocated")
    yield from _head_dim(shape, CUDA_HEAD_DIMS)
    if shape.queries_per_kv_head > MAX_GROUP:
        yield (
            f"queries_per_kv_head: {shape.queries_per_kv_head} are more than {MAX_GROUP}; use a "
            "model with fewer, or accept another backend"
        )
    if shape.codebook == "allocated" and shape.block_size % CHUNK:
        yield _no_chunks(shape)
    elif shape.block_size != 32 and (shape.block_size % 64 or shape.block_size < 1):
        yield (
            f"block_size: {shape.block_size} is neither 32 nor a multiple of 64; choose one of them"
        )
    elif shape.sinks > shape.decode_shape.chunk:
        yield (
            f"sinks: {shape.sinks} are more than the {shape.decode_shape.chunk} tokens that a warp "
            f"takes at a time; choose at most {shape.decode_shape.chunk}"
        )
    if shape.protocol != "A":
        yield (
            f"protocol: {shape.protocol} reads a step's own token quantized, which the decode "
            "kernel reads in 16 bits; use protocol A"
        )
    if not shape.static_rope:
        yield (
            "static_rope: rotations change with the length of the sequence, or differ by layer, or "
            "have factors that differ by channel, and the tables of the kernel do not; use a model "
            "without dynamic rope scaling, layers without RoPE, or partial scaled RoPE"
        )
    yield from _readable_blocks(shape)


def triton_past(shape: CacheShape) -> Iterator[str]:
    """Yields the reasons why the Triton kernels do not attend to a packed past of this shape."""
    yield from _codes(shape, "nuq", "allocated")
    allocated = shape.codebook == "allocated"
    yield from _head_dim(shape, CUDA_HEAD_DIMS if allocated else TRITON_HEAD_DIMS)
    if allocated and shape.block_size % CHUNK:
        yield _no_chunks(shape)
    if allocated and shape.query_dtype not in (None, shape.dtype):
        yield (
            f"query_dtype: {_name(shape.query_dtype or shape.dtype)} is not the cache's "
            f"{_name(shape.dtype)}; load the model in one dtype"
        )
    yield from _readable_blocks(shape)


def no_limits(shape: CacheShape) -> Iterator[str]:
    """Nothing: PyTorch reads whatever a cache holds."""
    yield from ()
