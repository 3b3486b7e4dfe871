"""The quantizer of one layer: it packs blocks of keys and values, and reads them back.

Packing normalizes, detects outliers, codes the inliers and stores the outliers exactly (KVQuant,
arXiv 2401.18079). Reading looks levels up, scales them and puts the outliers in their places. Every
decision about a token depends on that token and on calibration alone. A sequence therefore gets the
same codes whatever batch it is part of, and in whatever chunks it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import SparseSlab, count_dtype, position_dtype
from kvquant.formats.head_share import HeadShare
from kvquant.formats.layer_quantizer import LayerQuantizer, outliers_per_side
from kvquant.formats.packing import pack, packed_bytes, unpack
from kvquant.kernels import cuda_pack
from kvquant.kernels import pytorch_fused as fused
from kvquant.kernels.backends import Backend, select
from kvquant.kernels.block_places import gathered
from kvquant.kernels.cache_shape import CacheShape, input_layout
from kvquant.kernels.pack_target import PackTarget
from kvquant.kernels.shared_outliers import split_shared_outliers
from kvquant.kernels.thresholds import key_table, key_thresholds
from kvquant.quantization.block_input import check_block, not_finite, outlier_slots


@dataclass(frozen=True)
class PackedKeys:
    """Packed keys: uint8 codes `[blocks, num_heads, bytes]` and exact outliers."""

    codes: torch.Tensor
    outliers: SparseSlab | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + (self.outliers.nbytes if self.outliers else 0)


@dataclass(frozen=True)
class PackedValues:
    """Packed values: codes, 16-bit zero and scale per token `[blocks, block_size]`, outliers."""

    codes: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor
    outliers: SparseSlab | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        sparse = self.outliers.nbytes if self.outliers else 0
        return self.codes.nbytes + self.zero.nbytes + self.scale.nbytes + sparse


class BatchedKVQuantizer:
    """Quantizes blocks of one layer's keys (before RoPE) and values.

    Args:
        tables: Key ranges and codebooks of the layer.
        bits: Per code, 2, 3 or 4.
        outliers: Fraction of elements kept exactly: 0 for none, 1 for all (a 16-bit passthrough).

    Attributes:
        key_room: Factor of the room for key outliers, see :meth:`key_slots`.
        share: Which of the model's kv heads the blocks have; None: all. The range of a token's
            values, and their outliers, are those of all heads.
    """

    def __init__(self, tables: LayerQuantizer, bits: int, outliers: float) -> None:
        if not 0.0 <= outliers <= 1.0:
            raise ValueError(f"outliers: must be between 0 and 1, got {outliers}")
        if tables.key_levels.numel() != 2**bits:
            raise ValueError(f"key_levels: {tables.key_levels.numel()} levels for {bits} bits")
        tables.check()
        self.tables = tables
        self.bits = bits
        self.outliers = outliers
        self._zero = tables.key_zero.unsqueeze(1)  # [num_heads, 1, head_dim]
        self._scale = tables.key_scale.unsqueeze(1)
        self._inverse = fused.channel_inverse(self._scale)
        self._key_midpoints = fused.midpoints(tables.key_levels)
        self._value_midpoints = fused.midpoints(tables.value_levels)
        self.key_room = 1.0
        self.share: HeadShare | None = None
        self._key_tables: dict[torch.dtype, torch.Tensor] = {}
        self._shapes: dict[object, CacheShape] = {}

    def _encode_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        normalized = (x.float() - self._zero) * self._inverse
        codes = fused.encode(normalized, self.tables.key_levels)
        if self.outliers <= 0:
            return codes, None
        if self.outliers >= 1:
            return codes, torch.ones(x.shape, dtype=torch.bool, device=x.device)
        return codes, normalized.abs_() > 1.0

    def _decode_keys(self, codes: torch.Tensor) -> torch.Tensor:
        return fused.decode(codes, self.tables.key_levels).mul_(self._scale).add_(self._zero)

    def _encode_values(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        blocks, heads, size, dim = x.shape
        rows = x.transpose(1, 2).reshape(blocks * size, heads * dim)
        per_side = self._per_side(heads * dim)
        if self.share is None:
            mask, low, high = fused.split_outliers(rows, per_side)
        else:
            mask, low, high = split_shared_outliers(rows, per_side, self.share)
        zero = ((high + low) * 0.5).to(x.dtype)
        scale = ((high - low) * 0.5).to(x.dtype)
        shape = (blocks, 1, size, 1)
        inverse = fused.inverse_range(scale.float()).view(shape)
        normalized = (x.float() - zero.float().view(shape)) * inverse
        codes = fused.encode(normalized, self.tables.value_levels)
        sparse = mask.view(blocks, size, heads, dim).transpose(1, 2) if per_side else None
        return codes, zero.view(blocks, size), scale.view(blocks, size), sparse

    def _per_side(self, channels: int) -> int:
        """Returns the value outliers at each end of a token.

        Args:
            channels: Number of channels of the heads that the blocks have.
        """
        ranks = 1 if self.share is None else self.share.ranks
        return outliers_per_side(self.outliers, channels * ranks)

    def value_slots(self, tokens: int, channels: int) -> int:
        """Returns the most value outliers of tokens.

        Args:
            tokens: Their number.
            channels: Number of channels of the heads that the blocks have.
        """
        return min(tokens * 2 * self._per_side(channels), tokens * channels)

    def _decode_values(
        self, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        shape = (zero.shape[0], 1, zero.shape[1], 1)
        levels = fused.decode(codes, self.tables.value_levels)
        return levels.mul_(scale.float().view(shape)).add_(zero.float().view(shape))

    def key_slots(self, elements: int) -> int:
        """Returns how many key outliers a GPU makes room for (see :func:`outlier_slots`)."""
        return outlier_slots(self.outliers, elements, self.key_room)

    def kernel_pack(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[PackedKeys, PackedValues, torch.Tensor] | None:
        """Packs keys and values by GPU kernels; None where PyTorch was selected.

        Args:
            keys: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`.
            values: The same shape.

        Returns:
            The results of :meth:`pack_keys` and :meth:`pack_values`, and an int32 `[1]` tensor that
            is 1 if the input holds NaN or Inf.
        """
        if self.backend(keys, values) not in ("cuda", "triton"):
            return None
        blocks, heads, size, dim = keys.shape
        device = keys.device
        # One array, because each fill of a few bytes costs a launch: the kernels' status (2), the
        # excess of values (always 0: each of their outliers has a slot), and the two cursors.
        words = torch.zeros(5, dtype=torch.int32, device=device)
        status, none = words[:2], words[2]

        def target(cursor: torch.Tensor, slots: int) -> PackTarget:
            room = size * packed_bytes(dim, self.bits)
            codes = torch.empty((blocks, heads, room), dtype=torch.uint8, device=device)
            if not slots:
                return PackTarget(codes, status)
            kind = count_dtype(size * dim)
            return PackTarget(
                codes,
                status,
                torch.empty((blocks, heads), dtype=torch.int32, device=device),
                torch.empty((blocks, heads), dtype=kind, device=device),
                torch.empty(slots, dtype=position_dtype(size * dim), device=device),
                torch.empty(slots, dtype=keys.dtype, device=device),
                cursor,
            )

        def slab(target: PackTarget, excess: torch.Tensor) -> SparseSlab | None:
            if target.begin is None or target.count is None:
                return None
            assert target.positions is not None and target.values is not None
            return SparseSlab(
                target.begin, target.count, target.positions, target.values,
                (blocks, heads, size, dim), excess,
            )  # fmt: skip

        k = target(words[3:4], self.key_slots(keys.numel()))
        v = target(words[4:5], self.value_slots(blocks * size, heads * dim))
        zero = torch.empty((blocks, size), dtype=values.dtype, device=device)
        scale = torch.empty_like(zero)
        if not self.kernel_pack_into(keys, values, k, v, zero, scale):
            return None
        values_packed = PackedValues(v.codes, zero, scale, slab(v, none))
        return PackedKeys(k.codes, slab(k, status[0])), values_packed, status[1:]

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
            key_target: Where keys go.
            value_target: Where values go.
            zero_out: 16-bit `[blocks, block_size]`.
            scale_out: The same.
            places: int32 `[blocks, 2]`, sequence and first token of each block; None: each sequence
                is one block.

        Returns:
            False, with nothing written, where PyTorch was selected.
        """
        size = zero_out.shape[-1]
        shape = self._shape(keys, values, size)
        backend = select("pack", shape, keys.device).backend
        if backend == "cuda":
            table = self._key_table(keys.dtype)
            if self.share is not None:
                cuda_pack.pack_keys(shape.pack_shape, keys, table, key_target, places)
                self._put_values(gathered(values, places, size), value_target, zero_out, scale_out)
                return True
            cuda_pack.pack(
                shape.pack_shape, keys, values, table, self._value_midpoints, key_target,
                value_target, zero_out, scale_out, places,
            )  # fmt: skip
            return True
        if backend != "triton":
            return False
        from kvquant.kernels import triton_pack as kernels

        keys, values = (gathered(x, places, size) for x in (keys, values))
        kernels.pack_keys(
            keys, self.tables.key_zero, self._inverse, self._key_midpoints, self.bits, key_target
        )
        if self.share is not None:
            self._put_values(values, value_target, zero_out, scale_out)
            return True
        kernels.pack_values(
            values, self._value_midpoints, self.bits, shape.outliers_per_side, value_target,
            zero_out, scale_out,
        )  # fmt: skip
        return True

    def _put_values(
        self, x: torch.Tensor, target: PackTarget, zero_out: torch.Tensor, scale_out: torch.Tensor
    ) -> None:
        """Packs values by PyTorch; kernels know the range of the heads alone that they read."""
        packed = self.pack_values(x)
        target.put(packed.codes, packed.outliers)
        zero_out.copy_(packed.zero)
        scale_out.copy_(packed.scale)
        target.status[1:] |= not_finite(x)

    def backend(self, keys: torch.Tensor, values: torch.Tensor) -> Backend | None:
        """Returns the backend that packs these blocks; None if they are refused by each."""
        return select("pack", self._shape(keys, values, keys.shape[2]), keys.device).backend

    def _shape(self, keys: torch.Tensor, values: torch.Tensor, size: int) -> CacheShape:
        """Returns the properties of blocks of `size` tokens that decide who packs them."""
        _, heads, _, dim = keys.shape
        key = (heads, size, dim, keys.dtype, input_layout(keys, values))
        if key not in self._shapes:
            self._shapes[key] = CacheShape(
                head_dim=dim,
                kv_heads=heads,
                queries_per_kv_head=1,  # packing does not depend on it
                dtype=keys.dtype,
                codebook="nuq",
                bits=self.bits,
                block_size=size,
                outliers=self.outliers,
                input_layout=key[-1],
            )
        return self._shapes[key]

    def _key_table(self, dtype: torch.dtype) -> torch.Tensor:
        """Thresholds of the key channels as the CUDA kernel reads them, made once per dtype."""
        if dtype not in self._key_tables:
            thresholds = key_thresholds(
                self.tables.key_zero,
                self._inverse.squeeze(1),
                self._key_midpoints,
                dtype,
                outliers=self.outliers > 0,
            )
            self._key_tables[dtype] = key_table(thresholds)
        return self._key_tables[dtype]

    def pack_keys(self, x: torch.Tensor) -> PackedKeys:
        """Packs key blocks `[blocks, num_heads, block_size, head_dim]` (fp16/bf16, before RoPE)."""
        check_block(x, "keys")
        codes, mask = self._encode_keys(x)
        packed = pack(codes, self.bits).flatten(2)  # bytes of a token are contiguous
        sparse = None if mask is None else SparseSlab.from_mask(x, mask, self.key_slots(x.numel()))
        return PackedKeys(packed, sparse)

    def _unpack(self, packed: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        return unpack(packed.unflatten(2, (shape[2], -1)), self.bits)

    def unpack_keys(self, packed: PackedKeys, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Reads fp32 keys of a block shape back, bit for bit what :meth:`fake_keys` returns."""
        out = self._decode_keys(self._unpack(packed.codes, shape))
        if packed.outliers is not None:
            packed.outliers.put_into(out)
        return out

    def pack_values(self, x: torch.Tensor) -> PackedValues:
        """Packs value blocks `[blocks, num_heads, block_size, head_dim]` (fp16/bf16)."""
        check_block(x, "values")
        codes, zero, scale, mask = self._encode_values(x)
        packed = pack(codes, self.bits).flatten(2)  # bytes of a token are contiguous
        slots = self.value_slots(x.shape[0] * x.shape[2], x.shape[1] * x.shape[3])
        sparse = None if mask is None else SparseSlab.from_mask(x, mask, slots)
        return PackedValues(packed, zero, scale, sparse)

    def unpack_values(
        self, packed: PackedValues, shape: torch.Size | tuple[int, ...]
    ) -> torch.Tensor:
        """Reads fp32 values of a block shape back, as :meth:`fake_values` returns them."""
        codes = self._unpack(packed.codes, shape)
        out = self._decode_values(codes, packed.zero, packed.scale)
        if packed.outliers is not None:
            packed.outliers.put_into(out)
        return out

    def fake_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes and dequantizes keys without packing, any number of tokens per block."""
        check_block(x, "keys")
        codes, mask = self._encode_keys(x)
        out = self._decode_keys(codes)
        return out if mask is None else torch.where(mask, x.float(), out)

    def fake_values(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes and dequantizes values without packing, any number of tokens per block."""
        check_block(x, "values")
        codes, zero, scale, mask = self._encode_values(x)
        out = self._decode_values(codes, zero, scale)
        return out if mask is None else torch.where(mask, x.float(), out)
