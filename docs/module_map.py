"""Writes docs/module-map.md from the docstrings of the package's modules.

The first line of a module's docstring says what the module is about, so that the map cannot go
stale: `python docs/module_map.py` writes the page, and a test holds the page to the code.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/module-map.md"
# The folders from the top down. A module imports only from its own folder and from lower levels;
# tests/test_layers.py checks that.
LEVELS = (
    ("playground",),
    ("diagnosis",),
    ("evaluation", "benchmarks"),
    ("calibration",),
    ("models",),
    ("schemes",),
    ("cache",),
    ("quantization", "analysis"),
    ("kernels", "fetch"),
    ("study", "runtime"),
    ("energy",),
    ("formats",),
)
HEAD = """\
# Module map

<!-- Written by `python docs/module_map.py` from the docstrings: edit them there. -->

What is where. The folders of `kvquant/` are layers, listed here from the top down: a module imports
only from its own folder and from folders below it. Folders of one level do not import one another,
and `errors.py` is below all: `tests/test_layers.py` has the levels and checks them. Tests mirror
the folders. Terms are explained in the [glossary](glossary.md).

## Names of the paper

| name in the paper | file |
|---|---|
| `batched_quant`, `BatchedKVQuantizer` | `quantization/batched_quant.py` |
| `blocked_sparse`, `BlockedCSCMatrix`, `BlockedCSRMatrix` | `formats/blocked_sparse.py` |
| `prefill_quant`, `PrefillQuantizedAttention` | `models/prefill_quant.py` |
| `nuq` | `quantization/nuq.py` (codebooks), `schemes/nuq.py` (the scheme) |
| `pytorch_fused` | `kernels/pytorch_fused.py`; its specification is `kernels/reference.py` |
| `triton_kernels` | `kernels/triton_pack.py`, `triton_attention.py`; CUDA: `kernels/cuda/` |
| `energy_monitor`, `EnergyMonitor` | `energy/monitor.py` |
| `energy_profiler`, `DetailedEnergyProfiler` | `energy/profiler.py` |

## The front door

| file | what it is |
|---|---|
"""


def first_line(file: Path) -> str:
    """The first line of a module's docstring, without its period."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].removesuffix(".").replace("|", "\\|")


def rows(files: list[Path], root: Path) -> list[str]:
    """One row of the table per file."""
    return [f"| `{file.relative_to(root)}` | {first_line(file)} |" for file in files]


def page() -> str:
    """The whole page."""
    package = ROOT / "kvquant"
    loose = [package / name for name in ("__init__.py", "cli.py", "__main__.py", "errors.py")]
    lines = rows(loose, package)
    for room in (name for level in LEVELS for name in level):
        folder = package / room
        files = [f for f in sorted(folder.rglob("*.py")) if f.name != "__init__.py"]
        lines += ["", f"## {room}", "", f"{first_line(folder / '__init__.py')}.", ""]
        lines += ["| file | what it is |", "|---|---|", *rows(files, folder)]
        if room == "kernels":
            lines.append(
                "| `cuda/` | The CUDA sources, compiled at run time: [kernels.md](kernels.md) |"
            )
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
