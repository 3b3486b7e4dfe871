"""Draws docs/images/protocols.svg: `uv run python docs/images/protocols.py`.

Which stored form of a key and value each query reads, under both protocols, for a prompt in two
calls and one decode step. Blocks have four tokens here.
"""

from pathlib import Path

from kernels import BLUE, GREEN, GREY, LINES, note, save, title

WIDTH, HEIGHT = 1000, 500
CALLS = (range(0, 7), range(7, 11), range(11, 12))
SINKS, BLOCK, CELL = 1, 4, 30
LAST = CALLS[-1].stop
QUANTIZED, EXACT = "#bcd7ee", "#c9e9d9"  # deeper than boxes with text, as cells are small


def packed_until(stored: int) -> int:
    """Returns the first token behind the packed blocks of a sequence of `stored` tokens."""
    return SINKS + max(stored - SINKS, 0) // BLOCK * BLOCK


def is_quantized(protocol: str, query: int, key: int) -> bool:
    """Whether a query reads a key as its codes give it."""
    if key < SINKS:
        return False
    if protocol == "B":
        return True
    call = next(call for call in CALLS if query in call)
    return key < packed_until(call.start)


def grid(protocol: str, x: float, y: float) -> str:
    """The queries (rows) over the keys (columns) of one protocol."""
    parts = []
    for query in range(LAST):
        for key in range(LAST):
            left, top = x + key * CELL, y + query * CELL
            fill, line, text = GREY, "#ddd", ""
            if key <= query and is_quantized(protocol, query, key):
                fill, line, text = QUANTIZED, LINES[BLUE], "q"
            elif key <= query:
                fill, line, text = EXACT, LINES[GREEN], "16"
            parts.append(
                f'<rect x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}" '
                f'stroke="{line}"/>'
            )
            if text:
                parts.append(
                    f'<text x="{left + CELL / 2 - 1}" y="{top + 18}" font-size="11">{text}</text>'
                )
    for call in CALLS[1:]:
        top = y + call.start * CELL - 1
        parts.append(
            f'<path d="M{x - 74} {top} L{x + LAST * CELL} {top}" stroke="#D55E00" '
            'stroke-width="1.5" stroke-dasharray="5 3"/>'
        )
    for call, name in zip(CALLS, ("call 1:", "call 2:", "step:"), strict=True):
        middle = y + (call.start + len(call) / 2) * CELL
        parts.append(note(x - 74, middle, name))
        tokens = "a token" if len(call) == 1 else f"{len(call)} tokens"
        parts.append(note(x - 74, middle + 15, tokens))
    parts.append(note(x, y + LAST * CELL + 16, "keys and values, token after token \u2192"))
    return "".join(parts)


def picture() -> str:
    """Both protocols side by side."""
    return "".join([
        title(20, 30, "Protocol A: serving"),
        note(20, 50, "a call attends to itself in full precision and to the past from the cache"),
        grid("A", 98, 66),
        title(520, 30, "Protocol B: measuring"),
        note(520, 50, "every token but the first is read as its codes give it, its own included"),
        grid("B", 598, 66),
        note(20, 474, "Rows are queries. 16: 16 bits. q: from codes. Here a sequence keeps its "
             "first token in 16 bits, and blocks have 4 tokens (64 by default):"),
        note(20, 492, "under A, tokens 5 and 6 are the tail while call 2 runs, and a packed block "
             "(5 to 8) when the step comes. Tails are in 16 bits."),
    ])  # fmt: skip


if __name__ == "__main__":
    save(Path(__file__).with_name("protocols.svg"), WIDTH, HEIGHT, picture())
