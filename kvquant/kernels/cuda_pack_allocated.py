"""Quantize and pack with allocated widths by the CUDA kernels of `cuda/pack_allocated.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.head_share import HeadShare
from kvquant.formats.lane_layout import CHUNK, looked_up
from kvquant.formats.mixed_packing import MAX_WIDTH, PLANE_BYTES, MixedRows
from kvquant.kernels import cuda_structs
from kvquant.kernels.block_places import block_count
from kvquant.kernels.cuda_build import Function, index_of, load, multiprocessors
from kvquant.kernels.cuda_header import cuda_header
from kvquant.kernels.cuda_pack import side_by_side, source_of, target_of
from kvquant.kernels.pack_target import PackTarget
from kvquant.kernels.pytorch_fused import midpoints

LEVEL_ROW = 2 + 2**MAX_WIDTH  # of the table of midpoints, as in `cuda/pack_allocated_shape.cuh`
TICKET_WORDS, CHUNK_WORDS = 32, 2 * CHUNK + 8  # of the values' workspace, as there
FIND_ENDS, ENCODE = 1, 2  # phases of the values, as in `cuda/pack_allocated_values.cuh`
EVEN_ERROR = 0.2  # of a step, by which the midpoints that are computed may be off
ALIGNMENT = 8  # elements that a thread loads at once


@dataclass(frozen=True)
class AllocatedPackShape:
    """The shape of a cache that the kernels are compiled for; widths are data.

    Attributes:
        head_dim: 64, 128 or 256.
        heads: kv heads.
        block_size: Tokens per block, a multiple of 64.
        dtype: fp16 or bf16.
        outliers: Whether keys have any.
        range_per_head: Whether each head's values have a range of their own; else each token's.
    """

    head_dim: int
    heads: int
    block_size: int
    dtype: torch.dtype
    outliers: bool
    range_per_head: bool

    def constants(self) -> dict[str, int | bool]:
        """Constants of the source (`cuda/pack_allocated_shape.cuh` says what they mean)."""
        elements = self.block_size * self.head_dim
        return {
            "HEAD_DIM": self.head_dim,
            "NUM_KV_HEADS": self.heads,
            "BLOCK_SIZE": self.block_size,
            "HAS_KEY_OUTLIERS": self.outliers,
            "RANGE_PER_HEAD": self.range_per_head,
            "WIDE_POSITIONS": position_dtype(elements) is torch.int32,
            "WIDE_COUNTS": count_dtype(elements) is torch.int32,
            "BF16": self.dtype is torch.bfloat16,
        }

    def header(self) -> str:
        """Returns the text of `generated.cuh` for this shape."""
        structs = (cuda_structs.PackSource, cuda_structs.PackTarget, PackTables)
        return cuda_header(self.constants(), structs)


class PackTables(ctypes.Structure):
    """The calibration of one side as the kernels read it (`cuda/pack_allocated_params.cuh`)."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("tiles", "levels", "ranges", "channels", "inverses")
        ),
        ("planes", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class SideTables:
    """The calibration of a layer's keys or values as tensors on a GPU.

    Attributes:
        tiles: int32 `[num_heads, tiles, 4]`: the tile's width, its first plane among those of the
            head, the head's first plane among those of all heads, and planes of the head.
        levels: fp32 `[6, LEVEL_ROW]`, see :func:`midpoint_row`.
        ranges: fp32 `[num_heads, tiles, 2, 4, 4]` for keys: of the channels 8 s + 2 t + e of a tile
            zeros (e = 0, 1) and inverses, by s and t. Else None.
        channels: int32 `[num_heads, tiles, 4]` for keys: of the tile's channels 2 t and 2 t + 1 the
            places within the head, in the lower and the upper half. Else None.
        inverses: fp32 `[num_heads]` for values, their factors before the range is taken. Else None.
        planes: Planes of all heads.
    """

    tiles: torch.Tensor
    levels: torch.Tensor
    ranges: torch.Tensor | None
    channels: torch.Tensor | None
    inverses: torch.Tensor | None
    planes: int

    @classmethod
    def make(
        cls,
        rows: MixedRows,
        levels: Mapping[int, torch.Tensor],
        ranges: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
    ) -> SideTables:
        """Builds the tables of a side.

        Args:
            rows: Layout of the codes.
            levels: fp32 codebook of each width that a tile has.
            ranges: For keys zeros and inverses, fp32, in the order of tiles; for values the factors
                of heads, fp32.

        Raises:
            ValueError: Levels that the kernels compute are not evenly spaced.
        """
        device = next(iter(levels.values())).device
        widths = torch.tensor(rows.tile_widths, dtype=torch.int32)
        planes = widths.sum(1, keepdim=True)
        parts = (
            widths, widths.cumsum(1) - widths, planes.cumsum(0) - planes, planes
        )  # fmt: skip
        tiles = torch.stack([p.expand_as(widths).int() for p in parts], -1)
        table = torch.zeros(MAX_WIDTH, LEVEL_ROW)
        for width, codebook in levels.items():
            row = midpoint_row(codebook.cpu(), width, of_keys=rows.of_keys)
            table[width - 1, : len(row)] = row
        total = int(planes.sum())
        if isinstance(ranges, torch.Tensor):
            factors = ranges.reshape(-1).contiguous()
            return cls(tiles.to(device), table.to(device), None, None, factors, total)
        split = [r.reshape(*widths.shape, 2, 4, 2) for r in ranges]
        first = rows.channels[..., :8].int().unflatten(-1, (4, 2))
        return cls(
            tiles.to(device),
            table.to(device),
            torch.cat(split, -1).contiguous(),
            (first[..., 0] | first[..., 1] << 16).contiguous(),
            None,
            total,
        )

    @property
    def argument(self) -> PackTables:
        """The kernels' argument."""
        tensors = (self.tiles, self.levels, self.ranges, self.channels, self.inverses)
        return PackTables(*(0 if t is None else t.data_ptr() for t in tensors), self.planes)


def midpoint_row(levels: torch.Tensor, width: int, *, of_keys: bool) -> torch.Tensor:
    """Returns two factors and the midpoints of a codebook.

    Of evenly spaced midpoints the factors `(a, b)` make `a x + b` 0 at the first midpoint and 1 at
    the last one; for more than 4 bits the other way round, see `cuda/pack_allocated_codes.cuh`.

    Args:
        levels: fp32 `[2**width]`, sorted.
        width: Bits per code.
        of_keys: Whether they are levels of keys.

    Raises:
        ValueError: The kernels compute the midpoints of this width, and they are not evenly spaced.
    """
    edges = midpoints(levels)
    factors = torch.zeros(2, dtype=torch.float64)
    if width not in looked_up(of_keys=of_keys) and width > 1:
        first, last, steps = float(edges[0]), float(edges[-1]), len(edges) - 1
        found = (edges.double() - first) * (steps / max(last - first, 1e-30))
        if float((found - torch.arange(len(edges))).abs().max()) > EVEN_ERROR:
            raise ValueError(f"levels of width {width} are not evenly spaced")
        slope = 1.0 / (last - first)
        factors[0], factors[1] = slope, -first * slope
        if width > 4:
            factors[0], factors[1] = -slope, last * slope
    return torch.cat([factors.float(), edges])


@functools.cache
def functions(shape: AllocatedPackShape, device: int) -> tuple[Function, Function]:
    """Returns the kernels `pack_allocated_keys` and `pack_allocated_values`, compiled for a GPU."""
    module = load("pack_allocated.cu", shape.header(), device)
    return module.function("pack_allocated_keys"), module.function("pack_allocated_values")


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """Returns blocks of which threads can load 16 bytes at once: a copy, if they lie in between."""
    steps = x.stride()
    if steps[-1] == 1 and x.data_ptr() % 16 == 0 and not any(s % ALIGNMENT for s in steps[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _checked(
    shape: AllocatedPackShape,
    x: torch.Tensor,
    places: torch.Tensor | None,
    codes: torch.Tensor,
    planes: int,
) -> int:
    """Returns the number of blocks, which and whose codes have the shape of the kernels."""
    blocks, size = block_count(x, places), shape.block_size
    assert x.shape[1] == shape.heads and x.shape[3] == shape.head_dim and x.dtype == shape.dtype
    assert places is not None or x.shape[2] == size
    assert codes.shape == (blocks, size * planes * PLANE_BYTES) and codes.is_contiguous()
    assert codes.data_ptr() % 4 == 0
    return blocks


def pack_keys(
    shape: AllocatedPackShape,
    x: torch.Tensor,
    tables: SideTables,
    target: PackTarget,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes key blocks and writes their codes and outliers.

    Args:
        shape: Of the cache.
        x: `[sequences, num_heads, tokens, head_dim]`.
        tables: Of keys.
        target: Where to; `codes` are `[blocks, bytes]`.
        places: Where the blocks lie; see :func:`kvquant.kernels.block_places.block_count`.
    """
    blocks = _checked(shape, x, places, target.codes, tables.planes)
    if not blocks:
        return
    x = _loadable(x)
    kernel, _ = functions(shape, index_of(x))
    kernel(
        (blocks * shape.heads, 1, 1), shape.head_dim,
        source_of(x, places), target_of(target), tables.argument,
    )  # fmt: skip


def pack_values(
    shape: AllocatedPackShape,
    x: torch.Tensor,
    tables: SideTables,
    target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
    share: HeadShare | None = None,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes value blocks and writes their codes, zeros and scales.

    Args:
        shape: Of the cache.
        x: `[sequences, num_heads, tokens, head_dim]`, rotated as they are to be coded.
        tables: Of values.
        target: Where to; `codes` are `[blocks, bytes]`.
        zero_out: 16-bit `[blocks, block_size]`, or `[blocks, num_heads, block_size]` with a range
            per head, contiguous.
        scale_out: The same.
        share: Which of the model's kv heads the blocks have; None: all.
        places: As of :func:`pack_keys`.
    """
    blocks = _checked(shape, x, places, target.codes, tables.planes)
    assert zero_out.is_contiguous() and scale_out.is_contiguous()
    if not blocks:
        return
    x, index = _loadable(x), index_of(x)
    _, kernel = functions(shape, index)
    chunks = blocks * (shape.block_size // CHUNK)
    workspace = None
    if not shape.range_per_head:
        words = TICKET_WORDS + chunks * CHUNK_WORDS
        workspace = torch.zeros(words, dtype=torch.int32, device=x.device)
    # Thread blocks of a chunk wait for each other, so there must be room for all of its heads.
    shared = share is not None and not shape.range_per_head
    at_once = shape.range_per_head or shape.heads <= multiprocessors(index)
    for phases in (FIND_ENDS | ENCODE,) if at_once and not shared else (FIND_ENDS, ENCODE):
        if share is not None and workspace is not None and phases == ENCODE:
            share.largest_words(workspace)
        kernel(
            (chunks * shape.heads, 1, 1), shape.head_dim, source_of(x, places),
            *(ctypes.c_void_p(t.data_ptr()) for t in (
                target.codes, target.status, zero_out, scale_out,
            )),
            tables.argument, ctypes.c_void_p(0 if workspace is None else workspace.data_ptr()),
            ctypes.c_int(phases),
        )  # fmt: skip


def pack(
    shape: AllocatedPackShape,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: tuple[SideTables, SideTables],
    key_target: PackTarget,
    value_target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
    share: HeadShare | None = None,
    places: torch.Tensor | None = None,
) -> None:
    """Quantizes and packs key and value blocks.

    Args:
        shape: Of the cache.
        keys: As in :func:`pack_keys`.
        values: As in :func:`pack_values`.
        tables: Of keys and of values.
        key_target: Where keys go.
        value_target: Where values go.
        zero_out: Of :func:`pack_values`.
        scale_out: Of :func:`pack_values`.
        share: Of :func:`pack_values`.
        places: As of :func:`pack_keys`.
    """
    of_values, ranges = tables[1], (zero_out, scale_out)
    side_by_side(
        keys,
        lambda: pack_keys(shape, keys, tables[0], key_target, places),
        lambda: pack_values(shape, values, of_values, value_target, *ranges, share, places),
    )
