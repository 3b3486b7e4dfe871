"""Where the bits of a tile's codes lie among the lanes of a warp that reads them.

A *chunk* is 64 tokens of a tile of 16 channels, 1024 codes. Codes of width `w` fill `w` words of 32
bits per lane, stored as `[w, 32 lanes]`, so that a warp reads a word of all its lanes as 128
contiguous bytes. A lane's 32 codes are the elements that it holds as operand of the tensor core's
product m16n8k16, whose rows are tokens for keys and channels for values (PTX manual, "Matrix
fragments for mma.m16n8k16"). No code has to move to another lane, then.

Lane `4 g + t` has 16 *items*, numbered `4 m + 2 h + s`, of two codes `e` each:

====== ==================== ===============
side   token                channel of tile
====== ==================== ===============
keys   16 m + 8 h + g       8 s + 2 t + e
values 16 m + 8 h + 2 t + e 8 s + g
====== ==================== ===============

Levels of keys' codes of 2 and 3 bits, and of values' codes of 2 to 4 bits, are looked up by byte
permutations, whose selectors are nibbles. The lower two bits of the codes (h, s, e) lie in nibble
`4 h + 2 s + e` of word `m / 2`, bits `2 (m % 2)` onwards, and third bits in word 2, bit `m` of the
nibble; codes of 4 bits fill the nibbles of word `m`. Codes of other widths become numbers by
arithmetic: an item's two codes lie at the same place of the lower and the upper half of a word,
see :func:`_item_place`.
"""

from __future__ import annotations

import functools

import torch

CHUNK = 64  # tokens
LANES = 32
ITEMS = 16  # per lane
# Widths whose levels are looked up; those of other widths are evenly spaced. Codebooks of 4 bits
# save values a fifth of their error, and keys, which have more widths to choose from, 2 %.
LOOKED_UP_KEYS, LOOKED_UP_VALUES = (2, 3), (2, 3, 4)
WORD_BYTES = 4


def looked_up(*, of_keys: bool) -> tuple[int, ...]:
    """Returns the widths whose levels are looked up."""
    return LOOKED_UP_KEYS if of_keys else LOOKED_UP_VALUES


def max_fitted(bits: float, *, of_keys: bool) -> int:
    """Returns the largest width whose levels are fitted one by one; others are evenly spaced.

    Where few heads have 4 bits, even levels cost values little, and the decode kernel reads them in
    less than half of the instructions.

    Args:
        bits: Mean bits per element.
        of_keys: Whether the codes are those of keys.
    """
    widths = looked_up(of_keys=of_keys)
    return max(widths) if of_keys or bits >= max(widths) else max(widths) - 1


def _item_place(width: int, item: int, bit: int) -> tuple[int, int]:
    """Returns word and bit in its halves of a code's bit, for widths that are not looked up.

    Items with s = 0 lie at bit 0 of a half, or are shifted there together with others, and items
    with s = 1 at bit `width`. Widths that do not divide 16 leave bits at the end of the halves,
    of which the last items are made.
    """
    j, s = divmod(item, 2)
    if width == 5:
        if s == 0:
            word, begin = (j, 0) if j < 5 else (j - 5, 10)
        elif j < 7:
            word, begin = (j, 5) if j < 5 else (j - 2, 10)
        else:
            return bit, 15
    elif width == 6:
        if item >= 12:
            q = item - 12
            return (
                ((0, 2, 3, 5)[q], 12 + bit) if bit < 4 else (1 + q // 2 * 3, 8 + 2 * (q % 2) + bit)
            )
        word, begin = item // 2, 6 * (item % 2)
    else:
        word, begin = divmod(item * width, 16)
    return word, begin + bit


def _place(width: int, item: int, e: int, bit: int, *, of_keys: bool) -> int:
    """Returns the place of a code's bit among the `32 * width` bits of a lane."""
    if width not in looked_up(of_keys=of_keys):
        word, at = _item_place(width, item, bit)
        return 32 * word + 16 * e + at
    m, nibble = item // 4, 2 * (item % 4) + e
    if width == 4:
        return 32 * m + 4 * nibble + bit
    if bit == 2:
        return 64 + 4 * nibble + m
    return 32 * (m // 2) + 4 * nibble + 2 * (m % 2) + bit


@functools.cache
def bit_sources(width: int, *, of_keys: bool) -> torch.Tensor:
    """Returns which bit of which code each bit of a chunk is.

    Args:
        width: Bits per code.
        of_keys: Whether the chunk holds keys; else values.

    Returns:
        int64 `[width * 1024]` in the order of memory, lowest bit of a byte first:
        `(16 * token + channel) * width + bit`.
    """
    out = torch.full((width, LANES, 32), -1)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for item in range(ITEMS):
            m, h, s = item // 4, item // 2 % 2, item % 2
            for e in range(2):
                token = 16 * m + 8 * h + (g if of_keys else 2 * t + e)
                channel = 8 * s + (2 * t + e if of_keys else g)
                for bit in range(width):
                    word, at = divmod(_place(width, item, e, bit, of_keys=of_keys), 32)
                    out[word, lane, at] = (16 * token + channel) * width + bit
    return out.view(-1)


@functools.cache
def _order(width: int, device: torch.device, *, of_keys: bool, back: bool) -> torch.Tensor:
    """Returns :func:`bit_sources` on a device, or what undoes it, made once per process."""
    sources = bit_sources(width, of_keys=of_keys)
    return (sources.argsort() if back else sources).to(device)


def bytes_of(bits: torch.Tensor) -> torch.Tensor:
    """Packs uint8 zeros and ones `[..., 8 n]` to bytes `[..., n]`, lowest bits first."""
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def pack_chunks(codes: torch.Tensor, width: int, *, of_keys: bool) -> torch.Tensor:
    """Packs the codes of whole chunks.

    Args:
        codes: uint8 `[..., 64, 16]`, tokens and channels of tiles.
        width: Bits per code.
        of_keys: Whether they are keys.

    Returns:
        uint8 `[..., width * 128]`.
    """
    shifts = torch.arange(width, dtype=torch.uint8, device=codes.device)
    bits = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-3)
    order = _order(width, codes.device, of_keys=of_keys, back=False)
    return bytes_of(bits.index_select(-1, order))


def unpack_chunks(packed: torch.Tensor, width: int, *, of_keys: bool) -> torch.Tensor:
    """Unpacks what :func:`pack_chunks` returns, to uint8 `[..., 64, 16]`."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    ordered = ((packed.unsqueeze(-1) >> bits) & 1).flatten(-2)
    places = _order(width, packed.device, of_keys=of_keys, back=True)
    spread = ordered.index_select(-1, places).unflatten(-1, (CHUNK, -1, width))
    codes = spread[..., 0].clone()
    for bit in range(1, width):
        codes |= spread[..., bit] << bit
    return codes
