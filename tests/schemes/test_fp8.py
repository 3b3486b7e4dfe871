"""FP8: E4M3's relative error, saturation, bytes."""

from __future__ import annotations

import pytest
import torch

from kvquant.schemes.fp8 import Fp8Codec, decode, encode, token_scale
from kvquant.study.schemes import Fp8Scheme
from tests.support.quantizers import assert_fake_is_packed, blocks, relative_error


@pytest.mark.parametrize("scale", ["token-head", "none"])
def test_packed_is_fake_bit_for_bit(scale: str) -> None:
    codec = Fp8Codec(Fp8Scheme(kind="fp8", scale=scale, block_size=32))
    assert_fake_is_packed(codec, blocks(0), blocks(1) * 5)


def test_error_is_at_most_half_a_step() -> None:
    """3 bits of mantissa: at most 2**-4 of the number, and a 16-bit scale's 2**-11."""
    x = blocks(2) * 3
    scale = token_scale(x)
    found = decode(encode(x, scale), scale)
    normal = x.float().abs() > 0.02 * x.float().abs().amax()  # beyond E4M3's subnormal numbers
    assert float(((found - x.float()).abs() / x.float().abs())[normal].max()) <= 2**-4 + 2**-10
    assert relative_error(found, x) < 1e-3  # 2**-8 / 3 and less


def test_numbers_beyond_the_range_saturate() -> None:
    x = torch.tensor([448.0, 500.0, -6e4, 0.0]).half()
    assert decode(encode(x, None), None).tolist() == [448.0, 448.0, -448.0, 0.0]


def test_zeros_stay_zeros_and_bytes_are_8_bits_and_the_scale() -> None:
    codec = Fp8Codec(Fp8Scheme(kind="fp8", block_size=32))
    x = torch.zeros(3, 2, 32, 64).half()
    packed = codec.pack(x, blocks(3))
    keys, _ = codec.unpack(packed, (3, 2, 32, 64))
    assert not keys.any()
    assert 8 * packed.nbytes == 2 * x.numel() * (8 + 16 / 64)
