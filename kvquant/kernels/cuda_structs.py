"""Arguments of the CUDA kernels, as structs that Python fills.

A struct here has the name and the field names of its C++ definition in `kvquant/kernels/cuda`.
The two are compared when a source is compiled (:mod:`kvquant.kernels.cuda_header`).
"""

from __future__ import annotations

import ctypes


def _pointers(*names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    return [(name, ctypes.c_void_p) for name in names]


class DecodeParams(ctypes.Structure):
    """Arguments of the kernel `decode` (`cuda/decode_params.cuh`)."""

    _fields_ = [
        *_pointers(
            "query", "sink_keys", "sink_values", "tail_keys", "tail_values", "arenas",
            "block_table", "lengths", "head_tables", "value_levels", "rope", "phases", "thetas",
            "partial_out", "partial_state",
        ),
        *((name, ctypes.c_int) for name in (
            "num_kv_heads", "block_table_stride", "sink_capacity", "tail_capacity",
            "chunks_per_split",
        )),
        *((name, ctypes.c_float) for name in ("score_scale", "score_bound", "score_steepness")),
    ]  # fmt: skip


class PackSource(ctypes.Structure):
    """Blocks that a packing kernel reads (`cuda/pack_params.cuh`)."""

    _fields_ = [
        *_pointers("x", "places"),
        *((name, ctypes.c_longlong) for name in ("sequence_stride", "head_stride", "token_stride")),
    ]


class PackTarget(ctypes.Structure):
    """Where a packing kernel writes (`cuda/pack_params.cuh`)."""

    _fields_ = [
        *_pointers("codes", "status", "begin", "count", "positions", "outliers", "cursor"),
        ("num_slots", ctypes.c_int),
    ]


def allocated_table_struct(head_dim: int) -> type[ctypes.Structure]:
    """Returns the same for allocated codes (`cuda/allocated_table.cuh`).

    Args:
        head_dim: Of the cache.
    """

    class HeadTable(ctypes.Structure):
        _fields_ = [
            ("key_operands", ctypes.c_uint32 * head_dim),
            *((f"{name}_levels", ctypes.c_uint8 * 32) for name in ("key", "value", "wide")),
            ("offset", ctypes.c_int64 * 2),
            ("block_bytes", ctypes.c_int64 * 2),
            ("chunk_bytes", ctypes.c_int32 * 2),
            ("value_reading", ctypes.c_int32),
            ("value_factor", ctypes.c_float * 2),
            ("value_shift", ctypes.c_float),
            ("largest_key", ctypes.c_float),
            ("value_scale", ctypes.c_float),
            ("pairs", ctypes.c_uint16 * (head_dim // 2)),
            ("places", ctypes.c_uint16 * (head_dim // 2)),
            ("key_widths", ctypes.c_uint8 * 16),
        ]

    return HeadTable


def head_table_struct(bits: int, head_dim: int) -> type[ctypes.Structure]:
    """Returns the calibration of one kv head as the decode kernel reads it (`cuda/head_table.cuh`).

    Args:
        bits: Of the codes.
        head_dim: Of the cache.
    """
    levels = 1 << bits

    class HeadTable(ctypes.Structure):
        _fields_ = [
            ("key_operands", ctypes.c_uint32 * head_dim),
            ("levels", ctypes.c_uint8 * (4 * max(8, levels))),
            ("value_midpoints", ctypes.c_float * levels),
            ("value_ends", ctypes.c_float * 2),
            ("largest_key", ctypes.c_float),
            ("padding", ctypes.c_float),
        ]

    return HeadTable
