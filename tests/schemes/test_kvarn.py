"""KVarN: balance against a naive reference, tiles by themselves, error of a token, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvquant.errors import UserError
from kvquant.schemes.kvarn import CHANNELS, TOKENS, KvarnCodec, balance, decode, deviation, encode
from kvquant.study.schemes import KvarnScheme
from tests.support.quantizers import blocks, relative_error


def codec(bits: int, **changed: Any) -> KvarnCodec:
    return KvarnCodec(KvarnScheme(kind="kvarn", bits=bits, **{"tile": 32, **changed}))


def uneven(shape: tuple[int, int, int, int], seed: int, spread: float = 1.0) -> torch.Tensor:
    """Normal fp32 data whose tokens and channels have magnitudes of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    tokens = torch.randn((*shape[:3], 1), generator=generator)
    channels = torch.randn((*shape[:2], 1, shape[3]), generator=generator)
    return x * (spread * tokens).exp() * (spread * channels).exp()


def naive(x: torch.Tensor, axis: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' procedure on one tile, in double precision and with logarithms."""
    other = TOKENS if axis == CHANNELS else CHANNELS
    x = x.double()
    last, first = torch.zeros_like(x.sum(axis, True)), torch.zeros_like(x.sum(other, True))

    def now() -> torch.Tensor:
        return x / first.exp() / last.exp()

    def imbalance() -> float:
        stds = [now().std(i) for i in (axis, other)]
        return sum(float(s.max() / s.min().clamp(min=1e-8)) for s in stds)

    least, best = imbalance(), (last, first)
    for _ in range(iterations):
        first = (first + now().std(other, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        last = (last + now().std(axis, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        if imbalance() <= least:
            least, best = imbalance(), (last, first)
    return best[0].exp(), best[1].exp()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scales_are_those_of_the_naive_reference(data: st.DataObject) -> None:
    """Up to a common factor: where it leaves the balance as it is, rounding decides about it."""
    tokens = data.draw(st.sampled_from([2, 3, 7, 16, 31, 64]))
    dim = data.draw(st.sampled_from([16, 24, 64]))
    size = data.draw(st.sampled_from([0.05, 1.0, 20.0]))
    x = size * uneven((2, 2, tokens, dim), data.draw(st.integers(0, 999)))
    iterations = data.draw(st.sampled_from([0, 1, 2, 16]))
    for axis in (TOKENS, CHANNELS):
        found = balance(x, axis, iterations)
        for b in range(2):
            for h in range(2):
                wanted = naive(x[b, h], axis, iterations)
                for both, theirs in zip(found, wanted, strict=True):
                    mine = both[b, h].double()
                    mine, theirs = mine / mine.mean(), theirs / theirs.mean()
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
def test_all_tokens_and_channels_get_the_same_deviation(axis: int) -> None:
    """Where no scale has to be below exp(-0.3): one axis is large, the other nearly even."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 256, 64, generator=generator)
    x[..., ::32] *= 3
    x *= 50 * torch.randn(3, 2, 256, 1, generator=generator).exp()
    x = x if axis == TOKENS else x.mT
    scale, cross = balance(x, axis, 16)
    for i in (TOKENS, CHANNELS):
        before, after = deviation(x, i), deviation(x / scale / cross, i)
        assert before.amax() > 2 * before.amin()
        assert after.amax() < 1.01 * after.amin()
        assert float(after.mean()) == pytest.approx(1, abs=0.01)


def test_small_deviations_are_left_as_the_authors_leave_them() -> None:
    """A tile whose deviations are all below exp(-0.3) squared has one scale for everything."""
    x = 0.01 * uneven((1, 1, 64, 64), 2, spread=0.3)
    for scales in balance(x, TOKENS, 16):
        assert float(scales.min()) == float(scales.max())


@pytest.mark.parametrize(("bits", "value_bits"), [(2, None), (3, 4), (4, 2)])
@pytest.mark.parametrize("dim", [16, 64, 96])
def test_packed_is_fake_bit_for_bit(bits: int, value_bits: int | None, dim: int) -> None:
    shape = (3, 2, 32, dim)
    c = codec(bits, value_bits=value_bits)
    keys, values = uneven(shape, 0).half(), 5 * uneven(shape, 1).half()
    found = c.unpack(c.pack(keys, values), shape)
    one = [x.transpose(0, 1).flatten(1, 2)[None] for x in (keys, values)]  # 3 tiles of a sequence
    fake = c.fake(*(torch.cat([x, x[:, :, :5]], 2) for x in one))  # and a part of one
    for a, b in zip(found, fake, strict=True):
        assert torch.equal(a.transpose(0, 1).flatten(1, 2), b[0, :, :96])
        assert b.shape[2] == 101 and bool(b.isfinite().all())


@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
def test_a_tile_is_encoded_as_if_alone(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = uneven((7, 3, 31, 80), 3).half()
    together = encode(x, axis, 3, 16)
    monkeypatch.setattr("kvquant.schemes.kvarn.CPU_PIECE", 2 * x[0].numel())
    pieces = encode(x, axis, 3, 16)
    for b in range(7):
        for h in range(3):
            alone = encode(x[b : b + 1, h : h + 1], axis, 3, 16)
            for mine, piece, all_of_them in zip(alone, pieces, together, strict=True):
                assert torch.equal(mine[0, 0], all_of_them[b, h])
                assert torch.equal(mine[0, 0], piece[b, h])


def test_keys_share_levels_per_channel_and_values_per_token() -> None:
    packed = codec(2).pack(blocks(0), blocks(1)).dense
    assert packed["keys_step"].shape == packed["keys_minimum"].shape == (3, 2, 1, 64)
    assert packed["values_step"].shape == packed["values_minimum"].shape == (3, 2, 32, 1)
    assert packed["keys_cross"].shape == (3, 2, 32, 1)
    assert packed["values_cross"].shape == (3, 2, 1, 64)


@pytest.mark.parametrize("bits", [2, 4])
def test_balance_keeps_the_magnitude_of_small_tokens(bits: int) -> None:
    """The publication's point: with levels per channel alone, large tokens ruin the others."""
    x = blocks(4, (2, 2, 128, 64)).float()
    x[:, :, ::8] *= 16
    x = x.half()
    small = torch.arange(128) % 8 != 0
    errors = [
        relative_error(decode(*encode(x, TOKENS, bits, n))[:, :, small], x[:, :, small])
        for n in (0, 16)
    ]
    assert errors[1] < errors[0] / 5


def test_error_is_that_of_uniform_rounding() -> None:
    """step**2 / 12, where the step is a fifteenth of the range of 128 normal numbers."""
    x = blocks(5, (4, 2, 128, 64))
    expected = (5.2 / 15) ** 2 / 12  # 5.2 deviations are the expected range
    found = relative_error(codec(4, tile=128).fake(x[:1], x[:1])[0], x[:1])
    assert found == pytest.approx(expected, rel=0.1)


def test_constant_and_huge_tokens_stay_finite() -> None:
    c = codec(2)
    for x in (torch.zeros(1, 2, 32, 64), torch.full((1, 2, 32, 64), -3.0)):
        for y in c.fake(x.half(), x.half()):
            torch.testing.assert_close(y, x, atol=0.15, rtol=0)  # of fp16's 24 after the rotation
    huge = (blocks(6, (1, 2, 32, 64)).float() * 1e30).bfloat16()
    assert all(bool(y.isfinite().all()) for y in c.fake(huge, huge))


@pytest.mark.parametrize("bits", [(2, 2, 9728), (4, 2, 13824), (4, 4, 17920)])
def test_a_published_tile_has_its_published_bytes(bits: tuple[int, int, int]) -> None:
    """128 tokens of 128 channels: codes, and 3 times 128 numbers of 16 bits, twice."""
    x = blocks(7, (1, 1, 128, 128))
    assert codec(bits[0], value_bits=bits[1], tile=128).pack(x, x).nbytes == bits[2]
    assert bits[2] == 128 * 128 * (bits[0] + bits[1]) // 8 + 2 * 3 * 128 * 2


def test_published_options_are_the_defaults() -> None:
    spec = KvarnScheme(kind="kvarn", bits=4, value_bits=2)
    assert (spec.tile, spec.iterations, spec.sinks, spec.residual) == (128, 16, 128, 0)
    assert spec.nominal_bits == 3 and KvarnScheme(kind="kvarn", bits=2).nominal_bits == 2


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(UserError, match="head_dim: no Hadamard rotation of 72"):
        codec(3).check_model(4, 72)
    with pytest.raises(ValidationError, match="tile"):
        codec(3, tile=100)
