"""Draws docs/images/allocated.svg: `uv run python docs/images/allocated.py`.

The upper row shows how calibration leads to widths, the lower part how codes of mixed width lie in
a row.
"""

from pathlib import Path

from kernels import BLUE, GREEN, GREY, ORANGE, arrow, box, note, save, title

WIDTH, HEIGHT = 1000, 520


def deciding() -> str:
    """From gradients to widths."""
    y, h = 50, 78
    parts = [
        title(20, 30, "Deciding: once per model"),
        box(20, y, 215, h, GREY, "calibration", "keys, rotated values and their",
            "gradients, as histograms"),
        box(265, y, 215, h, GREY, "error of each part", "sum of gradient\u00b2 \u00d7 error\u00b2",
            "at widths of 1 to 6 bits"),
        box(510, y, 215, h, ORANGE, "one budget", "bits go where a bit saves most:",
            "all tiles, heads and layers"),
        box(755, y, 225, h, GREY, "quantizer file", "order of pairs, widths,",
            "a codebook per width"),
    ]  # fmt: skip
    parts += [arrow(x, y + h / 2, x + 27, y + h / 2) for x in (235, 480, 725)]
    parts.append(
        '<path d="M617 128 L617 158 L372 158 L372 132" stroke="#555" fill="none" '
        'marker-end="url(#a)"/>'
    )
    parts.append(note(495, 152, "codebooks are fitted again", "middle"))
    return "".join(parts)


def keys() -> str:
    """Sorted pairs, tiles and the row of a token."""
    y = 222
    parts = [
        title(20, y - 14, "Keys: RoPE pairs of a head sorted by error, eight pairs a tile"),
        box(20, y, 180, 56, BLUE, "tile 0: 5 bits", "pairs 3, 17, 9, 30, \u2026"),
        box(210, y, 180, 56, BLUE, "tile 1: 3 bits", "pairs 12, 4, 21, 0, \u2026"),
        box(400, y, 180, 56, BLUE, "tile 2: 3 bits", "pairs 7, 25, 1, 14, \u2026"),
        box(590, y, 180, 56, BLUE, "tile 3: 1 bit", "pairs 28, 6, 19, 11, \u2026"),
        box(790, y, 190, 56, ORANGE, "outliers", "0.25 % exactly, blocked CSC"),
    ]
    top = y + 92
    parts.append(note(20, top - 10, "64 tokens, head_dim 64: 128 bytes per bit of a tile's width"))
    x = 20.0
    for tile, width in enumerate((5, 3, 3, 1)):
        for plane in range(width):
            parts.append(box(x, top, 56, 30, BLUE if tile % 2 == 0 else GREY, f"{tile}.{plane}"))
            x += 58
        x += 8
    parts.append(note(20, top + 48, "tile.word: a word of each lane of a warp, whose 32 codes are "
                      "what the lane multiplies"))  # fmt: skip
    return "".join(parts)


def values() -> str:
    """Rotation, scale and width of a head."""
    y, h = 420, 70
    parts = [
        title(20, y - 14, "Values: no outliers"),
        box(20, y, 290, h, GREEN, "rotated within the head",
            "M W_V and W_O M\u1d40 in the weights,", "or while packing"),
        box(345, y, 290, h, GREEN, "normalized by the token's range",
            "heads scaled alike; zero and scale"),
        box(670, y, 310, h, GREEN, "one width per head and layer",
            "chunks of 64 tokens, as for keys"),
    ]  # fmt: skip
    parts += [arrow(x, y + h / 2, x + 32, y + h / 2) for x in (310, 635)]
    return "".join(parts)


if __name__ == "__main__":
    picture = Path(__file__).with_name("allocated.svg")
    save(picture, WIDTH, HEIGHT, deciding() + keys() + values())
