"""Draws docs/images/kernels.svg: `uv run python docs/images/kernels.py`.

The upper half shows how a packed block lies in an arena, the lower half the phases of packing and
of decode attention.
"""

from pathlib import Path

WIDTH, HEIGHT = 1000, 700
BLUE, ORANGE, GREEN, GREY = "#eef4fa", "#fdf1e3", "#e9f5ee", "#f4f4f4"
LINES = {BLUE: "#0072B2", ORANGE: "#D55E00", GREEN: "#009E73", GREY: "#777"}


def box(x: float, y: float, w: float, h: float, fill: str, *texts: str, small: bool = True) -> str:
    """A rectangle with centred lines of text, of which the first is bold."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" '
        f'stroke="{LINES[fill]}"/>'
    ]
    step, size = (17, 12) if small else (19, 13)
    top = y + h / 2 - (len(texts) - 1) * step / 2 + 4
    for i, text in enumerate(texts):
        bold = ' font-weight="bold"' if i == 0 else ' fill="#333"'
        parts.append(
            f'<text x="{x + w / 2}" y="{top + i * step}" font-size="{size}"{bold}>{text}</text>'
        )
    return "".join(parts)


def title(x: float, y: float, text: str) -> str:
    """A heading."""
    return f'<text x="{x}" y="{y}" text-anchor="start" font-weight="bold">{text}</text>'


def note(x: float, y: float, text: str, anchor: str = "start") -> str:
    """A line of small text."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="#333">{text}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="#555" fill="none" marker-end="url(#a)"/>'


def layout() -> str:
    """An arena's tensors, and the bytes of one row of codes."""
    x, y = 20, 60
    parts = [
        title(x, 30, "A packed block: 64 tokens, at one place of an arena"),
        note(x, 48, "block number: arena in the upper bits, place in the lower 20 of an int32"),
        box(x, y, 225, 62, BLUE, "codes of keys", "[place, kv head, token, row]", "uint8"),
        box(x + 245, y, 225, 62, GREEN, "codes of values", "[place, kv head, token, row]", "uint8"),
        box(x + 490, y, 225, 62, GREEN, "zeros, scales of values", "[place, token]", "16 bits"),
        box(x + 735, y, 225, 62, ORANGE, "outlier lists", "[place, kv head]: begin, count",
            "of keys and of values"),
    ]  # fmt: skip
    top = y + 108
    parts += [
        note(x, top - 12, "a row of 3-bit codes, head_dim 128: 48 bytes"),
        box(x, top, 300, 34, BLUE, "lower two bits: 32 bytes", small=True),
        box(x + 300, top, 170, 34, BLUE, "third bits: 16 bytes"),
        note(x, top + 52, "byte i of the first plane: channels i, i + 32, i + 64, i + 96"),
        note(x, top + 68, "byte i of the second plane: channels i, i + 16, ... i + 112"),
        note(x + 490, top - 12, "slots of an arena's outliers, shared by its blocks"),
        box(x + 490, top, 470, 34, ORANGE, "position: token * head_dim + channel; 16-bit value"),
        note(x + 490, top + 52, "a kernel takes slots from a cursor on the device: a block's list"),
        note(x + 490, top + 68, "is contiguous, the lists of different blocks lie in any order"),
        arrow(x + 112, y + 62, x + 112, top - 26),
        arrow(x + 847, y + 62, x + 847, top - 26),
    ]  # fmt: skip
    return "".join(parts)


def packing() -> str:
    """The three kernels of pack.cu."""
    x, y, w, h = 20, 320, 305, 62
    parts = [
        title(x, y - 14, "Packing (pack.cu): 16-bit keys and values are read once"),
        box(x, y, w, h, BLUE, "pack_keys", "thread block: one (block, kv head)",
            "static thresholds; outliers to the list"),
        box(x + w + 22, y, w, h, GREEN, "pack_values", "thread block: 1 to 4 tokens, all kv heads",
            "rank outliers, range, thresholds, codes"),
        box(x + 2 * (w + 22), y, w, h, ORANGE, "group_values", "thread block: one block",
            "sorts the tokens' outliers by kv head"),
        arrow(x + 2 * w + 22, y + h / 2, x + 2 * w + 42, y + h / 2),
    ]  # fmt: skip
    return "".join(parts)


def decoding() -> str:
    """Split-KV and the phases of decode.cu."""
    x, y = 20, 440
    parts = [
        title(x, y, "Decode attention (decode.cu): one query per sequence, split-KV"),
        note(x, y + 18, "the tokens of one sequence and kv head"),
    ]
    top, w = y + 26, 196
    for i, (text, fill) in enumerate(
        (("split 0", BLUE), ("split 1", BLUE), ("...", GREY), ("split n - 2", BLUE),
         ("split n - 1: sinks and tail", GREEN))
    ):  # fmt: skip
        parts.append(box(x + i * (w - 4), top, w - 8, 30, fill, text))
    parts.append(
        note(x, top + 48, "a split is one thread block: up to 64 KV chunks of 64 tokens, dealt out "
             "to 8 warps (4 where the group is wide)")
    )  # fmt: skip
    top += 62
    phases = (
        ("0 prepare", "cp.async: tables,", "queries, lists", GREY),
        ("1 key outliers", "exact - level, rotated", "integers per token", ORANGE),
        ("2 scores", "look up, rotate,", "mma.m16n8k16", BLUE),
        ("3 softmax", "final weights: all", "scores are there", GREY),
        ("4 value outliers", "exact - level, weighted", "integers per channel", ORANGE),
        ("5 output", "look up, mix tokens,", "mma.m16n8k16", GREEN),
    )
    w, gap = 145, 18
    for i, (name, first, second, fill) in enumerate(phases):
        left = x + i * (w + gap)
        parts.append(box(left, top, w, 66, fill, name, first, second))
        if i:
            parts.append(arrow(left - gap, top + 33, left - 3, top + 33))
    top += 100
    parts += [
        box(
            x + 630,
            top,
            330,
            50,
            GREY,
            "state of each split",
            "maximum, sum, fp32 output per query",
        ),
        box(x + 190, top, 330, 50, GREEN, "combine", "splits weighted by their maxima, 16 bits"),
        arrow(x + 888, top - 34, x + 888, top - 4),
        arrow(x + 630, top + 25, x + 524, top + 25),
    ]
    return "".join(parts)


def save(file: Path, width: int, height: int, body: str) -> None:
    """Writes a picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">'
        '<rect width="100%" height="100%" fill="white"/>'
        '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 Z" fill="#555"/></marker></defs>'
    )
    file.write_text(head + body + "</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    picture = Path(__file__).with_name("kernels.svg")
    save(picture, WIDTH, HEIGHT, layout() + packing() + decoding())
