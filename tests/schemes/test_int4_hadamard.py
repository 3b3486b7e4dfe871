"""INT4 after a rotation: error against theory, outlier channels, bytes."""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import UserError
from kvquant.schemes.int4_hadamard import Int4HadamardCodec
from kvquant.schemes.kivi import decode_groups, encode_groups
from kvquant.study.schemes import Int4HadamardScheme
from tests.support.quantizers import assert_fake_is_packed, blocks, relative_error

CODEC = Int4HadamardCodec(Int4HadamardScheme(kind="int4-hadamard", block_size=32))


@pytest.mark.parametrize("dim", [16, 64, 96])
def test_packed_is_fake_bit_for_bit(dim: int) -> None:
    shape = (3, 2, 32, dim)
    assert_fake_is_packed(CODEC, blocks(0, shape), blocks(1, shape) * 5)


def test_error_is_that_of_uniform_rounding() -> None:
    """step**2 / 12, where the step is a fifteenth of the range of 64 rotated normal numbers."""
    x = blocks(2)
    rotated_range = 4.75  # expected range of 64 standard normal numbers, in standard deviations
    expected = (rotated_range / 15) ** 2 / 12
    assert relative_error(CODEC.fake(x, x)[0], x) == pytest.approx(expected, rel=0.1)


def test_the_rotation_spreads_outlier_channels() -> None:
    x = blocks(3).float()
    x[..., 5] *= 40
    x = x.half()
    plain = decode_groups(*encode_groups(x, -1, 4))
    inside = torch.arange(64) != 5
    turned = CODEC.fake(x, x)[0]
    worse = relative_error(plain[..., inside], x[..., inside])
    assert relative_error(turned[..., inside], x[..., inside]) < worse / 2


def test_bytes_and_refusal() -> None:
    packed = CODEC.pack(blocks(0), blocks(1))
    assert 8 * packed.nbytes == 2 * 3 * 2 * 32 * 64 * (4 + 32 / 64)
    with pytest.raises(UserError, match="head_dim"):
        CODEC.check_model(2, 72)
