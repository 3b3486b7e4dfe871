"""Draws docs/images/blocks.svg: `uv run python docs/images/blocks.py`.

From the top down: sequences in the cache, the arena that holds their blocks, and one block with its
codes and its outliers.
"""

from pathlib import Path

from kernels import BLUE, GREEN, GREY, ORANGE, arrow, box, note, save, title

WIDTH, HEIGHT = 1000, 690
OUTLIERS = ((1, 2), (4, 0), (6, 5))  # (token, channel) in the small block of the picture
TOKENS, CHANNELS = 8, 6


def sequences() -> str:
    """Two sequences of different lengths."""
    y = 58
    parts = [
        title(20, 30, "Two sequences of a batch: first token, blocks of 64 tokens, tail"),
        note(20, y + 24, "A, 230 tokens"),
        box(140, y, 74, 36, GREEN, "first"),
        *(box(220 + i * 134, y, 128, 36, BLUE, f"block {number}", small=True)
          for i, number in enumerate((0, 2, 3))),
        box(622, y, 96, 36, GREEN, "tail: 37"),
        note(20, y + 76, "B, 100 tokens"),
        box(140, y + 52, 74, 36, GREEN, "first"),
        box(220, y + 52, 128, 36, BLUE, "block 1"),
        box(354, y + 52, 92, 36, GREEN, "tail: 35"),
        note(740, y + 16, "green: 16 bits, blue: packed"),
        note(740, y + 34, "a tail of 64 tokens becomes a block;"),
        note(740, y + 52, "padding is never stored"),
    ]  # fmt: skip
    return "".join(parts)


def arena() -> str:
    """The places of an arena and the tables that name them."""
    y = 212
    parts = [
        title(20, y, "An arena of one layer: blocks stay where they were written"),
        box(20, y + 18, 180, 34, GREY, "table of A: 0, 2, 3"),
        box(20, y + 58, 180, 34, GREY, "table of B: 1"),
        arrow(200, y + 35, 232, y + 50),
        arrow(200, y + 75, 232, y + 60),
    ]
    x = 236
    for place in range(6):
        owner = ("A", "B", "A", "A")[place] if place < 4 else "free"
        fill = BLUE if place < 4 else GREY
        parts.append(box(x + place * 122, y + 30, 118, 50, fill, f"place {place}", owner))
    parts += [
        note(236, y + 102, "an append writes behind the last block: nothing moves, nothing is "
             "allocated anew, the host does not wait"),
        note(236, y + 120, "beams and copies of a prompt share blocks: they copy the table"),
    ]  # fmt: skip
    return "".join(parts)


def matrix(x: float, y: float) -> str:
    """The elements of one kv head of a block, outliers marked."""
    cell = 22
    parts = []
    for token in range(TOKENS):
        for channel in range(CHANNELS):
            out = (token, channel) in OUTLIERS
            fill, line = ("#D55E00", "#D55E00") if out else ("#eef4fa", "#0072B2")
            parts.append(
                f'<rect x="{x + token * cell}" y="{y + channel * cell}" width="{cell - 2}" '
                f'height="{cell - 2}" fill="{fill}" stroke="{line}"/>'
            )
    parts += [
        note(x, y + CHANNELS * cell + 16, "tokens \u2192 (a column each)"),
        f'<text transform="translate({x - 10} {y + 118}) rotate(-90)" text-anchor="start" '
        'font-size="12" fill="#333">channels \u2192</text>',
    ]
    return "".join(parts)


def block() -> str:
    """Dense codes and the list of outliers."""
    y = 390
    entries = [f"{token} \u00b7 D + {channel}" for token, channel in OUTLIERS]
    parts = [
        title(20, y, "One block, keys of one kv head: a code for every element, outliers beside"),
        matrix(44, y + 24),
        arrow(232, y + 70, 276, y + 52),
        arrow(232, y + 110, 276, y + 150),
        box(280, y + 24, 330, 56, BLUE, "codes, dense", "2 to 4 bits per element, a row per token"),
        note(630, y + 44, "an outlier has a code too; readers"),
        note(630, y + 62, "replace what it stands for"),
        box(280, y + 112, 150, 30, ORANGE, "position"),
        *(box(434 + i * 108, y + 112, 104, 30, ORANGE, entry) for i, entry in enumerate(entries)),
        box(280, y + 146, 150, 30, ORANGE, "value"),
        *(box(434 + i * 108, y + 146, 104, 30, ORANGE, "16 bits, exact") for i in range(3)),
        note(776, y + 132, "position: token \u00b7 D + channel,"),
        note(776, y + 150, "D = head_dim, in 16 bits"),
        box(280, y + 192, 474, 30, GREY, "begin and count of the list, per (block, kv head)"),
        note(20, y + 256, "Keys are a channel \u00d7 token matrix whose columns are tokens (CSC); "
             "values a token \u00d7 channel matrix whose rows are tokens (CSR)."),
        note(20, y + 276, "In memory both are the same lists, token after token. Pointers inside a "
             "block are not stored: positions imply them."),
    ]  # fmt: skip
    return "".join(parts)


if __name__ == "__main__":
    picture = Path(__file__).with_name("blocks.svg")
    save(picture, WIDTH, HEIGHT, sequences() + arena() + block())
