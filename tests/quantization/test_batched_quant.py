"""The layer quantizer against the loops of kernels.reference, and bit-exact packing.

Also covers: kernels.reference, quantization.block_input.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.kernels import reference
from kvquant.quantization.batched_quant import BatchedKVQuantizer
from tests.support.quantizers import random_quantizer, token_major


def make(heads: int, dim: int, bits: int, outliers: float, seed: int = 0) -> BatchedKVQuantizer:
    tables = random_quantizer(heads, dim, bits, values="uniform", seed=seed)
    return BatchedKVQuantizer(tables, bits, outliers)


def data(shape: tuple[int, ...], seed: int, kind: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # coarse steps, so that ties are common
    return ((x * 8).round() / 8 * (1 + 3 * (torch.rand(shape, generator=generator) < 0.02))).to(
        kind
    )


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    outliers=st.sampled_from([0.0, 0.01, 0.02, 1.0]),
    heads=st.integers(1, 2),
    dim=st.sampled_from([8, 16]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_specification(
    bits: int, outliers: float, heads: int, dim: int, seed: int
) -> None:
    quantizer = make(heads, dim, bits, outliers, seed)
    x = data((2, heads, 4, dim), seed)
    t = quantizer.tables
    keys = token_major(quantizer.fake_keys(x))
    if outliers == 1.0:
        assert torch.equal(keys, token_major(x).float())
        assert torch.equal(quantizer.fake_values(x), x.float())
        return
    expected = reference.quantize_keys(
        token_major(x), t.key_zero.view(-1), t.key_scale.view(-1), t.key_levels, outliers > 0
    )
    assert torch.equal(keys, expected)
    per_side = outliers_per_side(outliers, heads * dim)
    expected = reference.quantize_values(token_major(x), t.value_levels, per_side)
    assert torch.equal(token_major(quantizer.fake_values(x)), expected)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    outliers=st.sampled_from([0.0, 0.01, 0.02, 1.0]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    size=st.sampled_from([32, 64]),
    kind=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_pack_unpack_equals_fake_quantization_bit_for_bit(
    bits: int,
    outliers: float,
    heads: int,
    dim: int,
    size: int,
    kind: torch.dtype,
    seed: int,
) -> None:
    quantizer = make(heads, dim, bits, outliers, seed)
    x = data((3, heads, size, dim), seed, kind)
    assert torch.equal(
        quantizer.unpack_keys(quantizer.pack_keys(x), x.shape), quantizer.fake_keys(x)
    )
    packed = quantizer.pack_values(x)
    assert torch.equal(quantizer.unpack_values(packed, x.shape), quantizer.fake_values(x))
    assert packed.codes.nbytes == x.numel() * bits // 8


def test_all_equal_token_and_ties_do_not_overfill() -> None:
    quantizer = make(2, 64, 3, 0.02)
    x = torch.full((1, 2, 32, 64), 1.5).half()
    assert torch.equal(quantizer.fake_values(x), x.float())
    packed = quantizer.pack_values(x)
    assert packed.outliers is not None
    assert packed.outliers.values.numel() <= 32 * 2 * outliers_per_side(0.02, 128)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    quantizer = make(3, 64, 3, 0.01)
    x = data((4, 3, 32, 64), 1)
    alone = torch.cat([quantizer.fake_values(x[i : i + 1]) for i in range(4)])
    assert torch.equal(quantizer.fake_values(x), alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    quantizer = make(1, 8, 2, 0.01)
    x = torch.zeros(1, 1, 8, 8).half()
    x[0, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="keys: NaN or Inf"):
        quantizer.pack_keys(x)
    with pytest.raises(ValueError, match="values: NaN or Inf"):
        quantizer.pack_values(x)


def test_wrong_type_and_wrong_levels_are_named() -> None:
    quantizer = make(1, 8, 2, 0.0)
    with pytest.raises(TypeError, match="fp16"):
        quantizer.pack_keys(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="key_levels"):
        BatchedKVQuantizer(quantizer.tables, 3, 0.0)


@pytest.mark.parametrize(
    ("fraction", "channels", "expected"),
    [(0.01, 4096, 20), (0.01, 192, 1), (0.01, 1024, 5), (0.0, 192, 0), (1.0, 192, 96)],
)
def test_outliers_per_side(fraction: float, channels: int, expected: int) -> None:
    assert outliers_per_side(fraction, channels) == expected
