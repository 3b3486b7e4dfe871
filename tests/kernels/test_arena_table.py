"""Block numbers and the arena table: one encoding for Python, CUDA and Triton."""

from __future__ import annotations

import pytest
import torch

from kvquant.cache.arena import DENSE, SPARSE, Arena
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels.arena_table import (
    ARENA_FIELDS,
    DENSE_FIELDS,
    MAX_ARENAS,
    MAX_PLACES,
    OUTLIER_FIELDS,
    PLACE_BITS,
    block_number,
    block_numbers,
    cuda_constants,
)
from kvquant.quantization.nuq import fit
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import NuqScheme


def test_a_block_number_holds_arena_and_place() -> None:
    for arena in (0, 1, MAX_ARENAS - 1):
        for place in (0, 1, MAX_PLACES - 1):
            number = block_number(arena, place)
            assert (number >> PLACE_BITS, number & (MAX_PLACES - 1)) == (arena, place)
            assert 0 <= number < 1 << 31


@pytest.mark.parametrize(("arena", "place"), [(MAX_ARENAS, 0), (0, MAX_PLACES), (-1, 0), (0, -1)])
def test_what_does_not_fit_is_refused(arena: int, place: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        block_number(arena, place)


def test_block_numbers_of_ragged_sequences() -> None:
    sequences = [[(0, 5), (2, 0)], [(1, 7)], []]
    numbers = block_numbers(sequences, [2, 1, 0])
    assert numbers.dtype is torch.int32
    assert numbers.tolist() == [
        [block_number(0, 5), block_number(2, 0)],
        [block_number(1, 7), 0],
        [0, 0],
    ]


def test_an_arena_lists_its_addresses_in_the_order_of_the_fields() -> None:
    heads, dim, size = 2, 64, 32
    tables = LayerQuantizer(
        torch.zeros(heads, dim), torch.full((heads, dim), 2.5), fit("nf", 3), fit("nf", 3)
    )
    codec = NuqCodec(NuqScheme(kind="nuq", bits=3, outliers=0.02, block_size=size), tables)
    x = torch.randn(3, heads, size, dim).half()
    arena = Arena(3, codec.pack(x, x))
    expected = {
        field: arena.dense[name].data_ptr() for field, name in zip(DENSE_FIELDS, DENSE, strict=True)
    }
    for side, name in zip(("key", "value"), SPARSE, strict=True):
        slab = arena.sparse[name].view(slice(0, 3))
        arrays = (slab.begin, slab.count, slab.positions, slab.values)
        for field, array in zip(OUTLIER_FIELDS, arrays, strict=True):
            expected[f"{side}_{field}"] = array.data_ptr()
    assert dict(zip(ARENA_FIELDS, arena.addresses, strict=True)) == expected


def test_cuda_reads_the_same_constants() -> None:
    text = cuda_constants()
    assert f"PLACE_BITS = {PLACE_BITS};" in text
    assert "KEY_CODES, VALUE_CODES, VALUE_ZEROS, VALUE_SCALES, KEY_BEGIN, KEY_COUNT" in text
