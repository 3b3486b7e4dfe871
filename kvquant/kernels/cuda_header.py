"""What Python tells the CUDA sources: the text of the header `generated.cuh`.

The header has the constants of a shape as `constexpr` variables, the encodings of
:mod:`kvquant.kernels.arena_table`, and for each struct that Python and CUDA share a check of its
fields. A source that declares such a struct in another way does not compile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import pairwise

from kvquant.kernels.arena_table import cuda_constants

HEADER_NAME = "generated.cuh"


def constants_text(constants: Mapping[str, int | bool]) -> str:
    """Returns C++ definitions of the constants of a shape."""
    lines = [
        f"constexpr bool {name} = {str(value).lower()};\n"
        if isinstance(value, bool)
        else f"constexpr int {name} = {value};\n"
        for name, value in constants.items()
    ]
    return "".join(lines)


def struct_check(struct: type[ctypes.Structure]) -> str:
    """Returns a C++ template that refuses a struct whose fields are not those that Python fills.

    It compares the order of the fields, the size of each and the size of the whole, which leave no
    other place for a field. The source instantiates it behind its definition of the struct:
    `template struct DecodeParamsLayout<DecodeParams>;`.

    Args:
        struct: The Python side. Its name and its field names are those of the C++ struct.
    """
    name, fields = struct.__name__, [field for field, *_ in struct._fields_]
    told = f'"{{}}: not as in Python\'s {name}");\n'.format
    lines = [f"template <typename S> struct {name}Layout {{\n  static constexpr S s{{}};\n"]
    for field in fields:
        size = getattr(struct, field).size
        lines.append(f"  static_assert(sizeof(S::{field}) == {size}, {told(f'size of {field}')}")
    for one, next_one in pairwise(fields):
        before = f"(const void*)&s.{one} < (const void*)&s.{next_one}"
        lines.append(f"  static_assert({before}, {told(f'order of {one} and {next_one}')}")
    lines.append(f"  static_assert(sizeof(S) == {ctypes.sizeof(struct)}, {told('size')}}};\n")
    return "".join(lines)


def cuda_header(
    constants: Mapping[str, int | bool], structs: Sequence[type[ctypes.Structure]]
) -> str:
    """Returns the text of `generated.cuh` for a shape.

    Args:
        constants: Names and values of the shape's constants.
        structs: Structs that the source shares with Python.
    """
    checks = "".join(map(struct_check, structs))
    return f"#pragma once\n{constants_text(constants)}{cuda_constants()}{checks}"
