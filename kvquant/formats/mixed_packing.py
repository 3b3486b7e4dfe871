"""Packing of codes whose width changes from tile to tile of a head's channels.

A tile is 8 RoPE pairs, the 16 channels `c` and `c + head_dim / 2` of 8 indices `c`. All codes of a
tile have one width. A block stores the codes of each head together, so that a thread block, which
reads one head, finds them contiguous whatever the other heads' widths are. Those of a head are its
chunks of 64 tokens, in each of which the tiles follow one another in the order of
:mod:`kvquant.formats.lane_layout`. What a block has beyond whole chunks follows in rows, one per
token: a tile of width `w` is `w` planes of 16 bits there, lowest bit of the codes first, with the
first channels of the pairs in the lower byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.lane_layout import (
    CHUNK,
    LANES,
    WORD_BYTES,
    bytes_of,
    pack_chunks,
    unpack_chunks,
)

PAIRS_PER_TILE = 8
TILE = 2 * PAIRS_PER_TILE
PLANE_BYTES = TILE // 8  # of one token
CHUNK_PLANE_BYTES = LANES * WORD_BYTES  # of a chunk: a word of each lane
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
        places: int64 `[n * width]`, indices of their planes among those of all heads.
    """

    width: int
    tiles: torch.Tensor
    places: torch.Tensor


class MixedRows:
    """Sorts the channels of one layer into tiles, and packs and unpacks the tiles' codes.

    Args:
        pair_order: int64 `[num_heads, head_dim / 2]`, the pairs of each head in the order of tiles.
        widths: int64 `[num_heads, tiles]`, bits per code of each tile, 1 to 6.
        of_keys: Whether the codes are those of keys; else of values.

    Attributes:
        groups: The tiles by width.
        planes: Planes of each head, the sum of its tiles' widths.
        tile_widths: Bits per code of each tile, by head.

    Raises:
        ValueError: A head's pairs do not fill whole tiles, or a width is not supported.
    """

    def __init__(
        self, pair_order: torch.Tensor, widths: torch.Tensor, *, of_keys: bool = True
    ) -> None:
        self.of_keys = of_keys
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
        self.planes: list[int] = widths.sum(1).tolist()
        self.tile_widths: list[list[int]] = widths.tolist()
        first = torch.arange(self.heads)[:, None, None] * self.head_dim
        order = (tile_channels(pair_order) + first).view(-1)
        # 32 bits, because the cache counts these tables among its bytes
        self._order, self._place = (t.int().to(device) for t in (order, order.argsort()))
        flat = widths.view(-1)
        begin = flat.cumsum(0) - flat
        self.groups = []
        for width in sorted(set(flat.tolist())):
            tiles = (flat == width).nonzero().view(-1)
            places = begin[tiles, None] + torch.arange(width)
            self.groups.append(TileGroup(width, tiles.to(device), places.view(-1).to(device)))

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, all heads."""
        return sum(self.planes) * PLANE_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of the index tables."""
        held = [t for group in self.groups for t in (group.tiles, group.places)]
        return sum(t.nbytes for t in (self._order, self._place, *held))

    @property
    def channels(self) -> torch.Tensor:
        """The channels of each tile within its head, int32 `[num_heads, tiles, 16]`."""
        return self._order.view(self.heads, -1, TILE) % self.head_dim

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
        whole = codes.shape[1] // CHUNK * CHUNK
        chunks = self._pack_chunks(codes[:, :whole]).split(self.planes, 2)
        rows = self._pack_rows(codes[:, whole:]).split(self.planes, 2)
        both = zip(chunks, rows, strict=True)
        return torch.cat([part.flatten(1) for head in both for part in head], 1)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Unpacks the codes of blocks of `size` tokens: uint8 `[blocks, size, tiles, 16]`."""
        chunks, rest = divmod(size, CHUNK)
        in_chunks, in_rows = chunks * CHUNK_PLANE_BYTES, rest * PLANE_BYTES
        sizes = [planes * part for planes in self.planes for part in (in_chunks, in_rows)]
        parts = packed.split(sizes, 1)

        def joined(heads: tuple[torch.Tensor, ...], tokens: int) -> torch.Tensor:
            """Returns the planes of all heads, `[blocks, tokens, planes, bytes]`."""
            planes = zip(heads, self.planes, strict=True)
            return torch.cat([h.unflatten(1, (tokens, n, -1)) for h, n in planes], 2)

        found = []
        if chunks:
            found.append(self._unpack_chunks(joined(parts[::2], chunks)))
        if rest or not found:
            found.append(self._unpack_rows(joined(parts[1::2], rest)))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _pack_chunks(self, codes: torch.Tensor) -> torch.Tensor:
        """Packs whole chunks, to uint8 `[blocks, chunks, planes, 128]`."""
        tiles = codes.unflatten(1, (codes.shape[1] // CHUNK, CHUNK)).transpose(2, 3)
        shape = (*tiles.shape[:2], sum(self.planes), CHUNK_PLANE_BYTES)
        out = codes.new_empty(shape)
        for group in self.groups:
            chosen = tiles.index_select(2, group.tiles)
            packed = pack_chunks(chosen, group.width, of_keys=self.of_keys)
            out.index_copy_(
                2, group.places, packed.view(*shape[:2], len(group.places), CHUNK_PLANE_BYTES)
            )
        return out

    def _unpack_chunks(self, planes: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`_pack_chunks`."""
        blocks, chunks = planes.shape[:2]
        tiles = self.heads * self.head_dim // TILE
        out = planes.new_empty(blocks, chunks, tiles, CHUNK, TILE)
        for group in self.groups:
            packed = planes.index_select(2, group.places)
            packed = packed.reshape(
                blocks, chunks, len(group.tiles), group.width * CHUNK_PLANE_BYTES
            )
            codes = unpack_chunks(packed, group.width, of_keys=self.of_keys)
            out.index_copy_(2, group.tiles, codes)
        return out.transpose(2, 3).flatten(1, 2)

    def _pack_rows(self, codes: torch.Tensor) -> torch.Tensor:
        """Packs tokens one by one, to uint8 `[blocks, size, planes, 2]`."""
        rows = codes.new_empty(*codes.shape[:2], sum(self.planes), PLANE_BYTES)
        for group in self.groups:
            shifts = torch.arange(group.width, dtype=torch.uint8, device=codes.device)
            chosen = codes.index_select(2, group.tiles).unsqueeze(3)
            packed = bytes_of((chosen >> shifts[:, None]) & 1)
            rows.index_copy_(2, group.places, packed.flatten(2, 3))
        return rows

    def _unpack_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`_pack_rows`."""
        bits = torch.arange(8, dtype=torch.uint8, device=rows.device)
        tiles = self.heads * self.head_dim // TILE
        out = rows.new_empty(*rows.shape[:2], tiles, TILE)
        for group in self.groups:
            shape = (len(group.tiles), group.width)
            planes = rows.index_select(2, group.places).unflatten(2, shape).unsqueeze(-1)
            spread = ((planes >> bits) & 1).flatten(4)  # [blocks, size, tiles, width, 16]
            codes = spread[:, :, :, 0].clone()
            for plane in range(1, group.width):
                codes |= spread[:, :, :, plane] << plane
            out.index_copy_(2, group.tiles, codes)
        return out
