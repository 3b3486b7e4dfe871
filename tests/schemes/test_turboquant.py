"""TurboQuant: the Lloyd-Max quantizer, the rotation's distortion, bytes, determinism."""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import UserError
from kvquant.quantization.lloyd_max import lloyd_max
from kvquant.schemes.turboquant import TurboQuantCodec
from kvquant.study.schemes import TurboQuantScheme
from tests.support.quantizers import assert_fake_is_packed, blocks, relative_error

# Mean squared error of the optimal quantizer of a standard normal variable (Max, IRE Transactions
# on Information Theory 6, 1960, table I).
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_those_of_the_table(bits: int) -> None:
    levels = torch.tensor(lloyd_max(bits), dtype=torch.float64)
    x = torch.distributions.Normal(0, 1).icdf((torch.arange(200_000).double() + 0.5) / 200_000)
    error = (x[:, None] - levels).square().amin(1).mean()
    assert float(error) == pytest.approx(DISTORTION[bits], rel=2e-3)
    assert torch.equal(levels, -levels.flip(0))


def codec(bits: int, **changed: int) -> TurboQuantCodec:
    return TurboQuantCodec(
        TurboQuantScheme(kind="turboquant", bits=bits, block_size=32, **changed), 0
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
def test_distortion_does_not_depend_on_the_data(bits: int, dim: int) -> None:
    """A rotated coordinate is near normal, so outlier channels cost what other data costs."""
    x = blocks(1, (8, 2, 32, dim)).float()
    x[..., 3] *= 30
    x[..., dim // 2] += 20
    x = x.half()
    shape = (8, 2, 32, dim)
    c = codec(bits)
    for found in c.unpack(c.pack(x, x), shape):
        assert relative_error(found, x) < 1.35 * DISTORTION[bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [16, 96])
def test_packed_is_fake_bit_for_bit(bits: int, dim: int) -> None:
    shape = (3, 2, 32, dim)
    assert_fake_is_packed(codec(bits), blocks(0, shape), blocks(1, shape) * 5)


def test_signs_follow_the_seed_and_the_layer() -> None:
    x = blocks(4)
    spec = TurboQuantScheme(kind="turboquant", bits=2)
    one, same, layer = (TurboQuantCodec(spec, n).fake(x, x)[0] for n in (0, 0, 1))
    other = codec(2, seed=1).fake(x, x)[0]
    assert torch.equal(one, same)
    assert not torch.equal(one, layer)
    assert not torch.equal(one, other)


def test_zeros_and_bytes() -> None:
    c = codec(3)
    packed = c.pack(torch.zeros(3, 2, 32, 64).half(), blocks(5))
    keys, _ = c.unpack(packed, (3, 2, 32, 64))
    assert not keys.any()
    assert 8 * packed.nbytes == 2 * 3 * 2 * 32 * 64 * (3 + 16 / 64)
    assert c.shared_bytes == 2 * 64 * 4 + 8 * 4


def test_a_head_without_a_rotation_is_refused() -> None:
    with pytest.raises(UserError, match="head_dim: no Hadamard rotation of 72"):
        codec(3).check_model(4, 72)
