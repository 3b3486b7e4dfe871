"""What Python tells the CUDA sources, and that both sides must agree on shared structs.

Also covers: kernels.cuda_structs.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvquant.kernels.cuda_build import KernelUnavailable, compile_cubin
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_header import constants_text, cuda_header, struct_check
from kvquant.kernels.cuda_pack import PackShape
from kvquant.kernels.cuda_structs import DecodeParams, PackSource, PackTarget, head_table_struct

DECODE = DecodeShape(2, 64, 1, 32, torch.float16, False)
PACK = PackShape(2, 64, 1, 32, torch.float16, True, 1)
SHARED_BYTES = 228 * 1024


def other_fields(
    struct: type[ctypes.Structure], fields: list[tuple[str, type]]
) -> type[ctypes.Structure]:
    """A struct of the same name with other fields."""
    return type(struct.__name__, (ctypes.Structure,), {"_fields_": fields})


def swapped(struct: type[ctypes.Structure], one: str, two: str) -> type[ctypes.Structure]:
    """The struct with two fields in each other's place."""
    names = [name for name, *_ in struct._fields_]
    fields = [(field[0], field[1]) for field in struct._fields_]
    i, k = names.index(one), names.index(two)
    fields[i], fields[k] = fields[k], fields[i]
    return other_fields(struct, fields)


def compile_with(struct: type[ctypes.Structure]) -> bytes:
    """Compiles the source that declares a struct of this name against Python's fields."""
    pytest.importorskip("cuda.bindings.nvrtc")
    if struct.__name__ in ("DecodeParams", "HeadTable"):
        known = {s.__name__: s for s in (DecodeParams, head_table_struct(2, 64))}
        structs = tuple((known | {struct.__name__: struct}).values())
        header = cuda_header(DECODE.constants(SHARED_BYTES), structs)
        return compile_cubin("decode.cu", header, "sm_80")
    known = {s.__name__: s for s in (PackSource, PackTarget)}
    structs = tuple((known | {struct.__name__: struct}).values())
    return compile_cubin("pack.cu", cuda_header(PACK.constants(), structs), "sm_80")


def test_constants_keep_their_types() -> None:
    assert constants_text({"BITS": 3, "BF16": False}) == (
        "constexpr int BITS = 3;\nconstexpr bool BF16 = false;\n"
    )


def test_a_check_names_every_field() -> None:
    text = struct_check(PackSource)
    assert text.startswith("template <typename S> struct PackSourceLayout {")
    for name, *_ in PackSource._fields_:
        assert f"sizeof(S::{name}) == 8" in text
    assert "sizeof(S) == 40" in text


@pytest.mark.parametrize("struct", [DecodeParams, head_table_struct(2, 64), PackSource, PackTarget])
def test_both_sides_agree(struct: type[ctypes.Structure]) -> None:
    assert len(compile_with(struct)) > 1000


@pytest.mark.parametrize(
    ("struct", "one", "two"),
    [
        (DecodeParams, "sink_keys", "sink_values"),
        (DecodeParams, "sink_capacity", "tail_capacity"),
        (head_table_struct(2, 64), "largest_key", "padding"),
        (PackSource, "head_stride", "token_stride"),
        (PackTarget, "begin", "count"),
    ],
)
def test_a_swapped_field_is_refused(struct: type[ctypes.Structure], one: str, two: str) -> None:
    with pytest.raises(KernelUnavailable, match=f"not as in Python's {struct.__name__}") as refused:
        compile_with(swapped(struct, one, two))
    assert one in str(refused.value) and two in str(refused.value)


def test_a_field_of_another_size_is_refused() -> None:
    fields = [(f[0], f[1]) for f in PackTarget._fields_[:-1]] + [("num_slots", ctypes.c_longlong)]
    with pytest.raises(KernelUnavailable, match="size of num_slots"):
        compile_with(other_fields(PackTarget, fields))


def test_a_missing_field_is_refused() -> None:
    fields = [(f[0], f[1]) for f in DecodeParams._fields_ if f[0] != "tail_values"]
    with pytest.raises(KernelUnavailable, match="not as in Python's DecodeParams"):
        compile_with(other_fields(DecodeParams, fields))
