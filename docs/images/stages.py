"""Draws docs/images/stages.svg: `uv run python docs/images/stages.py`."""

from pathlib import Path

STAGES = [
    ("fetch", "model, texts"),
    ("calibrate", "ranges, Fisher"),
    ("quantize", "codebooks"),
    ("evaluate", "task x seed x scheme"),
    ("throughput, energy", "with the baseline"),
    ("kernels, append, jobs", "random weights and data"),
    ("aggregate", "verified tables"),
    ("statistics", "paired tests, Pareto"),
    ("paper", "figures, tables, claims"),
]
W, H, GAP, PER_ROW = 190, 56, 30, 5


def main() -> None:
    """Writes the picture."""
    parts = []
    for i, (name, what) in enumerate(STAGES):
        row, column = divmod(i, PER_ROW)
        x, y = 10 + column * (W + GAP), 10 + row * (H + 34)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{W}" height="{H}" rx="6" fill="#eef4fa" '
            f'stroke="#0072B2"/><text x="{x + W / 2}" y="{y + 24}" font-weight="bold">{name}</text>'
            f'<text x="{x + W / 2}" y="{y + 43}" fill="#444">{what}</text>'
        )
        if i + 1 < len(STAGES):
            if column + 1 < PER_ROW:
                line = (x + W, y + H / 2, x + W + GAP - 4, y + H / 2)
            else:
                line = (x + W / 2, y + H, x + W / 2, y + H + 14)
            x1, y1, x2, y2 = line
            end = "" if column + 1 == PER_ROW else ' marker-end="url(#a)"'
            parts.append(f'<path d="M{x1} {y1} L{x2} {y2}" stroke="#555"{end}/>')
            if column + 1 == PER_ROW:
                left = 10 + W / 2
                parts.append(
                    f'<path d="M{x2} {y2} L{left} {y2} L{left} {y + H + 30}" fill="none" '
                    'stroke="#555" marker-end="url(#a)"/>'
                )
    width = 20 + PER_ROW * (W + GAP) - GAP
    height = 20 + 2 * H + 34
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">'
        '<rect width="100%" height="100%" fill="white"/>'
        '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 Z" fill="#555"/></marker></defs>'
    )
    Path(__file__).with_name("stages.svg").write_text(head + "".join(parts) + "</svg>\n")


if __name__ == "__main__":
    main()
