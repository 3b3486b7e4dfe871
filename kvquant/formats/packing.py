"""Packing of codes of 1 to 8 bits into bytes.

The codes of one block are cut into *lanes*: with `w` bits per element, byte `i` of a plane holds
the elements `i`, `i + n/p`, `i + 2n/p`, ... where `p = 8 / w` codes share a byte. Packing is then
a few operations on contiguous slices, and a thread block that loads contiguous bytes gets `p`
contiguous runs of elements. Widths that do not divide 8 are several planes, the lowest bits first:
three bits are a 2-bit plane followed by a 1-bit plane.
"""

from __future__ import annotations

import torch

PLANES: dict[int, tuple[int, ...]] = {
    **{1: (1,), 2: (2,), 3: (2, 1), 4: (4,)},
    **{5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)},
}


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes of `count` codes of `bits` bits; `count` must be a multiple of 8."""
    if bits not in PLANES:
        raise ValueError(f"bits: {bits} is not supported, use one of {sorted(PLANES)}")
    if count % 8:
        raise ValueError(f"count: {count} is not a multiple of 8")
    return count * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along the last dimension.

    Args:
        codes: uint8 `[..., count]`, each below `2**bits`; `count` a multiple of 8.
        bits: 1 to 8.

    Returns:
        uint8 `[..., count * bits / 8]`.
    """
    count = codes.shape[-1]
    out = codes.new_empty((*codes.shape[:-1], packed_bytes(count, bits)))
    start, shift = 0, 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        lane = count // per_byte
        plane = out[..., start : start + lane]
        mask = (1 << width) - 1
        for j in range(per_byte):
            piece = codes[..., j * lane : (j + 1) * lane]
            piece = (piece >> shift if shift else piece) & mask
            if j == 0:
                plane.copy_(piece)
            else:
                plane.bitwise_or_(piece << (j * width))
        start, shift = start + lane, shift + width
    return out


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpacks the codes that :func:`pack` packed.

    Args:
        packed: uint8 `[..., count * bits / 8]`.
        bits: 1 to 8.

    Returns:
        uint8 codes `[..., count]`.
    """
    count = packed.shape[-1] * 8 // bits
    packed_bytes(count, bits)
    out = packed.new_empty((*packed.shape[:-1], count))
    start, shift = 0, 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        lane = count // per_byte
        plane = packed[..., start : start + lane]
        mask = (1 << width) - 1
        for j in range(per_byte):
            piece = (plane >> (j * width) if j else plane) & mask
            target = out[..., j * lane : (j + 1) * lane]
            if shift:
                target.bitwise_or_(piece << shift)
            else:
                target.copy_(piece)
        start, shift = start + lane, shift + width
    return out
