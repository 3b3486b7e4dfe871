"""Packing of codes whose width changes from tile to tile of a head's channels.

A tile is 8 RoPE pairs, the 16 channels `c` and `c + head_dim / 2` of 8 indices `c`. All codes of a
tile have one width. The row of a token and head holds its tiles one after the other. A tile of
width `w` is `w` planes of 16 bits, lowest bit of the codes first, with the first channels of the
pairs in the lower byte. A block stores the rows of each head together, so that a thread block,
which reads one head, finds its rows contiguous whatever the other heads' widths are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAIRS_PER_TILE = 8
TILE = 2 * PAIRS_PER_TILE
PLANE_BYTES = TILE // 8
MAX_WIDTH = 6


def tile_channels(pair_order: torch.Tensor) -> torch.Tensor:
    """Returns the channels of each tile in the order in which a plane holds them.

    Args:
        pair_order: int64 `[num_heads, head_dim / 2]`, a permutation of the pairs of each head.

    Returns:
        int64 `[num_heads, tiles, 16]`.
    """
    heads, pairs = pair_order.shape
    first = pair_order.view(heads, pairs // PAIRS_PER_TILE, PAIRS_PER_TILE)
    return torch.cat([first, first + pairs], -1)


@dataclass(frozen=True)
class TileGroup:
    """The tiles of one width.

    Attributes:
        width: Bits per code.
        tiles: int64 `[n]`, indices among the tiles of all heads.
        places: int64 `[n * width * 2]`, the bytes of their planes in a token's row of all heads.
    """

    width: int
    tiles: torch.Tensor
    places: torch.Tensor


class MixedRows:
    """Sorts the channels of one layer into tiles, and packs and unpacks the tiles' codes.

    Args:
        pair_order: int64 `[num_heads, head_dim / 2]`, the pairs of each head in the order of tiles.
        widths: int64 `[num_heads, tiles]`, bits per code of each tile, 1 to 6.

    Attributes:
        groups: The tiles by width.
        row_bytes: Bytes of a token's row per head.

    Raises:
        ValueError: A head's pairs do not fill whole tiles, or a width is not supported.
    """

    def __init__(self, pair_order: torch.Tensor, widths: torch.Tensor) -> None:
        device = widths.device
        pair_order, widths = pair_order.cpu().long(), widths.cpu().long()
        self.heads, pairs = pair_order.shape
        self.head_dim = 2 * pairs
        if pairs % PAIRS_PER_TILE:
            raise ValueError(f"head_dim: {self.head_dim} is not a multiple of {TILE}")
        if (found := tuple(widths.shape)) != (self.heads, pairs // PAIRS_PER_TILE):
            raise ValueError(f"widths: shape {found} for {self.heads} x {pairs} pairs")
        if int(widths.min()) < 1 or int(widths.max()) > MAX_WIDTH:
            raise ValueError(f"widths: must be 1 to {MAX_WIDTH}")
        self.row_bytes = (widths.sum(1) * PLANE_BYTES).tolist()
        first = torch.arange(self.heads)[:, None, None] * self.head_dim
        order = (tile_channels(pair_order) + first).view(-1)
        # 32 bits, because the cache counts these tables among its bytes
        self._order, self._place = (t.int().to(device) for t in (order, order.argsort()))
        flat = widths.view(-1)
        begin = (flat.cumsum(0) - flat) * PLANE_BYTES
        self.groups = []
        for width in sorted(set(flat.tolist())):
            tiles = (flat == width).nonzero().view(-1)
            places = begin[tiles, None] + torch.arange(width * PLANE_BYTES)
            self.groups.append(TileGroup(width, tiles.to(device), places.view(-1).to(device)))

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, all heads."""
        return sum(self.row_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the index tables."""
        held = [t for group in self.groups for t in (group.tiles, group.places)]
        return sum(t.nbytes for t in (self._order, self._place, *held))

    def to_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """Sorts `[blocks, num_heads, size, head_dim]` into `[blocks, size, tiles, 16]`."""
        rows = x.transpose(1, 2).flatten(2).index_select(2, self._order)
        return rows.unflatten(2, (-1, TILE))

    def from_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`to_tiles`; the result is contiguous."""
        rows = tiles.flatten(2).index_select(2, self._place)
        return rows.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2).contiguous()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Packs uint8 codes `[blocks, size, tiles, 16]` to uint8 `[blocks, size * token_bytes]`.

        Codes must be below two to the power of their tile's width.
        """
        blocks, size = codes.shape[:2]
        weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
        rows = codes.new_empty(blocks, size, self.token_bytes)
        for group in self.groups:
            shifts = torch.arange(group.width, dtype=torch.uint8, device=codes.device)
            chosen = codes.index_select(2, group.tiles).unsqueeze(3)
            planes = ((chosen >> shifts[:, None]) & 1).unflatten(4, (PLANE_BYTES, 8))
            packed = (planes * weights).sum(-1, dtype=torch.uint8)
            rows.index_copy_(2, group.places, packed.flatten(2))
        heads = rows.split(self.row_bytes, 2)
        return torch.cat([head.flatten(1) for head in heads], 1)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Unpacks the codes of blocks of `size` tokens: uint8 `[blocks, size, tiles, 16]`."""
        heads = packed.split([size * row for row in self.row_bytes], 1)
        rows = torch.cat([head.unflatten(1, (size, -1)) for head in heads], 2)
        bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
        tiles = self.heads * self.head_dim // TILE
        out = packed.new_empty(packed.shape[0], size, tiles, TILE)
        for group in self.groups:
            shape = (len(group.tiles), group.width, PLANE_BYTES, 1)
            planes = rows.index_select(2, group.places).unflatten(2, shape)
            spread = ((planes >> bits) & 1).flatten(4)  # [blocks, size, tiles, width, 16]
            codes = spread[:, :, :, 0].clone()
            for plane in range(1, group.width):
                codes |= spread[:, :, :, plane] << plane
            out.index_copy_(2, group.tiles, codes)
        return out
