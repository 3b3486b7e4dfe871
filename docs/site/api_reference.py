"""The reference of the Python API: every public name of the package, by mkdocstrings."""

from __future__ import annotations

import kvquant

HEAD = """# Python API, name by name

Every public name of `kvquant`, from its docstring. [The Python API](library.md) explains how
they are used together.
"""
# What a user calls comes first; all other names are the parts of which these are made.
FIRST = (
    "calibrate",
    "load",
    "generate",
    "unwrap",
    "scheme_presets",
    "QuantizedModel",
    "Quantizer",
    "load_quantizer",
    "UserError",
)


def _entry(name: str) -> list[str]:
    """Returns the lines that mkdocstrings replaces by the documentation of a name."""
    place = f"kvquant.{kvquant._MODULES[name]}.{name}"
    heading = [f"      heading: kvquant.{name}", f"      toc_label: {name}"]
    return [f"::: {place}", "    options:", *heading, ""]


def page() -> str:
    """Returns the page."""
    others = [name for name in kvquant.__all__ if name not in (*FIRST, "load_quantized_model")]
    lines = [HEAD, "`load_quantized_model` is another name of `load`.", ""]
    for name in FIRST:
        lines += _entry(name)
    lines += ["## The parts", "", "For those who build on them.", ""]
    for name in others:
        lines += _entry(name)
    return "\n".join(lines)
