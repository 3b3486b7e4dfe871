"""Quantize and pack by the CUDA kernels of `cuda/pack.cu`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.pack_target import PackTarget

ROWS = 4  # a thread of keys, as in the source file
WARP = 32
PAIRS_A_THREAD = 8  # neighbouring channels, of eight lanes
KEY_ROOM = 768  # threads of keys for which a multiprocessor's registers suffice
VALUE_ROOM, SMALL_VALUE_ROOM = 896, 1024  # of values; where a program has one warp
WAVES = 4  # programs of values a multiprocessor's room before they take several tokens
LONG = 1 << 23  # elements from which keys and values are packed at once
MAX_TOKENS = 4  # that a program of values takes


class _Source(ctypes.Structure):
    """`struct Source` of the kernels."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("block", "head", "token")),
    ]


class _Target(ctypes.Structure):
    """`struct Target` of the kernels."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "codes", "status", "begin", "count", "positions", "values", "cursor",
        )),
        ("slots", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class PackShape:
    """What the kernels are compiled for.

    Attributes:
        bits: 2, 3 or 4.
        head_dim: 64, 128 or 256.
        heads: kv heads.
        block_size: Tokens a block.
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
        """Threads that a token of all heads would occupy."""
        return self.heads * self.head_dim // (2 * PAIRS_A_THREAD)

    @property
    def workers(self) -> int:
        """Threads a token of values; each takes four units, more where there are many."""
        least = -(-(self.per_side + 1) // WARP)  # each offers its largest to the selection
        return min(512, max(least, -(-self.units // (4 * WARP))) * WARP)

    @property
    def key_threads(self) -> int:
        """Threads a block and head of keys."""
        return self.block_size * self.head_dim // (2 * PAIRS_A_THREAD * ROWS)

    def constants(self) -> dict[str, int]:
        """Macros of the source file."""
        elements = self.block_size * self.head_dim
        return {
            "BITS": self.bits,
            "DIM": self.head_dim,
            "HEADS": self.heads,
            "SIZE": self.block_size,
            "OUTLIERS": int(self.outliers),
            "PER_SIDE": self.per_side,
            "WORKERS": self.workers,
            "AHEAD": 0,
            "KEY_BLOCKS": max(1, KEY_ROOM // self.key_threads),
            "VALUE_BLOCKS": value_programs(self.workers),
            "POS32": int(position_dtype(elements) is torch.int32),
            "COUNT32": int(count_dtype(elements) is torch.int32),
            "BF16": int(self.dtype is torch.bfloat16),
        }


@functools.cache
def functions(shape: PackShape, device: int) -> tuple[Function, Function, Function | None]:
    """The kernels of keys, of values and of the values' outliers, compiled for a GPU."""
    module = load("pack.cu", tuple(shape.constants().items()), device)
    group = module.function("group_values") if shape.per_side else None
    return module.function("pack_keys"), module.function("pack_values"), group


def _source(x: torch.Tensor) -> _Source:
    return _Source(x.data_ptr(), *x.stride()[:3])


def _target(target: PackTarget) -> _Target:
    parts = (target.begin, target.count, target.positions, target.values, target.cursor)
    pointers = [0 if t is None else t.data_ptr() for t in parts]
    slots = 0 if target.values is None else target.values.numel()
    return _Target(target.codes.data_ptr(), target.status.data_ptr(), *pointers, slots)


def pack_keys(shape: PackShape, x: torch.Tensor, table: torch.Tensor, target: PackTarget) -> None:
    """Writes codes and outliers of key blocks.

    Args:
        shape: Of the cache.
        x: `[blocks, num_heads, block_size, head_dim]`, any even strides but the last.
        table: From :func:`kvquant.kernels.thresholds.key_table`.
        target: Where to.
    """
    target.check(x, shape.bits)
    assert target.codes.data_ptr() % 16 == 0
    if not x.shape[0]:
        return
    kernel, _, _ = functions(shape, index_of(x))
    kernel(
        (x.shape[0] * shape.heads, 1, 1), shape.key_threads,
        _source(x), _target(target), ctypes.c_void_p(table.data_ptr()),
    )  # fmt: skip


def value_programs(workers: int) -> int:
    """Programs of values that a multiprocessor takes at once."""
    return max(1, (VALUE_ROOM if workers > WARP else SMALL_VALUE_ROOM) // workers)


def tokens_a_program(spots: int, multiprocessors: int, workers: int) -> int:
    """Tokens that a program of values takes: one while there is room for all, a few at most."""
    at_once = multiprocessors * value_programs(workers)
    waves = WAVES if workers > WARP else 1  # small programs are mostly beginning and end
    return max(1, min(MAX_TOKENS, spots // (waves * at_once)))


def pack_values(
    shape: PackShape,
    x: torch.Tensor,
    midpoints: torch.Tensor,
    target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
) -> None:
    """Writes codes, zero, scale and outliers of value blocks.

    Args:
        shape: Of the cache.
        x: `[blocks, num_heads, block_size, head_dim]`, any even strides but the last.
        midpoints: fp32 `[2**bits - 1]`.
        target: Where to.
        zero_out: 16-bit `[blocks, block_size]`, contiguous.
        scale_out: The same.
    """
    target.check(x, shape.bits)
    assert zero_out.is_contiguous() and scale_out.is_contiguous()
    if not x.shape[0]:
        return
    index = index_of(x)
    _, kernel, group = functions(shape, index)
    blocks = x.shape[0]
    spots, chosen = blocks * shape.block_size, 2 * shape.per_side
    found = torch.empty(spots * chosen, dtype=torch.int32, device=x.device)
    each = tokens_a_program(spots, multiprocessors(index), shape.workers)
    kernel(
        (-(-spots // each), 1, 1), shape.workers,
        _source(x), *(ctypes.c_void_p(t.data_ptr()) for t in (
            target.codes, target.status, zero_out, scale_out, midpoints, found,
        )),
        ctypes.c_int(spots), ctypes.c_int(each),
    )  # fmt: skip
    if group is not None:
        group((blocks, 1, 1), 256, _target(target), ctypes.c_void_p(found.data_ptr()))


@functools.cache
def _beside(index: int) -> torch.cuda.Stream:
    """A stream of a GPU for what may run beside the current one."""
    return torch.cuda.Stream(torch.device("cuda", index))


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
) -> None:
    """Both; long inputs at once, so that keys use what the last programs of values leave idle.

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
    """
    if keys.device.type != "cuda" or keys.numel() < LONG:
        pack_keys(shape, keys, table, key_target)
        pack_values(shape, values, midpoints, value_target, zero_out, scale_out)
        return
    main, beside = torch.cuda.current_stream(keys.device), _beside(index_of(keys))
    beside.wait_stream(main)
    pack_values(shape, values, midpoints, value_target, zero_out, scale_out)
    with torch.cuda.stream(beside):
        pack_keys(shape, keys, table, key_target)
    main.wait_stream(beside)
