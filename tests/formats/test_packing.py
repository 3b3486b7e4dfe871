"""Packing: round trip, layout, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.formats.packing import pack, packed_bytes, unpack
from kvquant.kernels.reference import pack_bits


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), eighths=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_pack_matches_the_loop_and_comes_back(bits: int, eighths: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, eighths * 8), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, eighths * bits)
    for row in range(3):
        assert packed[row].tolist() == pack_bits(codes[row].tolist(), bits)
    assert torch.equal(unpack(packed, bits), codes)


def test_leading_dimensions_are_kept() -> None:
    codes = torch.randint(0, 8, (2, 3, 4, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3), 3), codes)


@pytest.mark.parametrize(("count", "bits", "word"), [(12, 2, "count"), (16, 9, "bits")])
def test_bad_input_names_the_field(count: int, bits: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        packed_bytes(count, bits)
