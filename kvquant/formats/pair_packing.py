"""Packing of codes whose width changes from RoPE pair to RoPE pair.

The channels of all heads are sorted by width. The codes that a block has of one width are packed
together (:mod:`kvquant.formats.packing`), and the parts follow one another by rising width, so that
a code takes its width and nothing else. Codes of more than 4 bits are two parts, the lower 4 bits
first.
"""

from __future__ import annotations

import torch

from kvquant.formats.packing import pack, packed_bytes, unpack

MAX_WIDTH = 8
PLANE = 4  # bits that one part of wider codes has


def _planes(width: int) -> tuple[int, ...]:
    """Returns the bits of the parts that codes are packed in."""
    return (width,) if width <= PLANE else (PLANE, width - PLANE)


class PairRows:
    """Sorts the channels of one layer by the widths of their pairs, and packs and unpacks codes.

    Args:
        widths: `[num_heads, head_dim / 2]`, bits per code of both channels of a pair, 1 to 8.

    Attributes:
        channel_widths: int64 `[num_heads, head_dim]`, on the CPU.
        widths: The widths that there are, rising.
        sizes: Channels of each of these widths, all heads together.

    Raises:
        ValueError: A width is not supported.
    """

    def __init__(self, widths: torch.Tensor) -> None:
        whole = widths.cpu().long()
        if int(whole.min()) < 1 or int(whole.max()) > MAX_WIDTH:
            raise ValueError(f"widths: must be 1 to {MAX_WIDTH}")
        self.channel_widths = torch.cat([whole, whole], 1)
        flat = self.channel_widths.view(-1)
        self.widths = sorted(set(flat.tolist()))
        self.sizes = [int((flat == width).sum()) for width in self.widths]
        order = flat.argsort(stable=True)
        # 32 bits, because the cache counts these tables among its bytes
        self._order, self._place = (t.int().to(widths.device) for t in (order, order.argsort()))

    @property
    def token_bits(self) -> int:
        """Bits of a token's codes, all heads."""
        return int(self.channel_widths.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the index tables."""
        return self._order.nbytes + self._place.nbytes

    def by_width(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Splits `[blocks, num_heads, size, head_dim]` to `[blocks, size, channels]` per width."""
        rows = x.transpose(1, 2).flatten(2).index_select(2, self._order)
        return list(rows.split(self.sizes, 2))

    def whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Undoes :meth:`by_width`; the result is contiguous."""
        rows = torch.cat(parts, 2).index_select(2, self._place)
        return rows.unflatten(2, self.channel_widths.shape).transpose(1, 2).contiguous()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Packs uint8 codes `[blocks, num_heads, size, head_dim]`; `size` is a multiple of 4.

        Returns:
            uint8 `[blocks, size * token_bits / 8]`.
        """
        out = []
        for width, part in zip(self.widths, self.by_width(codes), strict=True):
            flat = part.flatten(1)
            for plane, bits in enumerate(_planes(width)):
                shifted = flat >> (PLANE * plane)
                out.append(pack(shifted & ((1 << bits) - 1), bits))
        return torch.cat(out, 1)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Unpacks the codes of blocks of `size` tokens."""
        parts, at = [], 0
        for width, channels in zip(self.widths, self.sizes, strict=True):
            codes = None
            for plane, bits in enumerate(_planes(width)):
                end = at + packed_bytes(size * channels, bits)
                found = unpack(packed[:, at:end], bits) << (PLANE * plane)
                codes, at = found if codes is None else codes | found, end
            assert codes is not None
            parts.append(codes.unflatten(1, (size, channels)))
        return self.whole(parts)
