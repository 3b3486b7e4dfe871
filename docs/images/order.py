"""Draws docs/images/order.svg: `uv run python docs/images/order.py`.

The steps between a projection and the cache, and those between the cache and attention, for NUQ.
"""

from pathlib import Path

from kernels import BLUE, GREEN, GREY, ORANGE, arrow, box, note, save, title

WIDTH, HEIGHT = 1000, 560
W, H = 176, 70
LEFTS = [20 + i * 196 for i in range(5)]


def lane(y: float, *steps: tuple[str, ...]) -> str:
    """Five boxes in a row, joined by arrows; the first word of a step is its colour."""
    fills = {"grey": GREY, "blue": BLUE, "green": GREEN, "orange": ORANGE}
    parts = []
    for left, (fill, *texts) in zip(LEFTS, steps, strict=True):
        parts.append(box(left, y, W, H, fills[fill], *texts))
        if left != LEFTS[0]:
            parts.append(arrow(left - 20, y + H / 2, left - 3, y + H / 2))
    return "".join(parts)


def storing() -> str:
    """What happens to keys and values on their way into the cache."""
    return "".join([
        title(20, 30, "Storing"),
        note(100, 30, "padding is left out first; the first token of a sequence stays in 16 bits"),
        note(20, 62, "keys: per channel, with what calibration found"),
        lane(
            72,
            ("grey", "keys", "of the projection,", "before RoPE"),
            ("blue", "1. normalize", "static zero and scale", "of each channel"),
            ("orange", "2. set outliers aside", "outside the static range:",
             "exact value, position"),
            ("blue", "3. nearest level", "of the layer's codebook", "for keys"),
            ("blue", "4. pack codes", "when 64 tokens", "fill a block"),
        ),
        note(20, 182, "values: per token, when the token comes"),
        lane(
            192,
            ("grey", "values", "of the projection"),
            ("orange", "1. set outliers aside", "largest and smallest 0.5 %,", "by rank"),
            ("green", "2. normalize", "zero and scale of the", "token's other values"),
            ("green", "3. nearest level", "of the layer's codebook", "for values"),
            ("green", "4. pack codes", "when 64 tokens", "fill a block"),
        ),
    ])  # fmt: skip


def reading() -> str:
    """What happens on the way from the cache to attention."""
    return "".join([
        title(20, 312, "Reading"),
        note(100, 312, "the same steps backwards; no layer is ever unpacked as a whole"),
        lane(
            328,
            ("grey", "codes", "of a range of the past"),
            ("blue", "1. look up levels", "of the codebook"),
            ("blue", "2. level \u00b7 scale + zero", "per channel (keys),", "per token (values)"),
            ("orange", "3. put outliers back", "exact values in place", "of what codes stand for"),
            ("blue", "4. rotate keys", "RoPE, by the position", "of each token"),
        ),
        title(20, 446, "Why this order"),
        note(20, 470, "Before RoPE a channel of keys keeps its range over all positions, so "
             "calibration can fix it; after RoPE pairs of channels mix."),
        note(20, 490, "Outliers leave before codes are made, so that levels cover the range of the "
             "other 99 %; they return before RoPE, which mixes them with their partner."),
        note(20, 510, "Ranks, not thresholds, choose outliers of values: ties never make more of "
             "them than there is room for."),
        note(20, 530, "Packing and unpacking gives bit for bit what quantizing and dequantizing in "
             "one step gives (the tests compare both)."),
    ])  # fmt: skip


if __name__ == "__main__":
    picture = Path(__file__).with_name("order.svg")
    save(picture, WIDTH, HEIGHT, storing() + reading())
