"""The quantizer of one layer with allocated widths: it packs blocks, and reads them back.

Keys (before RoPE) are normalized by static ranges per channel and coded with the width of their
tile; those outside the range are stored exactly. Values are rotated within their head by a Hadamard
matrix, which makes outliers needless, normalized by their token's range, and coded with the width
of their head. Every decision about a token depends on it and on calibration alone.
"""

from __future__ import annotations

import functools

import torch

from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.formats.head_share import HeadShare
from kvquant.formats.mixed_packing import MixedRows
from kvquant.kernels import cuda_pack_allocated
from kvquant.kernels import pytorch_fused as fused
from kvquant.kernels.backends import select
from kvquant.kernels.cache_shape import LOOKED_UP_BITS, CacheShape
from kvquant.kernels.cuda_pack_allocated import SideTables
from kvquant.kernels.pack_target import PackTarget
from kvquant.quantization.block_input import check_block, not_finite, outlier_slots
from kvquant.quantization.hadamard import rotate

PARTS = 64.0  # a power of two beyond the square root of any head_dim


class TileCodes:
    """Codes elements that are sorted into tiles, each tile by the codebook of its width.

    Args:
        rows: Layout of the tiles.
        levels: fp32 `[6, 64]`, codebooks (see :class:`AllocatedLayer`).

    Attributes:
        levels: fp32 codebook of each width that a tile has.
    """

    def __init__(self, rows: MixedRows, levels: torch.Tensor) -> None:
        self.rows = rows
        self.levels = {g.width: levels[g.width - 1, : 2**g.width].clone() for g in rows.groups}

    @property
    def nbytes(self) -> int:
        """Bytes of codebooks and index tables."""
        return self.rows.nbytes + sum(levels.nbytes for levels in self.levels.values())

    def encode(self, normalized: torch.Tensor) -> torch.Tensor:
        """Returns the uint8 codes of fp32 `[blocks, size, tiles, 16]`."""
        codes = torch.empty(normalized.shape, dtype=torch.uint8, device=normalized.device)
        for group in self.rows.groups:
            levels = self.levels[group.width]
            part = normalized.index_select(2, group.tiles)
            codes.index_copy_(2, group.tiles, fused.encode(part, levels))
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the fp32 levels of uint8 codes `[blocks, size, tiles, 16]`."""
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for group in self.rows.groups:
            part = fused.decode(codes.index_select(2, group.tiles), self.levels[group.width])
            out.index_copy_(2, group.tiles, part)
        return out


class AllocatedQuantizer:
    """Quantizes blocks of one layer's keys (before RoPE) and values.

    Args:
        layer: Calibration of the layer.
        outliers: Calibrated fraction of keys outside their range, which are stored exactly; 0
            clips them.
        rotation: Whether values are rotated while they are packed, and back when they are read.
        per_head: Whether the values of each head have a range of their own, or those of all heads
            of a token share one.

    Attributes:
        key_room: Factor of the room for key outliers, see :meth:`key_slots`.
        share: Which of the model's kv heads the blocks have; None: all. A range that heads share is
            that of all heads.
    """

    def __init__(
        self, layer: AllocatedLayer, *, outliers: float, rotation: bool, per_head: bool
    ) -> None:
        self.outliers, self.rotation, self.per_head = outliers, rotation, per_head
        self._keys = TileCodes(layer.key_rows(), layer.key_levels)
        self._values = TileCodes(layer.value_rows(), layer.value_levels)
        self._zero = self._keys.rows.to_tiles(layer.key_zero[None, :, None])
        self._scale = self._keys.rows.to_tiles(layer.key_scale[None, :, None])
        self._inverse = fused.channel_inverse(self._scale)
        self._value_scale = layer.value_scale[:, None, None].clone()
        self._value_inverse = 1.0 / self._value_scale
        self.key_room = 1.0
        self.share: HeadShare | None = None
        self._shapes: dict[object, CacheShape] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, which the sequences of the layer share."""
        ranges = (self._zero, self._scale, self._inverse, self._value_scale, self._value_inverse)
        return self._keys.nbytes + self._values.nbytes + sum(t.nbytes for t in ranges)

    def key_slots(self, elements: int) -> int:
        """Returns how many key outliers a GPU makes room for (see :func:`outlier_slots`)."""
        return outlier_slots(self.outliers, elements, self.key_room)

    def _rotated(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the 16-bit values that are coded."""
        return rotate(values.float()).to(values.dtype) if self.rotation else values

    @functools.cached_property
    def _tables(self) -> tuple[SideTables, SideTables]:
        """The calibration of keys and of values as the CUDA kernels read it."""
        ranges = (self._zero, self._inverse)
        return (
            SideTables.make(self._keys.rows, self._keys.levels, ranges),
            SideTables.make(self._values.rows, self._values.levels, self._value_inverse),
        )

    def block_bytes(self, size: int) -> tuple[int, int]:
        """Returns the bytes of the key codes and of the value codes of a block of `size` tokens."""
        return size * self._keys.rows.token_bytes, size * self._values.rows.token_bytes

    def kernels(self, like: torch.Tensor) -> bool:
        """Tells whether kernels pack blocks `[blocks, heads, size, head_dim]` like this one."""
        return self._by_kernels(like, like.shape[2])

    def _by_kernels(self, like: torch.Tensor, size: int) -> bool:
        return select("pack", self._shape(like, size), like.device).backend == "cuda"

    def _shape(self, like: torch.Tensor, size: int) -> CacheShape:
        """Returns the properties of blocks of `size` tokens that decide who packs them."""
        _, heads, _, dim = like.shape
        key = (heads, size, dim, like.dtype)
        if key not in self._shapes:
            self._shapes[key] = CacheShape(
                head_dim=dim,
                kv_heads=heads,
                queries_per_kv_head=1,  # packing does not depend on it
                dtype=like.dtype,
                codebook="allocated",
                bits=LOOKED_UP_BITS,
                block_size=size,
                outliers=self.outliers,
                range_per_head=self.per_head,
            )
        return self._shapes[key]

    def kernel_pack_into(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_target: PackTarget,
        value_target: PackTarget,
        zero_out: torch.Tensor,
        scale_out: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> bool:
        """Packs keys and values into memory that is already there, without a host sync.

        Args:
            keys: fp16/bf16 `[sequences, num_heads, tokens, head_dim]`.
            values: The same shape.
            key_target: Where keys go; `codes` are `[blocks, bytes]`.
            value_target: Where values go, without outliers.
            zero_out: 16-bit `[blocks, block_size]`, or `[blocks, num_heads, block_size]`.
            scale_out: The same.
            places: int32 `[blocks, 2]`, sequence and first token of each block; None: each sequence
                is one block.

        Returns:
            False, with nothing written, where PyTorch was selected.
        """
        size = zero_out.shape[-1]
        if not self._by_kernels(keys, size):
            return False
        cuda_pack_allocated.pack(
            self._shape(keys, size).allocated_pack_shape, keys, self._rotated(values),
            self._tables, key_target, value_target, zero_out, scale_out, self.share, places,
        )  # fmt: skip
        return True

    def not_finite(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns int32 `[1]`, 1 if keys or rotated values hold NaN or Inf, without a sync."""
        return not_finite(keys, self._rotated(values))

    def _encode_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns codes `[blocks, size, tiles, 16]` and the mask of outliers in the shape of x."""
        check_block(x, "keys")
        normalized = (self._keys.rows.to_tiles(x).float() - self._zero) * self._inverse
        codes = self._keys.encode(normalized)
        if self.outliers <= 0:
            return codes, None
        return codes, self._keys.rows.from_tiles(normalized.abs() > 1.0)

    def _decode_keys(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the fp32 keys that codes stand for, `[blocks, heads, size, head_dim]`."""
        keys = self._keys.decode(codes).mul_(self._scale).add_(self._zero)
        return self._keys.rows.from_tiles(keys)

    def _encode_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns codes, and 16-bit zeros and scales per token, or per head and token."""
        x = self._rotated(x)
        check_block(x, "values")
        over = (-1,) if self.per_head else (1, 3)
        scaled = x.float() * self._value_inverse
        most, least = scaled.amax(over), scaled.amin(over)
        if self.share is not None and not self.per_head:
            ends = self.share.largest(torch.stack((most, -least)))
            most, least = ends[0], -ends[1]
        low, high = least * 0.5, most * 0.5
        zero, scale = (high + low).to(x.dtype), (high - low).to(x.dtype)
        normalized = (scaled - self._spread(zero)) * fused.inverse_range(self._spread(scale))
        return self._values.encode(self._values.rows.to_tiles(normalized)), zero, scale

    def _decode_values(
        self, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Returns the fp32 values that codes stand for, `[blocks, heads, size, head_dim]`."""
        levels = self._values.rows.from_tiles(self._values.decode(codes))
        ones = torch.ones(levels.shape[-1], device=levels.device)
        if self.rotation:
            levels, ones = rotate(levels, inverse=True), rotate(ones, inverse=True)
        # Rounding, and errors that add up in one channel, may exceed what readers' 16 bits hold.
        # The sum is made of small parts, because fp32 holds no more than bf16 does.
        most = torch.finfo(scale.dtype).max / PARTS
        out = levels * (self._spread(scale) / PARTS) + ones * (self._spread(zero) / PARTS)
        out *= self._value_scale
        return out.clamp_(-most, most).mul_(PARTS)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """Returns zeros or scales as fp32 that broadcast over `[blocks, heads, size, head_dim]`."""
        return (x if self.per_head else x.unsqueeze(1)).unsqueeze(-1).float()

    def fake_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes and dequantizes keys without packing, any number of tokens per block."""
        codes, mask = self._encode_keys(x)
        out = self._decode_keys(codes)
        return out if mask is None else torch.where(mask, x.float(), out)

    def fake_values(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes and dequantizes values without packing, any number of tokens per block."""
        return self._decode_values(*self._encode_values(x))

    def pack_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, SparseSlab | None]:
        """Packs key blocks `[blocks, heads, size, head_dim]` to codes and exact outliers."""
        codes, mask = self._encode_keys(x)
        packed = self._keys.rows.pack(codes)
        if mask is None:
            return packed, None
        return packed, SparseSlab.from_mask(x, mask, self.key_slots(x.numel()))

    def unpack_keys(
        self, packed: torch.Tensor, outliers: SparseSlab | None, size: int
    ) -> torch.Tensor:
        """Reads fp32 keys of blocks back, bit for bit what :meth:`fake_keys` returns."""
        out = self._decode_keys(self._keys.rows.unpack(packed, size))
        if outliers is not None:
            outliers.put_into(out)
        return out

    def pack_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packs value blocks `[blocks, heads, size, head_dim]` to codes, zeros and scales."""
        codes, zero, scale = self._encode_values(x)
        return self._values.rows.pack(codes), zero, scale

    def unpack_values(
        self, packed: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, size: int
    ) -> torch.Tensor:
        """Reads fp32 values of blocks back, as :meth:`fake_values` returns them."""
        return self._decode_values(self._values.rows.unpack(packed, size), zero, scale)
